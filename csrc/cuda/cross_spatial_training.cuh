// cross_spatial with the batch's statistics (spec.md 2.3 and 3): e and its gates → w; launches:
//
//   pack       weights as fragments (cross_spatial_pack.cuh)
//   branches   x1 = (e·αw·αh − mean)·rstd·γ + β,  x2 = K3∗e + b3            to sheets
//   features   f = [k1∗X; k3∗X; k5∗X] to scratch; moments of Wa∗f; Σ X
//   reduce     R = Wr∗(σ(BN(Wa∗f)) ⊙ f) to scratch; moments of R
//   gate       y = BN(R) + α·Wc∗X only through its mean and two dot products (spec.md 5.4):
//              s = softmax_c(mean y), w = σ(s1·y2 + s2·y1)
//
// Layouts     e as "rows" or "channels_last"; sheets as in cross_spatial_sheets.cuh.
// Grid        (rows or slabs, shares of the tiles); blocks of a share write one row of partial
//             results, and the last block of a set of statistics to arrive merges its rows.
// Bytes       e once, w once. Scratch in maps of C channels (padded): X written once and read
//             twice (with halos 1.9 times each), f written and read (3 each), R written and read.
// Accuracy    operands and scratch in T (float32: split products), accumulators and sums float32;
//             variance by Chan's formula over tiles, warps, shares and samples in a fixed order.
// Recomputed  Wa∗f, in reduce.
#pragma once

#include "cross_spatial_statistics.cuh"

namespace ciema {

// A batch norm: parameters (c or 3c), and its statistics (sets, c or 3c).
struct CrossSpatialNorm {
  const float *weight, *bias;
  float *mean, *var;
  float eps;
};

// A slab of e or of its gradient.
struct CrossSpatialMap {
  int64_t stride_c, stride_s;
  bool channels_last;
  bool vectors_fit;  // channels_last: 16-byte packs of channels are aligned, and none is cut
};

struct CrossSpatialTrainingParams {
  CrossSpatialSizes sizes;
  const void* e;
  int64_t e_stride_b;
  CrossSpatialMap map;
  const float *alpha_h, *alpha_w;  // (slabs, c, H), (slabs, c, W)
  const float *mean, *rstd;        // (slabs, c)
  const void* packed;
  const float* vectors;                       // kVectors of kChannels
  CrossSpatialNorm attention, reduce;
  const float *channel_feat, *alpha;          // (c, c), (1)
  void* sheets;                               // (2 or 3)·slabs rows: x1, x2, and e if it is wanted
  bool copies_e;
  void* features;                             // 2·slabs rows of three parts
  void* reduced;                              // 2·slabs rows
  float *moments, *reduced_moments;           // (2·slabs·shares, moments_size)
  float* sums;                                // Σ X: (2·slabs·shares, kChannels)
  int* counters;                              // (2, sets), zero
  void* w;                                    // (slabs, H·W)
  float *softmax1, *softmax2;                 // (slabs, c)
};

namespace cross_spatial {

// ---- branches ----------------------------------------------------------------------------------

// A tile of e with a halo to shared memory, zero around the map and past c.
template <class N, int kHalo>
__device__ void load_map_window(const CrossSpatialSizes& s, const CrossSpatialMap& map,
                                const Tile& tile, const typename N::T* e,
                                typename N::T* window) {
  using T = typename N::T;
  constexpr int kColumns = kTileWidth + 2 * kHalo, kPixels = (kTileHeight + 2 * kHalo) * kColumns;
  constexpr int kElements = Vector<T>::kElements, kPacks = N::kChannels / kElements;
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < kPixels * kPacks;
       item += static_cast<int>(blockDim.x)) {
    const int pixel = map.channels_last ? item / kPacks : item % kPixels;
    const int channel = (map.channels_last ? item % kPacks : item / kPixels) * kElements;
    const int row = tile.top - kHalo + pixel / kColumns;
    const int column = tile.left - kHalo + pixel % kColumns;
    const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
    const int64_t at = inside ? (row * s.width + column) * map.stride_s : 0;
    T* target = window + pixel * N::kPitch + channel;
    if (map.vectors_fit) {
      const bool whole = inside && channel < s.channels;
      ptx::copy_async(target, e + (whole ? at + channel : 0), whole);
      continue;
    }
    Vector<T> pack;
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      const bool own = inside && channel + k < s.channels;
      pack.element[k] = own ? e[at + (channel + k) * map.stride_c] : from_float<T>(0.0f);
    }
    store_vector(target, pack);
  }
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
}

// Floats from one position's gates to the next in shared memory.
template <int kChannels>
constexpr int kGatePitch = kChannels + 4;
template <int kChannels>
using TileGates = float[kTileHeight + kTileWidth][kGatePitch<kChannels>];

