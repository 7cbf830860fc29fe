// cross_spatial in evaluation (spec.md 2.3): e and its gates → w, one launch after the packing of
// the weights (cross_spatial_pack.cuh).
//
//   x1 = (e·αw·αh − mean)·rstd·γ + β     x2 = K3∗e + b3     y = network(x1), network(x2)
//   s = softmax_c(mean y)                w = σ(Σ_c s1·y2 + Σ_c s2·y1)
//
// Layouts     e as "rows" or "channels_last"; shared memory holds it as [pixel][channel].
// Grid        slabs × bands; a block walks the tiles of its band, rows × columns pixels of the map.
//             Of a tile it holds e with a halo of 3, whose place x1 takes, and x2 with a halo of 2.
//             Its eight warps share pieces of 32 (16) pixels of x2, then of both branches' y.
//             The slab's last block to arrive draws softmax and w.
// Bytes       e once from device memory, and the tiles' halos again from the second-level cache:
//             tiles of 8×32 of a 56×56 map read
//             (8+6)(32+6)/(8·32) = 2.1 of it. y (2·c values a pixel) is written to scratch and read
//             once, both in the second-level cache (a slab's 400 KB at c = 32 in 16 bits); w.
// Registers   up to 255: one block of 8 warps a multiprocessor, two a scheduler. More warps would
//             halve the pixels of a warp, and then the loads of weights and pixels, 128 bytes a
//             cycle, would take longer than the products. Not more, so that nothing spills: what a
//             phase needs is read again from shared memory (Progress).
// Accuracy    products as Network says; x1, y's sums, softmax and w's logit float32; y rounds to T.
//             Sums of y by warp, warps, bands in fixed order: same bits every run.
// Recomputed  x2 in the halo of 2: (8+4)(32+4)/(8·32) = 1.7 of it, a fifteenth of all products.
#pragma once

#include "cross_spatial_branches.cuh"

// Bugs for the tests; none in a build. 2: no barrier between x1 and y, 3: pixels past a tile are
// stored. 4: cross_spatial_branches.cuh.
#ifndef PLANT
#define PLANT 0
#endif

namespace ciema::cross_spatial {

// Where a block is. It lies in shared memory and is read again in every phase and after the
// products: what is kept in registers over them would spill.
struct Progress {
  int slab, step;
};

// ---- y --------------------------------------------------------------------------------------

// Values of a pixel that one of its four lanes holds.
template <class N>
constexpr int kOfLane = N::kChannels / 4;

// Moves a lane's values of a pixel to or from scratch, 16 bytes at a time (8 of 4 half values).
template <class T, int kCount>
__device__ __forceinline__ void store_values(T* address, const T (&values)[kCount]) {
  if constexpr (sizeof(values) == 8) {
    uint64_t bits;
    memcpy(&bits, values, sizeof(bits));
    *reinterpret_cast<uint64_t*>(address) = bits;
  } else {
    constexpr int kElements = Vector<T>::kElements;
#pragma unroll
    for (int i = 0; i < kCount; i += kElements) {
      Vector<T> pack;
#pragma unroll
      for (int k = 0; k < kElements; ++k) pack.element[k] = values[i + k];
      store_vector(address + i, pack);
    }
  }
}
template <class T, int kCount>
__device__ __forceinline__ void load_values(const T* address, T (&values)[kCount]) {
  if constexpr (sizeof(values) == 8) {
    const uint64_t bits = *reinterpret_cast<const uint64_t*>(address);
    memcpy(values, &bits, sizeof(bits));
  } else {
    constexpr int kElements = Vector<T>::kElements;
#pragma unroll
    for (int i = 0; i < kCount; i += kElements) {
      const auto pack = load_vector<Vector<T>>(address + i);
#pragma unroll
      for (int k = 0; k < kElements; ++k) values[i + k] = pack.element[k];
    }
  }
}

// Stores a piece of y and adds its sums over pixels to `sums`; place: pixel of the map, −1: none.
template <class N>
__device__ __forceinline__ void store_piece(const typename N::Result& y, const int (&place)[N::kRows],
                                            typename N::T* out, float* sums) {
  using T = typename N::T;
  const int lane = thread_of_phase() % kWarp;
  float total[kOfLane<N>] = {};
#pragma unroll
  for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = __shfl_sync(kFullMask, place[m], lane / 4 + 8 * half);
      if (pixel < 0) continue;
      T values[kOfLane<N>];
#pragma unroll
      for (int i = 0; i < kOfLane<N>; ++i) {
        const float value = y[m][i / 2][2 * half + i % 2];
        total[i] += value;
        values[i] = from_float<T>(value);
      }
      store_values(out + static_cast<int64_t>(pixel) * N::kChannels + lane % 4 * kOfLane<N>,
                   values);
    }
  }
