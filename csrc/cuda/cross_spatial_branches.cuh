// cross_spatial's branches in shared memory (spec.md 2.3): a tile of a slab's pixels with its halo,
//
//   x1 = (e·αw·αh − mean)·rstd·γ + β     x2 = K3∗e + b3
//
// as [pixel][channel] (cross_spatial_tiles.cuh), zero around the map and in the channels past c. The
// tile of e has a halo of 3; x2 has one of 2; then x1 takes e's place.
//
// Reads       e with 16-byte accesses where its packs are aligned: channels_last by asynchronous
//             copies, rows by packs of pixels that are turned in registers; else by elements.
// Banks       no conflicts in the loads of pixels for the products (row_pitch), nor where e is stored.
// Accuracy    x1 float32, x2 as Network says; both round to T once.
#pragma once

#include "cross_spatial_tiles.cuh"

// Bugs for the tests; none in a build. 4: copies of e not waited for.
#ifndef PLANT
#define PLANT 0
#endif

namespace ciema {

struct CrossSpatialParams {
  const void* e;
  const float *alpha_h, *alpha_w;  // (slabs, c, H), (slabs, c, W)
  const float *mean, *rstd;        // (slabs, c)
  const void* packed;
  const float* vectors;
  void* y;         // (slabs, 2, H·W, kChannels), a pixel's channels in the order of a Result
  float* partial;  // (slabs, bands, 2, kChannels)
  int* counters;   // (slabs,), zero
  void* w;
  float *softmax1, *softmax2;  // (slabs, c), or null
  int64_t stride_b, stride_c, stride_s;
  int groups, channels, height, width;  // channels: of a group
  int rows, columns;                    // of a tile
  int e_pitch, x_pitch;                 // from row to row of a tile, in elements
  int bands, tiles_of_band;
  bool channels_last, vectors_fit;      // whether 16-byte accesses of e are aligned
};

namespace cross_spatial {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kHaloE = 3, kHaloX = 2;

// Elements from row to row for `columns` pixels and a halo: a run of pixels that wraps to the next
// row goes on in the bank in which the row ended.
constexpr int row_pitch(int columns, int halo, int pitch, int element_bytes) {
  const int bytes = 2 * halo * pitch * element_bytes;
  return columns * pitch + (bytes + 127) / 128 * 128 / element_bytes;
}

// threadIdx.x, which the compiler must take for another in every phase: it would keep what depends
// on it in registers over the products, and these would spill.
__device__ __forceinline__ int thread_of_phase() {
  int thread = static_cast<int>(threadIdx.x);
  ptx::hide(thread);
  return thread;
}

__host__ __device__ constexpr int parts(int total, int size) { return (total + size - 1) / size; }

// Part of the map, or more than it.
struct Window {
  int top, left, rows, columns;
};

// A tile's place in the map, cut at the map's end.
struct TilePlace : Window {
  __device__ __forceinline__ TilePlace(const CrossSpatialParams& p, int tile) {
    const int across = parts(p.width, p.columns);
    top = tile / across * p.rows;
    left = tile % across * p.columns;
    rows = min(p.rows, p.height - top);
    columns = min(p.columns, p.width - left);
  }
  __device__ __forceinline__ Window with_halo() const {
    return {top - kHaloE, left - kHaloE, rows + 2 * kHaloE, columns + 2 * kHaloE};
  }
};

// ---- e to shared memory --------------------------------------------------------------------

// A slab of e, and whether its 16-byte accesses are aligned.
template <class T>
__device__ __forceinline__ const T* slab_of_e(const CrossSpatialParams& p, int64_t slab) {
  return static_cast<const T*>(p.e) + slab / p.groups * p.stride_b +
         slab % p.groups * p.channels * p.stride_c;
}

// Asynchronous copies of channel packs; to be waited for.
template <class N>
__device__ __forceinline__ void copy_pixels(const CrossSpatialParams& p, const Window& window,
                                            const typename N::T* e, typename N::T* e_tile) {
  constexpr int kElements = Vector<typename N::T>::kElements;
  constexpr int kPacks = N::kChannels / kElements;
  const int items = window.rows * window.columns * kPacks;
  for (int item = thread_of_phase(); item < items; item += kThreads) {
    const int pack = item % kPacks, pixel = item / kPacks;
    const int i = pixel / window.columns, j = pixel % window.columns;
    const int row = window.top + i, column = window.left + j;
    const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width &&
                        pack * kElements < p.channels;
    const int64_t at = inside ? (row * p.width + column) * p.stride_s + pack * kElements : 0;
    ptx::copy_async(e_tile + i * p.e_pitch + j * N::kPitch + pack * kElements, e + at, inside);
  }
  ptx::copy_async_commit();
}

// Any layout and alignment, of the window's columns first…end − 1.
template <class N>
__device__ __forceinline__ void load_elements(const CrossSpatialParams& p, const Window& window,
                                              const typename N::T* e, typename N::T* e_tile,
                                              int first, int end) {
  using T = typename N::T;
  constexpr int kElements = Vector<T>::kElements;
  const int columns = end - first, pixels = window.rows * columns;
  for (int item = thread_of_phase(); item < pixels * (N::kChannels / kElements);
       item += kThreads) {
    const int pixel = item % pixels, channel = item / pixels * kElements;
    const int i = pixel / columns, j = first + pixel % columns;
    const int row = window.top + i, column = window.left + j;
    const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
    const int64_t at = (row * p.width + column) * p.stride_s + channel * p.stride_c;
    Vector<T> pack;
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      pack.element[k] = inside && channel + k < p.channels ? e[at + k * p.stride_c]
                                                           : from_float<T>(0.0f);
    }
    store_vector(e_tile + i * p.e_pitch + j * N::kPitch + channel, pack);
  }
}

// One word of a pixel, one or two channels, from the same element of their packs.
template <class T, int kOfWord>
__device__ __forceinline__ uint32_t word_of(const Vector<T> (&packs)[kOfWord], int element) {
  T values[kOfWord];
#pragma unroll
  for (int k = 0; k < kOfWord; ++k) values[k] = packs[k].element[element];
  uint32_t word;
  memcpy(&word, values, sizeof(word));
  return word;
}

// Packs of pixels of "rows", turned to packs of channels: a lane takes one pack of two channels in
// 16 bits, of one in float32, and stores a pixel's word at a time. Lanes with other packs of pixels
// would meet in the same banks; in 16 bits they take the pixels in another order.
template <class N>
__device__ __forceinline__ void load_rows(const CrossSpatialParams& p, const Window& window,
                                          const typename N::T* e, typename N::T* e_tile) {
  using T = typename N::T;
  constexpr int kElements = Vector<T>::kElements, kOfWord = 4 / static_cast<int>(sizeof(T));
  constexpr int kLanes = kOfWord == 1 ? 16 : (N::kChannels < 64 ? N::kChannels / 2 : 32);
  constexpr int kTurn = kOfWord == 1 ? kElements : kElements * kLanes / kWarp;
  const int first = max(window.left, 0) / kElements;
  const int end = min(parts(window.left + window.columns, kElements), p.width / kElements);
  const int packs = end - first, items = window.rows * packs;
  const int thread = thread_of_phase(), lane = thread % kWarp;
  const int turn = lane / kLanes * kTurn % kElements;
#pragma unroll 1
  for (int channel = lane % kLanes * kOfWord; channel < N::kChannels; channel += kLanes * kOfWord) {
#pragma unroll 1
    for (int item = thread / kLanes; item < items;
         item += kThreads / kLanes) {
      const int i = item / packs, row = window.top + i, column = (first + item % packs) * kElements;
      Vector<T> loaded[kOfWord] = {};
#pragma unroll
      for (int k = 0; k < kOfWord; ++k) {
        if (row < 0 || row >= p.height || channel + k >= p.channels) continue;
        loaded[k] = load_vector<Vector<T>>(e + (channel + k) * p.stride_c + row * p.width + column);
      }
      uint32_t word[kElements];
#pragma unroll
      for (int x = 0; x < kElements; ++x) word[x] = word_of(loaded, x);
#pragma unroll
      for (int distance = kElements / 2; distance >= kTurn; distance /= 2) {
#pragma unroll
        for (int x = 0; x < kElements; ++x) {
          if ((x & distance) != 0 || (turn & distance) == 0) continue;
          const uint32_t other = word[x];
          word[x] = word[x + distance];
          word[x + distance] = other;
        }
      }
#pragma unroll
      for (int x = 0; x < kElements; ++x) {
        const int j = column + (x ^ turn) - window.left;
        if (j < 0 || j >= window.columns) continue;
        memcpy(e_tile + i * p.e_pitch + j * N::kPitch + channel, &word[x], sizeof(uint32_t));
      }
    }
  }
}

// A window of e, zero around the map and in the channels past c; readable after a barrier.
template <class N>
__device__ __forceinline__ void load_window(const CrossSpatialParams& p, const Window& window,
                                            const typename N::T* e, typename N::T* e_tile) {
  if (p.vectors_fit && p.channels_last) {
    copy_pixels<N>(p, window, e, e_tile);
    if (PLANT != 4) ptx::copy_async_wait<0>();
    return;
  }
  int ends[2] = {window.columns, window.columns};  // where columns inside the map begin and end
  if (p.vectors_fit) {
    ends[0] = max(-window.left, 0);
    ends[1] = min(p.width - window.left, window.columns);
    load_rows<N>(p, window, e, e_tile);
  }
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    load_elements<N>(p, window, e, e_tile, side == 0 ? 0 : ends[1],
                     side == 0 ? ends[0] : window.columns);
  }
}