// A tile's gates, zero past c: rows, then columns.
template <int kChannels>
__device__ void load_tile_gates(const CrossSpatialSizes& s, const Tile& tile, int64_t slab,
                                const float* alpha_h, const float* alpha_w,
                                TileGates<kChannels>& gates) {
  constexpr int kPositions = kTileHeight + kTileWidth;
  for (int i = static_cast<int>(threadIdx.x); i < kPositions * kChannels;
       i += static_cast<int>(blockDim.x)) {
    const int channel = i / kPositions, position = i % kPositions;
    const bool is_row = position < kTileHeight;
    const int at = is_row ? tile.top + position : tile.left + position - kTileHeight;
    const int size = is_row ? s.height : s.width;
    const float* alpha = (is_row ? alpha_h : alpha_w) + (slab * s.channels + channel) * size;
    gates[position][channel] = channel < s.channels && at < size ? alpha[at] : 0.0f;
  }
}

// x1 of the tile to its sheet, and e to its own if that is wanted.
template <class N>
__device__ void normalise_tile(const CrossSpatialTrainingParams& p, const Tile& tile,
                               const typename N::T* window,
                               const TileGates<N::kChannels>& gates,
                               const float (&affine)[3][N::kChannels], typename N::T* x1,
                               typename N::T* copy) {
  constexpr int kPairs = N::kChannels / 2;
  for (int i = static_cast<int>(threadIdx.x); i < kTilePixels * kPairs;
       i += static_cast<int>(blockDim.x)) {
    const int pixel = i / kPairs, channel = i % kPairs * 2;
    const int y = pixel / kTileWidth, x = pixel % kTileWidth;
    if (tile.top + y >= p.sizes.height || tile.left + x >= p.sizes.width) continue;
    const float2 e =
        load_two(window + ((y + 1) * (kTileWidth + 2) + x + 1) * N::kPitch + channel);
    const float values[2] = {e.x, e.y};
    float out[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float of_column = gates[kTileHeight + x][channel + j], of_row = gates[y][channel + j];
      const float u = rounded_product(rounded_product(values[j], of_column), of_row);
      out[j] = (u - affine[0][channel + j]) * affine[1][channel + j] + affine[2][channel + j];
    }
    const int64_t at = static_cast<int64_t>((tile.top + y) * p.sizes.width + tile.left + x) *
                           N::kChannels + channel;
    store_two(x1 + at, out[0], out[1]);
    if (p.copies_e) store_two(copy + at, e.x, e.y);
  }
}

// Grid (slabs, shares).
template <class N>
__global__ void __launch_bounds__(kTileThreads<N>, kBlocks<N>)
    branches_kernel(CrossSpatialTrainingParams p) {
  using T = typename N::T;
  CIEMA_DYNAMIC_SHARED(T, window);
  CIEMA_SHARED(float, gates, [kTileHeight + kTileWidth][kGatePitch<N::kChannels>]);
  CIEMA_SHARED(float, affine, [3][N::kChannels]);
  const CrossSpatialSizes& s = p.sizes;
  const int64_t slab = blockIdx.x, size = static_cast<int64_t>(s.height) * s.width * N::kChannels;
  const T* e = static_cast<const T*>(p.e) + slab / s.groups * p.e_stride_b +
               slab % s.groups * s.channels * p.map.stride_c;
  T* x1 = static_cast<T*>(p.sheets) + slab * size;
  T* x2 = x1 + s.slabs * size;
  const typename N::Packed packed(p.packed);
  for (int i = static_cast<int>(threadIdx.x); i < N::kChannels; i += kTileThreads<N>) {
    const bool own = i < s.channels;
    affine[0][i] = own ? p.mean[slab * s.channels + i] : 0.0f;
    affine[1][i] =
        own ? p.rstd[slab * s.channels + i] * p.vectors[kNormWeight * N::kChannels + i] : 0.0f;
    affine[2][i] = p.vectors[kNormBias * N::kChannels + i];
  }
  for (int t = static_cast<int>(blockIdx.y); t < tiles_of_map(s); t += s.shares) {
    const Tile tile = tile_at(s, t);
    __syncthreads();  // the last tile is no longer needed
    load_map_window<N, 1>(s, p.map, tile, e, window);
    load_tile_gates<N::kChannels>(s, tile, slab, p.alpha_h, p.alpha_w, gates);
    __syncthreads();
    normalise_tile<N>(p, tile, window, gates, affine, x1, x1 + 2 * s.slabs * size);
    typename N::Addresses first;
    window_addresses<N, 1, 1>(window, first);
    typename N::Result result;
    N::clear(result);
    N::convolve3x3(result, first, kWindowPitch<N, 1>, packed, kConv3x3);
#pragma unroll
    for (int n = 0; n < N::kColumns; ++n) {
      const float2 bias = N::of_columns(p.vectors + kConv3x3Bias * N::kChannels, n);
#pragma unroll
      for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) result[m][n][i] += i % 2 == 0 ? bias.x : bias.y;
      }
    }
    store_result<N>(x2, Pixels<N>(s, tile), result);
  }
}

