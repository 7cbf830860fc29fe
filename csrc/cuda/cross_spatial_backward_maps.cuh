// cross_spatial's backward from f's gradient to those of X, and from these to e and its vectors.
//
//   inputs     g_X = k1ᵀ∗g_f1 + k3ᵀ∗g_f3 + k5ᵀ∗g_f5 + gl·(α·Wcᵀo) + α·Wcᵀm   (transposed kernels)
//   branches   g_u = g_x1·rstd·γ        g_e = g_u·αh·αw + K3ᵀ∗g_x2
//              g_αh = Σ_w g_u·e·αw      g_αw = Σ_h g_u·e·αh
//              g_mean = −γ·rstd·Σ g_x1  g_rstd = γ·Σ g_x1·(u − mean)
//              partials (slabs, 3c) of γ: rstd·Σ g_x1·(u − mean), of β: Σ g_x1, of b3: Σ g_x2
//
// Grid        inputs: (rows, shares) as in cross_spatial_sheets.cuh; branches: slabs, a block walks
//             all tiles of its slab, so that it adds sums along rows and columns in order.
// Bytes       f's gradient once (with halos), X's gradient written and read once (with halos); e
//             once, e's gradient once.
// Accuracy    as cross_spatial_backward.cuh.
#pragma once

#include "cross_spatial_backward.cuh"

namespace ciema {

struct CrossSpatialBranchesBackwardParams {
  CrossSpatialSizes sizes;
  const void* e;
  void* grad_e;
  int64_t e_stride_b, grad_stride_b;
  CrossSpatialMap map, grad_map;
  const void* grad_sheets;
  const void* transposed;
  const float *alpha_h, *alpha_w, *mean, *rstd, *gn_weight;
  float *grad_alpha_h, *grad_alpha_w, *grad_mean, *grad_rstd;
  float* partials;  // (slabs, 3c)
};

namespace cross_spatial {

// acc += the convolution of radius kRadius whose packed tiles begin at `tile`.
template <class N, int kHalo, int kRadius>
__device__ __forceinline__ void convolve_square(typename N::Result& acc,
                                                const typename N::T* window,
                                                const typename N::Packed& packed, int tile) {
  constexpr int kSize = 2 * kRadius + 1;
  typename N::Addresses first;
  window_addresses<N, kHalo, kRadius>(window, first);
#pragma unroll 1
  for (int dy = 0; dy < kSize; ++dy) {
#pragma unroll N::kTapsUnrolled
    for (int dx = 0; dx < kSize; ++dx) {
      N::convolve1x1(acc, first, dy * kWindowPitch<N, kHalo> + dx * N::kPitch, packed,
                     tile + dy * kSize + dx);
    }
  }
}

// Grid (2·slabs, shares).
template <class N>
__global__ void __launch_bounds__(kTileThreads<N>, kBlocks<N>)
    inputs_backward_kernel(CrossSpatialBackwardParams p) {
  using T = typename N::T;
  constexpr int kChannels = N::kChannels;
  CIEMA_DYNAMIC_SHARED(T, window);
  const CrossSpatialSizes& s = p.sizes;
  const int row = static_cast<int>(blockIdx.x);
  const int64_t size = static_cast<int64_t>(s.height) * s.width * kChannels;
  const T* grad_features = static_cast<const T*>(p.grad_features) + 3 * row * size;
  T* out = static_cast<T*>(p.grad_sheets) + row * size;
  const typename N::Packed packed(p.transposed);
  const float* vectors =
      p.gradient_vectors + static_cast<int64_t>(row) * kGradientVectors * kChannels;
  for (int t = static_cast<int>(blockIdx.y); t < tiles_of_map(s); t += s.shares) {
    const Tile tile = tile_at(s, t);
    const Pixels<N> pixels(s, tile);
    float gl[N::kRows][2];
    load_logit_gradients<N>(p, row, pixels, gl);
    typename N::Result acc;
#pragma unroll
    for (int n = 0; n < N::kColumns; ++n) {
      const float2 direct = N::of_columns(vectors + kDirectBranch * kChannels, n);
      const float2 offset = N::of_columns(vectors + kOffsetBranch * kChannels, n);
#pragma unroll
      for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[m][n][i] = fmaf(gl[m][i / 2], i % 2 == 0 ? direct.x : direct.y,
                              i % 2 == 0 ? offset.x : offset.y);
        }
      }
    }
#pragma unroll 1
    for (int part = 0; part < 3; ++part) {
      __syncthreads();  // the last window is no longer needed
      load_window<N, 2>(s, tile, grad_features + part * kChannels, window, 3);
      __syncthreads();
      if (part == 0) {
        convolve_square<N, 2, 0>(acc, window, packed, kSpatial1);
      } else if (part == 1) {
        convolve_square<N, 2, 1>(acc, window, packed, kSpatial3);
      } else {
        convolve_square<N, 2, 2>(acc, window, packed, kSpatial5);
      }
    }
    store_result<N>(out, pixels, acc);
  }
}