// ---- the branches --------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void store_pair(T* address, float low, float high) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t bits = pair_bits(low, high, T{});
    memcpy(address, &bits, sizeof(bits));
  } else {
    address[0] = low;
    address[1] = high;
  }
}

// x2 with a halo of 2, zero around the map. Pieces of pixels cover rows of a multiple of 8, so that
// no 8 pixels that are loaded together lie in two rows.
template <class N>
__device__ __forceinline__ void convolve_branch(const CrossSpatialParams& p, const TilePlace& tile,
                                                const typename N::T* e_tile,
                                                typename N::T* x_tile) {
  const int columns = tile.columns + 2 * kHaloX, rows = tile.rows + 2 * kHaloX;
  const int padded = (columns + 7) / 8 * 8;
  const int thread = thread_of_phase(), lane = thread % kWarp;
  const typename N::Packed packed(p.packed);
  const float* bias = p.vectors + kConv3x3Bias * N::kChannels;
  for (int piece = thread / kWarp; piece * N::kPixels < rows * padded; piece += kWarps) {
    typename N::Addresses first;
    int place[N::kRows];  // 2·offset in x_tile + whether it is in the map; −1: none
#pragma unroll
    for (int m = 0; m < N::kRows; ++m) {
      const int pixel = piece * N::kPixels + 16 * m + lane % 16;
      const int i = min(pixel / padded, rows - 1), j = min(pixel % padded, columns - 1);
      const int row = tile.top - kHaloX + i, column = tile.left - kHaloX + j;
      const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
      first[m] = e_tile + i * p.e_pitch + j * N::kPitch;
      const bool own = pixel < rows * padded && pixel % padded < columns;
      place[m] = own ? 2 * (i * p.x_pitch + j * N::kPitch) + (inside ? 1 : 0) : -1;
    }
    typename N::Result x;
    N::clear(x);
    N::convolve3x3(x, first, p.e_pitch, packed, kConv3x3);
#pragma unroll
    for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = __shfl_sync(kFullMask, place[m], lane / 4 + 8 * half);
        if (at < 0) continue;
        typename N::T* own = x_tile + at / 2 + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < N::kColumns; ++n) {
          const float2 plus = N::of_columns(bias, n);
          const float low = x[m][n][2 * half] + plus.x, high = x[m][n][2 * half + 1] + plus.y;
          store_pair(own + 8 * n, at % 2 != 0 ? low : 0.0f, at % 2 != 0 ? high : 0.0f);
        }
      }
    }
  }
}