// ---- features ----------------------------------------------------------------------------------

// Σ of the window's own pixels, outside the map zero, for channel threadIdx % kChannels.
template <class N, int kHalo>
__device__ __forceinline__ float window_sum(const typename N::T* window) {
  constexpr int kColumns = kTileWidth + 2 * kHalo, kParts = kTileThreads<N> / N::kChannels;
  const int channel = static_cast<int>(threadIdx.x) % N::kChannels;
  float sum = 0.0f;
#pragma unroll 4
  for (int pixel = static_cast<int>(threadIdx.x) / N::kChannels; pixel < kTilePixels;
       pixel += kParts) {
    const int at = (pixel / kTileWidth + kHalo) * kColumns + pixel % kTileWidth + kHalo;
    sum += to_float(window[at * N::kPitch + channel]);
  }
  return sum;
}

// Adds the threads' sums of a channel in order, to out[kChannels]; `sums` is shared memory.
template <class N>
__device__ __forceinline__ void store_window_sums(float sum, float* sums, float* out) {
  constexpr int kParts = kTileThreads<N> / N::kChannels;
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= N::kChannels) return;
  float total = 0.0f;
  for (int part = 0; part < kParts; ++part) total += sums[part * N::kChannels + threadIdx.x];
  out[threadIdx.x] = total;
}

// Grid (2·slabs, shares).
template <class N>
__global__ void __launch_bounds__(kTileThreads<N>, 1)
    features_kernel(CrossSpatialTrainingParams p) {
  using T = typename N::T;
  constexpr int kCount = 3 * N::kChannels, kWarps = kTileThreads<N> / kWarp;
  CIEMA_DYNAMIC_SHARED(T, window);
  CIEMA_SHARED(float, of_warps, [kWarps][moments_size(kCount)]);
  CIEMA_SHARED(float, sums, [kTileThreads<N>]);
  const CrossSpatialSizes& s = p.sizes;
  const int row = static_cast<int>(blockIdx.x);
  const int64_t size = static_cast<int64_t>(s.height) * s.width * N::kChannels;
  const T* x = static_cast<const T*>(p.sheets) + row * size;
  T* out = static_cast<T*>(p.features) + 3 * row * size;
  const typename N::Packed packed(p.packed);
  float* moments = of_warps[warp_of_block()];
  float sum = 0.0f;
  int count = 0;
  for (int i = lane_of_warp(); i < moments_size(kCount); i += kWarp) moments[i] = 0.0f;
  __syncwarp();
  for (int t = static_cast<int>(blockIdx.y); t < tiles_of_map(s); t += s.shares) {
    const Tile tile = tile_at(s, t);
    __syncthreads();
    load_window<N, 2>(s, tile, x, window);
    __syncthreads();
    sum += window_sum<N, 2>(window);
    const Pixels<N> pixels(s, tile);
    {
      typename N::Addresses first;
      window_addresses<N, 2, 2>(window, first);
      typename N::Result f[3];
      N::convolve(f, first, kWindowPitch<N, 2>, packed);
#pragma unroll
      for (int part = 0; part < 3; ++part) store_result<N>(out, pixels, f[part], part, 3);
    }
    const Parts<N> features{out, pixels};  // this thread's own values
    const int own = pixels_of_warp<N>(s, tile);
#pragma unroll 1
    for (int k = 0; k < 3; ++k) {
#pragma unroll 1
      for (int first = 0; first < N::kColumns; first += kColumnsAtOnce<N>) {
        float logits[N::kRows][kColumnsAtOnce<N>][4];
        N::clear(logits);
        features.multiply(logits, k, packed, kAttention, first);
        float* mean = moments + k * N::kChannels + 8 * first;
        add_moments<N>(pixels, logits, mean, mean + kCount, count, own);
      }
    }
    count += own;
  }
  if (lane_of_warp() == 0) moments[2 * kCount] = static_cast<float>(count);
  store_window_sums<N>(sum, sums, p.sums + partial_of_block() * N::kChannels);
  store_moments(of_warps[0], kWarps, kCount, p.moments);
  const int set = set_of(s, row);
  if (arrive_last(p.counters + set, SetRows(s, set).count * s.shares)) {
    finish_set<N::kChannels>(s, set, 3, p.moments, of_warps[0], p.attention.mean, p.attention.var);
  }
}

// ---- reduce ------------------------------------------------------------------------------------