// ---- branches ----------------------------------------------------------------------------------

// Shared memory of a block in bytes: a window of x2's gradient, whose place the products g_u·e take
// (float, a pitch of kChannels + 1), then the tile of e, whose place e's gradient takes.
template <class N>
constexpr int kThroughPitch = N::kChannels + 1;
template <class N>
__host__ __device__ constexpr int branches_first_bytes() {
  constexpr int window = window_size<N>(1) * static_cast<int>(sizeof(typename N::T));
  constexpr int through = kTilePixels * kThroughPitch<N> * 4;
  return ((window > through ? window : through) + 15) / 16 * 16;
}

// e's gradient of a tile from shared memory, in the map's layout.
template <class N>
__device__ void store_map_tile(const CrossSpatialSizes& s, const CrossSpatialMap& map,
                               const Tile& tile, const typename N::T* from,
                               typename N::T* grad_e) {
  using T = typename N::T;
  constexpr int kElements = Vector<T>::kElements, kPacks = N::kChannels / kElements;
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < kTilePixels * kPacks;
       item += static_cast<int>(blockDim.x)) {
    const int pixel = map.channels_last ? item / kPacks : item % kTilePixels;
    const int channel = (map.channels_last ? item % kPacks : item / kTilePixels) * kElements;
    const int row = tile.top + pixel / kTileWidth, column = tile.left + pixel % kTileWidth;
    if (row >= s.height || column >= s.width) continue;
    const int64_t at = (row * s.width + column) * map.stride_s;
    const auto pack = load_vector<Vector<T>>(from + pixel * N::kPitch + channel);
    if (map.vectors_fit) {
      if (channel < s.channels) store_vector(grad_e + at + channel, pack);
      continue;
    }
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      if (channel + k < s.channels) grad_e[at + (channel + k) * map.stride_c] = pack.element[k];
    }
  }
}

// Adds a tile's sums of g_u·e·α along its rows and columns to the gates' gradients: a thread has
// the same rows and columns of the tile's channels in every tile, so that none meets another's.
template <int kChannels>
__device__ void add_gate_gradients(const CrossSpatialBranchesBackwardParams& p, const Tile& tile,
                                   int64_t slab, const float* through,
                                   const TileGates<kChannels>& gates) {
  const CrossSpatialSizes& s = p.sizes;
  for (int item = static_cast<int>(threadIdx.x); item < (kTileHeight + kTileWidth) * kChannels;
       item += static_cast<int>(blockDim.x)) {
    const int position = item / kChannels, channel = item % kChannels;
    const bool is_row = position < kTileHeight;
    const int other = position - kTileHeight;
    const int at = is_row ? tile.top + position : tile.left + other;
    if (channel >= s.channels || at >= (is_row ? s.height : s.width)) continue;
    float sum = 0.0f;
    if (is_row) {
#pragma unroll 4
      for (int x = 0; x < kTileWidth; ++x) {
        sum += through[(position * kTileWidth + x) * (kChannels + 1) + channel] *
               gates[kTileHeight + x][channel];
      }
    } else {
#pragma unroll 4
      for (int y = 0; y < kTileHeight; ++y) {
        sum += through[(y * kTileWidth + other) * (kChannels + 1) + channel] * gates[y][channel];
      }
    }
    float* grad = is_row ? p.grad_alpha_h + (slab * s.channels + channel) * s.height + at
                         : p.grad_alpha_w + (slab * s.channels + channel) * s.width + at;
    *grad = (is_row ? tile.left : tile.top) == 0 ? sum : *grad + sum;
  }
}