#pragma unroll
  for (int i = 0; i < kOfLane<N>; ++i) {
#pragma unroll
    for (int distance = 4; distance < kWarp; distance *= 2) {
      total[i] += __shfl_xor_sync(kFullMask, total[i], distance);
    }
    if (lane < 4) sums[lane * kOfLane<N> + i] += total[i];
  }
}

// y of a slab, (2, H·W, kChannels).
template <class N>
__device__ __forceinline__ typename N::T* slab_of_y(const CrossSpatialParams& p, int64_t slab,
                                                    int branch) {
  return static_cast<typename N::T*>(p.y) +
         (2 * slab + branch) * p.height * p.width * N::kChannels;
}

// A piece of a tile: kPixels pixels of one branch.
template <class N>
struct Piece {
  int branch, first, pixels;  // first: its first pixel, of `pixels` in the tile

  __device__ __forceinline__ Piece(const TilePlace& tile, int index) {
    pixels = tile.rows * tile.columns;
    const int pieces = parts(pixels, N::kPixels);
    branch = index / pieces;  // 0, 1; more: past the last
    first = (index - branch * pieces) * N::kPixels;
  }
};

// y of both branches of tile first_tile + step, to scratch. sums: (kWarps, 2, kChannels), in the
// order of y.
template <class N>
__device__ __forceinline__ void run_network(const CrossSpatialParams& p, int first_tile,
                                            const Progress* progress, float* sums) {
  CIEMA_DYNAMIC_SHARED(typename N::T, e_tile);
#pragma unroll 1
  for (int index = thread_of_phase() / kWarp;; index += kWarps) {
    typename N::Addresses first;
    int pitch;
    {
      const TilePlace tile(p, first_tile + progress->step);
      const Piece<N> piece(tile, index);
      if (piece.branch >= 2) return;
      constexpr int kInset = kHaloE - kHaloX;
      pitch = piece.branch == 0 ? p.e_pitch : p.x_pitch;
      const typename N::T* x = e_tile + (piece.branch == 0 ? kInset * (p.e_pitch + N::kPitch)
                                                           : (p.rows + 2 * kHaloE) * p.e_pitch);
#pragma unroll
      for (int m = 0; m < N::kRows; ++m) {
        const int pixel = min(piece.first + 16 * m + lane_of_warp() % 16, piece.pixels - 1);
        first[m] = x + pixel / tile.columns * pitch + pixel % tile.columns * N::kPitch;
      }
    }
    typename N::Result y;
    N::run(y, first, pitch, typename N::Packed(p.packed), p.vectors);
    __syncwarp();
    const TilePlace tile(p, first_tile + progress->step);
    const Piece<N> piece(tile, index);
    int place[N::kRows];
#pragma unroll
    for (int m = 0; m < N::kRows; ++m) {
      const int pixel = piece.first + 16 * m + thread_of_phase() % 16;
      const int last = min(pixel, piece.pixels - 1);
      const int row = tile.top + last / tile.columns, column = tile.left + last % tile.columns;
      place[m] = pixel < piece.pixels || PLANT == 3 ? row * p.width + column : -1;
    }
    store_piece<N>(y, place, slab_of_y<N>(p, progress->slab, piece.branch),
                   sums + (2 * (thread_of_phase() / kWarp) + piece.branch) * N::kChannels);
  }
}

// ---- w --------------------------------------------------------------------------------------

// The channel at position i of a pixel of y.
template <class N>
__device__ __forceinline__ int channel_of(int i) {
  const int lane = i / kOfLane<N>, of_lane = i % kOfLane<N>;
  return of_lane / 2 * 8 + 2 * lane + of_lane % 2;
}

// Softmax of the bands' sums, over the c channels; one warp a branch. In the order of y.
template <class N>
__device__ __forceinline__ void write_softmax(const CrossSpatialParams& p, int64_t slab,
                                              float* softmax) {
  constexpr int kChannels = N::kChannels, kEach = (kChannels + kWarp - 1) / kWarp;
  const int thread = thread_of_phase(), branch = thread / kWarp, lane = thread % kWarp;
  if (branch >= 2) return;
  const float pixels = static_cast<float>(static_cast<int64_t>(p.height) * p.width);
  float value[kEach], largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = lane + k * kWarp;
    value[k] = -INFINITY;
    if (i >= kChannels || channel_of<N>(i) >= p.channels) continue;
    float total = 0.0f;
    for (int band = 0; band < p.bands; ++band) {
      total += p.partial[((slab * p.bands + band) * 2 + branch) * kChannels + i];
    }
    value[k] = total / pixels;
    largest = fmaxf(largest, value[k]);
  }
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, distance));
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) {  // a NaN that fmaxf passes over reaches all through the sum
    value[k] = expf(value[k] - largest);
    sum += value[k];
  }
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    sum += __shfl_xor_sync(kFullMask, sum, distance);
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = lane + k * kWarp;
    if (i >= kChannels) continue;
    const int channel = channel_of<N>(i);
    softmax[branch * kChannels + i] = value[k] / sum;
    float* out = branch == 0 ? p.softmax1 : p.softmax2;
    if (out != nullptr && channel < p.channels) out[slab * p.channels + channel] = value[k] / sum;
  }
}