// x1 in the place of e, with a halo of 2; around the map e's zeros stay. A thread walks a column.
template <class N>
__device__ __forceinline__ void normalise_branch(const CrossSpatialParams& p, const TilePlace& tile,
                                                 int64_t slab, typename N::T* e_tile) {
  using T = typename N::T;
  constexpr int kElements = Vector<T>::kElements;
  const int left = max(tile.left - kHaloX, 0);
  const int right = min(tile.left + tile.columns + kHaloX, p.width);
  const int top = max(tile.top - kHaloX, 0), bottom = min(tile.top + tile.rows + kHaloX, p.height);
  const int64_t first = slab * p.channels;
  const int items = (right - left) * (N::kChannels / kElements);
  for (int item = thread_of_phase(); item < items; item += kThreads) {
    const int column = left + item % (right - left), channel = item / (right - left) * kElements;
    const float* gate_h = p.alpha_h + (first + channel) * p.height;
    float gate_w[kElements], mean[kElements], scale[kElements], shift[kElements];
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      const int64_t at = first + channel + k;
      const bool real = channel + k < p.channels;
      gate_w[k] = real ? p.alpha_w[at * p.width + column] : 0.0f;
      mean[k] = real ? p.mean[at] : 0.0f;
      scale[k] = real ? p.rstd[at] * p.vectors[kNormWeight * N::kChannels + channel + k] : 0.0f;
      shift[k] = p.vectors[kNormBias * N::kChannels + channel + k];
    }
    T* x = e_tile + (top - tile.top + kHaloE) * p.e_pitch +
           (column - tile.left + kHaloE) * N::kPitch + channel;
    for (int row = top; row < bottom; ++row, x += p.e_pitch) {
      auto pack = load_vector<Vector<T>>(x);
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        if (channel + k >= p.channels) continue;
        // The order of coordinate attention's moments: where the variance vanishes, u is the mean.
        const float u = rounded_product(rounded_product(to_float(pack.element[k]), gate_w[k]),
                                        gate_h[k * p.height + row]);
        pack.element[k] = from_float<T>((u - mean[k]) * scale[k] + shift[k]);
      }
      store_vector(x, pack);
    }
  }
}

}  // namespace cross_spatial
}  // namespace ciema