// Of a warp's pixels: e's gradient added to acc, g_u·e to `through`, sums of g_x1 and of
// g_x1·(u − mean). `affine`: mean, rstd·γ.
template <class N>
__device__ void branch_gradients(const Pixels<N>& pixels, const typename N::T* grad_x1,
                                 const typename N::T* e_tile,
                                 const TileGates<N::kChannels>& gates,
                                 const float (&affine)[2][N::kChannels], typename N::Result& acc,
                                 typename N::Result& through, float* sums) {
  typename N::Result grad;
  load_result<N>(grad_x1, pixels, grad);
  add_sums<N>(pixels, grad, sums);
#pragma unroll
  for (int m = 0; m < N::kRows; ++m) {
    const int y = warp_of_block() * N::kRows + m;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int x = lane_of_warp() / 4 + 8 * half;
#pragma unroll
      for (int n = 0; n < N::kColumns; ++n) {
        const int channel = 8 * n + lane_of_warp() % 4 * 2;
        const float2 two = load_two(e_tile + (y * kTileWidth + x) * N::kPitch + channel);
        const float values[2] = {two.x, two.y};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float of_column = gates[kTileHeight + x][channel + j];
          const float of_row = gates[y][channel + j];
          const float g = grad[m][n][2 * half + j], grad_u = g * affine[1][channel + j];
          const float u = rounded_product(rounded_product(values[j], of_column), of_row);
          acc[m][n][2 * half + j] += grad_u * of_column * of_row;
          through[m][n][2 * half + j] = grad_u * values[j];
          grad[m][n][2 * half + j] = g * (u - affine[0][channel + j]);
        }
      }
    }
  }
  add_sums<N>(pixels, grad, sums + N::kChannels);
}

// Results to a tile in shared memory, `pitch` values from pixel to pixel.
template <class N, class V>
__device__ __forceinline__ void store_tile(V* tile, int pitch, const typename N::Result& result) {
#pragma unroll
  for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel =
          (warp_of_block() * N::kRows + m) * kTileWidth + lane_of_warp() / 4 + 8 * half;
#pragma unroll
      for (int n = 0; n < N::kColumns; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          tile[pixel * pitch + 8 * n + lane_of_warp() % 4 * 2 + j] =
              from_float<V>(result[m][n][2 * half + j]);
        }
      }
    }
  }
}

// Gradients of mean and rstd, and the slab's partial sums, from its warps' sums.
template <class N>
__device__ void finish_branches(const CrossSpatialBranchesBackwardParams& p, int64_t slab,
                                const float* of_warps, const float* of_threads) {
  constexpr int kChannels = N::kChannels, kWarps = kTileThreads<N> / kWarp;
  const int c = p.sizes.channels;
  for (int i = static_cast<int>(threadIdx.x); i < c; i += kTileThreads<N>) {
    float total = 0.0f, deviation = 0.0f, bias = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      total += of_warps[warp * 2 * kChannels + i];
      deviation += of_warps[warp * 2 * kChannels + kChannels + i];
    }
    for (int at = i; at < kTileThreads<N>; at += kChannels) bias += of_threads[at];
    const float gamma = p.gn_weight[i], rstd = p.rstd[slab * c + i];
    p.grad_mean[slab * c + i] = -total * gamma * rstd;
    p.grad_rstd[slab * c + i] = deviation * gamma;
    float* own = p.partials + slab * 3 * c + i;
    own[0] = deviation * rstd;
    own[c] = total;
    own[2 * c] = bias;
  }
}