// w of a slab: four lanes a pixel, whose logits they add; then each writes one of four pixels.
template <class N>
__device__ __forceinline__ void draw_gate(const CrossSpatialParams& p, int64_t slab,
                                          const float* softmax) {
  using T = typename N::T;
  constexpr int kCount = kOfLane<N>, kUnroll = 4, kPixels = kUnroll * kWarp / 4;
  const int thread = thread_of_phase(), lane = thread % kWarp, quarter = lane % 4;
  const int pixels = p.height * p.width;
  const T* first = slab_of_y<N>(p, slab, 0) + quarter * kCount;
  const int64_t plane = static_cast<int64_t>(pixels) * N::kChannels;
  float s1[kCount], s2[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    s1[i] = softmax[quarter * kCount + i];
    s2[i] = softmax[N::kChannels + quarter * kCount + i];
  }
  for (int base = thread / kWarp * kPixels; base < pixels; base += kWarps * kPixels) {
    float own = 0.0f;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int pixel = min(base + u * (kWarp / 4) + lane / 4, pixels - 1);
      const T* at = first + static_cast<int64_t>(pixel) * N::kChannels;
      T y1[kCount], y2[kCount];
      load_values(at, y1);
      load_values(at + plane, y2);
      float logit = 0.0f;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        logit += s1[i] * to_float(y2[i]) + s2[i] * to_float(y1[i]);
      }
      logit += __shfl_xor_sync(kFullMask, logit, 1);
      logit += __shfl_xor_sync(kFullMask, logit, 2);
      if (u == quarter) own = logit;
    }
    const int pixel = base + quarter * (kWarp / 4) + lane / 4;
    if (pixel < pixels) {
      static_cast<T*>(p.w)[slab * pixels + pixel] = from_float<T>(sigmoid(own));
    }
  }
}

// ---- the kernel -----------------------------------------------------------------------------

// Sums of the block's warps, to its row of `partial`.
template <class N>
__device__ __forceinline__ void write_partial(const CrossSpatialParams& p, int64_t slab,
                                              const float* sums) {
  const int i = thread_of_phase();
  if (i >= 2 * N::kChannels) return;
  float total = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) total += sums[warp * 2 * N::kChannels + i];
  p.partial[(slab * p.bands + blockIdx.y) * 2 * N::kChannels + i] = total;
}

__device__ __forceinline__ int steps_of_block(const CrossSpatialParams& p) {
  const int first = static_cast<int>(blockIdx.y) * p.tiles_of_band;
  const int tiles = parts(p.height, p.rows) * parts(p.width, p.columns);
  return min(p.tiles_of_band, tiles - first);
}

// One step: a tile.
template <class N>
__device__ __forceinline__ void run_step(const CrossSpatialParams& p, const Progress* progress,
                                         float* sums) {
  using T = typename N::T;
  CIEMA_DYNAMIC_SHARED(T, e_tile);
  const int first = static_cast<int>(blockIdx.y) * p.tiles_of_band;
  T* x_tile = e_tile + (p.rows + 2 * kHaloE) * p.e_pitch;
  load_window<N>(p, TilePlace(p, first + progress->step).with_halo(),
                 slab_of_e<T>(p, progress->slab), e_tile);
  __syncthreads();
  convolve_branch<N>(p, TilePlace(p, first + progress->step), e_tile, x_tile);
  __syncthreads();  // all have read e
  normalise_branch<N>(p, TilePlace(p, first + progress->step), progress->slab, e_tile);
  if (PLANT != 2) __syncthreads();
  run_network<N>(p, first, progress, sums);
}

// Grid (slabs, bands).
template <class N>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(CrossSpatialParams p) {
  CIEMA_SHARED(float, sums, [kWarps * 2 * N::kChannels]);
  CIEMA_SHARED(Progress, progress, [1]);
  for (int i = static_cast<int>(threadIdx.x); i < kWarps * 2 * N::kChannels; i += kThreads) {
    sums[i] = 0.0f;
  }
  if (threadIdx.x == 0) *progress = {static_cast<int>(blockIdx.x), 0};
  __syncthreads();
#pragma unroll 1
  while (progress->step < steps_of_block(p)) {
    run_step<N>(p, progress, sums);
    __syncthreads();
    if (threadIdx.x == 0) ++progress->step;
    __syncthreads();
  }
  const int64_t slab = progress->slab;
  write_partial<N>(p, slab, sums);
  if (p.bands > 1) {
    if (!arrive_last(p.counters + slab, p.bands)) return;
  } else {
    __syncthreads();
  }
  write_softmax<N>(p, slab, sums);
  __syncthreads();
  draw_gate<N>(p, slab, sums);
}

}  // namespace ciema::cross_spatial