// Scale and shift of a norm's channels, zero past c; `parts` of kChannels.
template <int kChannels>
__device__ __forceinline__ void fold_norm(const CrossSpatialNorm& norm, int c, int set, int parts,
                                          float* scale, float* shift) {
  for (int i = static_cast<int>(threadIdx.x); i < parts * kChannels;
       i += static_cast<int>(blockDim.x)) {
    const int at = i / kChannels * c + i % kChannels, own = set * parts * c + at;
    const bool real = i % kChannels < c;
    scale[i] = real ? norm.weight[at] / sqrtf(norm.var[own] + norm.eps) : 0.0f;
    shift[i] = real ? norm.bias[at] - norm.mean[own] * scale[i] : 0.0f;
  }
}

// A = σ(scale·logits + shift) of a warp's pixels, column tile first + n of part k, in place.
template <class N, int kCount>
__device__ __forceinline__ void attend(float (&logits)[N::kRows][kCount][4], int k,
                                       const float* scale, const float* shift, int first) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    const float2 by = N::of_columns(scale + k * N::kChannels, first + n);
    const float2 plus = N::of_columns(shift + k * N::kChannels, first + n);
#pragma unroll
    for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logits[m][n][i] = sigmoid(
            fmaf(logits[m][n][i], i % 2 == 0 ? by.x : by.y, i % 2 == 0 ? plus.x : plus.y));
      }
    }
  }
}

// R = Wr∗(A ⊙ f) of a warp's pixels.
template <class N>
__device__ __forceinline__ void reduce_features(typename N::Result& reduced,
                                                const Parts<N>& features, const float* scale,
                                                const float* shift,
                                                const typename N::Packed& packed) {
  constexpr int kCount = kColumnsAtOnce<N>;
  N::clear(reduced);
#pragma unroll 1
  for (int k = 0; k < 3; ++k) {
#pragma unroll 1
    for (int first = 0; first < N::kColumns; first += kCount) {
      float attention[N::kRows][kCount][4];
      N::clear(attention);
      features.multiply(attention, k, packed, kAttention, first);
      attend<N>(attention, k, scale, shift, first);
#pragma unroll
      for (int own = 0; own < kCount / N::kChain; ++own) {
        typename N::A a[N::kRows];
        const int step = first / N::kChain + own;
#pragma unroll
        for (int m = 0; m < N::kRows; ++m) {
          auto weighted = features.values(k, m, step);
#pragma unroll
          for (int t = 0; t < N::kChain; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) weighted.d[t][i] *= attention[m][own * N::kChain + t][i];
          }
          N::F::chain(a[m], weighted.d);
        }
        N::multiply(reduced, a, packed, kReduce + k, step);
      }
    }
  }
}

// Grid (2·slabs, shares).
template <class N>
__global__ void __launch_bounds__(kTileThreads<N>, 1) reduce_kernel(CrossSpatialTrainingParams p) {
  using T = typename N::T;
  constexpr int kCount = N::kChannels, kWarps = kTileThreads<N> / kWarp;
  CIEMA_SHARED(float, of_warps, [kWarps][moments_size(kCount)]);
  CIEMA_SHARED(float, affine, [2][3 * N::kChannels]);
  const CrossSpatialSizes& s = p.sizes;
  const int row = static_cast<int>(blockIdx.x), set = set_of(s, row);
  const int64_t size = static_cast<int64_t>(s.height) * s.width * N::kChannels;
  const T* features_of_row = static_cast<const T*>(p.features) + 3 * row * size;
  T* out = static_cast<T*>(p.reduced) + row * size;
  const typename N::Packed packed(p.packed);
  fold_norm<N::kChannels>(p.attention, s.channels, set, 3, affine[0], affine[1]);
  float* moments = of_warps[warp_of_block()];
  for (int i = lane_of_warp(); i < moments_size(kCount); i += kWarp) moments[i] = 0.0f;
  __syncthreads();
  int count = 0;
  for (int t = static_cast<int>(blockIdx.y); t < tiles_of_map(s); t += s.shares) {
    const Tile tile = tile_at(s, t);
    const Pixels<N> pixels(s, tile);
    const Parts<N> features{features_of_row, pixels};
    typename N::Result reduced;
    reduce_features<N>(reduced, features, affine[0], affine[1], packed);
    store_result<N>(out, pixels, reduced);
    const int own = pixels_of_warp<N>(s, tile);
    add_moments<N>(pixels, reduced, moments, moments + kCount, count, own);
    count += own;
  }
  if (lane_of_warp() == 0) moments[2 * kCount] = static_cast<float>(count);
  __syncthreads();
  store_moments(of_warps[0], kWarps, kCount, p.reduced_moments);
  if (arrive_last(p.counters + (s.per_group ? 2 * s.groups : 1) + set,
                  SetRows(s, set).count * s.shares)) {
    finish_set<N::kChannels>(s, set, 1, p.reduced_moments, of_warps[0], p.reduce.mean,
                             p.reduce.var);
  }
}

}  // namespace cross_spatial
}  // namespace ciema