// Grid slabs.
template <class N>
__global__ void __launch_bounds__(kTileThreads<N>, 1)
    branches_backward_kernel(CrossSpatialBranchesBackwardParams p) {
  using T = typename N::T;
  constexpr int kChannels = N::kChannels, kWarps = kTileThreads<N> / kWarp;
  CIEMA_DYNAMIC_SHARED(unsigned char, memory);
  CIEMA_SHARED(float, gates, [kTileHeight + kTileWidth][kGatePitch<kChannels>]);
  CIEMA_SHARED(float, affine, [2][kChannels]);
  CIEMA_SHARED(float, of_warps, [kWarps][2 * kChannels]);
  CIEMA_SHARED(float, of_threads, [kTileThreads<N>]);
  T* window = reinterpret_cast<T*>(memory);
  auto* through_tile = reinterpret_cast<float*>(memory);
  T* e_tile = reinterpret_cast<T*>(memory + branches_first_bytes<N>());
  const CrossSpatialSizes& s = p.sizes;
  const int64_t slab = blockIdx.x, size = static_cast<int64_t>(s.height) * s.width * kChannels;
  const int64_t group = slab % s.groups * s.channels, sample = slab / s.groups;
  const T* e = static_cast<const T*>(p.e) + sample * p.e_stride_b + group * p.map.stride_c;
  T* grad_e = static_cast<T*>(p.grad_e) + sample * p.grad_stride_b + group * p.grad_map.stride_c;
  const T* grad_x1 = static_cast<const T*>(p.grad_sheets) + slab * size;
  const T* grad_x2 = grad_x1 + s.slabs * size;
  const typename N::Packed packed(p.transposed);
  for (int i = static_cast<int>(threadIdx.x); i < kChannels; i += kTileThreads<N>) {
    const bool real = i < s.channels;
    affine[0][i] = real ? p.mean[slab * s.channels + i] : 0.0f;
    affine[1][i] = real ? p.rstd[slab * s.channels + i] * p.gn_weight[i] : 0.0f;
  }
  float* sums = of_warps[warp_of_block()];
  for (int i = lane_of_warp(); i < 2 * kChannels; i += kWarp) sums[i] = 0.0f;
  float bias = 0.0f;
  for (int t = 0; t < tiles_of_map(s); ++t) {
    const Tile tile = tile_at(s, t);
    const Pixels<N> pixels(s, tile);
    __syncthreads();  // the last tile is no longer needed
    load_window<N, 1>(s, tile, grad_x2, window);
    load_map_window<N, 0>(s, p.map, tile, e, e_tile);
    load_tile_gates<kChannels>(s, tile, slab, p.alpha_h, p.alpha_w, gates);
    __syncthreads();
    bias += window_sum<N, 1>(window);
    typename N::Result acc, through;
    N::clear(acc);
    convolve_square<N, 1, 1>(acc, window, packed, kConv3x3);
    branch_gradients<N>(pixels, grad_x1, e_tile, gates, affine, acc, through, sums);
    __syncthreads();  // the window gives way to `through`
    store_tile<N>(through_tile, kThroughPitch<N>, through);
    store_tile<N>(e_tile, N::kPitch, acc);
    __syncthreads();
    store_map_tile<N>(s, p.grad_map, tile, e_tile, grad_e);
    add_gate_gradients<kChannels>(p, tile, slab, through_tile, gates);
  }
  of_threads[threadIdx.x] = bias;
  __syncthreads();
  finish_branches<N>(p, slab, of_warps[0], of_threads);
}

}  // namespace cross_spatial
}  // namespace ciema
