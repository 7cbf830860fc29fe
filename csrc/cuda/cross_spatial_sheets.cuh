// Maps of cross_spatial's training as its kernels see them: tiles of 8×16 pixels of sheets in
// scratch, and one warp's results in them.
//
// A sheet is (rows, H·W, parts, kChannels) in the products' dtype, zero past c; a row is a branch
// of a slab: branch·slabs + slab. A block of kThreads walks the tiles of one row that are its
// share: share, share + shares, … Row y of a tile belongs to warp y / kRows, and a lane's pixels
// lie in columns lane/4 and lane/4 + 8, as in the fragments.
#pragma once

#include "cross_spatial_tiles.cuh"

namespace ciema {

struct CrossSpatialSizes {
  int slabs, groups, channels, height, width;  // channels: of a group
  int shares;                                  // blocks to a row
  bool per_group;  // statistics by (branch, group), else one set of all
};

namespace cross_spatial {

constexpr int kTileHeight = 8, kTileWidth = 16, kTilePixels = kTileHeight * kTileWidth;

template <class N>
constexpr int kTileThreads = kTilePixels / N::kPixels * kWarp;

// Blocks of a multiprocessor for __launch_bounds__; 0: none, the compiler finds a better number.
template <class N>
constexpr int kBlocks = N::kRoomy ? 0 : 1;
// Column tiles of logits in registers at once.
template <class N>
constexpr int kColumnsAtOnce =
    sizeof(typename N::T) == 4 && N::kChannels == 64 ? N::kColumns / 4 : N::kColumns;

// Elements of a tile with a halo in shared memory.
template <class N>
__host__ __device__ constexpr int window_size(int halo) {
  return (kTileHeight + 2 * halo) * (kTileWidth + 2 * halo) * N::kPitch;
}

struct Tile {
  int top, left;
};

__device__ __forceinline__ int tiles_of_map(const CrossSpatialSizes& s) {
  return (s.height + kTileHeight - 1) / kTileHeight * ((s.width + kTileWidth - 1) / kTileWidth);
}
__device__ __forceinline__ Tile tile_at(const CrossSpatialSizes& s, int index) {
  const int across = (s.width + kTileWidth - 1) / kTileWidth;
  return {index / across * kTileHeight, index % across * kTileWidth};
}

// Row of the partial results of a (row, share).
__device__ __forceinline__ int64_t partial_of_block() {
  return static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
}
// Which set of statistics a row belongs to: branches alternate, as published.
__device__ __forceinline__ int set_of(const CrossSpatialSizes& s, int row) {
  return s.per_group ? 2 * (row % s.slabs % s.groups) + row / s.slabs : 0;
}

// The rows of a set, in order.
struct SetRows {
  int first, step, count;

  __device__ __forceinline__ SetRows(const CrossSpatialSizes& s, int set) {
    first = s.per_group ? set % 2 * s.slabs + set / 2 : 0;
    step = s.per_group ? s.groups : 1;
    count = s.per_group ? s.slabs / s.groups : 2 * s.slabs;
  }
};

// ---- loads and stores of tiles -----------------------------------------------------------------

// A tile with its halo to shared memory, zero around the map. Waits for this thread's copies; the
// block needs a barrier. `parts`: of a pixel of the sheet, of which one is taken.
template <class N, int kHalo>
__device__ void load_window(const CrossSpatialSizes& s, const Tile& tile,
                            const typename N::T* sheet, typename N::T* window, int parts = 1) {
  constexpr int kColumns = kTileWidth + 2 * kHalo, kRows = kTileHeight + 2 * kHalo;
  constexpr int kElements = Vector<typename N::T>::kElements;
  constexpr int kPacks = N::kChannels / kElements;
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < kRows * kColumns * kPacks;
       item += static_cast<int>(blockDim.x)) {
    const int pack = item % kPacks, pixel = item / kPacks;
    const int row = tile.top - kHalo + pixel / kColumns;
    const int column = tile.left - kHalo + pixel % kColumns;
    const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
    const int64_t at = inside ? row * s.width + column : 0;
    ptx::copy_async(window + pixel * N::kPitch + pack * kElements,
                    sheet + at * parts * N::kChannels + pack * kElements, inside);
  }
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
}

// The addresses of this lane's pixels in a window: first taps of a kernel of radius kRadius.
template <class N, int kHalo, int kRadius>
__device__ __forceinline__ void window_addresses(const typename N::T* window,
                                                 typename N::Addresses& first) {
  constexpr int kColumns = kTileWidth + 2 * kHalo, kMargin = kHalo - kRadius;
#pragma unroll
  for (int m = 0; m < N::kRows; ++m) {
    const int row = warp_of_block() * N::kRows + m + kMargin;
    first[m] = window + (row * kColumns + lane_of_warp() % 16 + kMargin) * N::kPitch;
  }
}
template <class N, int kHalo>
constexpr int kWindowPitch = (kTileWidth + 2 * kHalo) * N::kPitch;

// A lane's pixels of a tile: their positions in the map, −1 outside.
template <class N>
struct Pixels {
  int at[N::kRows][2];

  __device__ __forceinline__ Pixels(const CrossSpatialSizes& s, const Tile& tile) {
#pragma unroll
    for (int m = 0; m < N::kRows; ++m) {
      const int row = tile.top + warp_of_block() * N::kRows + m;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = tile.left + lane_of_warp() / 4 + 8 * half;
        at[m][half] = row < s.height && column < s.width ? row * s.width + column : -1;
      }
    }
  }
};

// Pixels of a warp in the map, the same for all its lanes.
template <class N>
__device__ __forceinline__ int pixels_of_warp(const CrossSpatialSizes& s, const Tile& tile) {
  const int rows = min(max(s.height - tile.top - warp_of_block() * N::kRows, 0), N::kRows);
  return rows * min(s.width - tile.left, kTileWidth);
}

template <class T>
__device__ __forceinline__ float2 load_two(const T* address) {
  T pair[2];
  if constexpr (sizeof(T) == 2) {
    const auto bits = *reinterpret_cast<const uint32_t*>(address);
    memcpy(pair, &bits, sizeof(bits));
    return {to_float(pair[0]), to_float(pair[1])};
  } else {
    return *reinterpret_cast<const float2*>(address);
  }
}

template <class T>
__device__ __forceinline__ void store_two(T* address, float low, float high) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(address) = pair_bits(low, high, T{});
  } else {
    *reinterpret_cast<float2*>(address) = {low, high};
  }
}

// The lane's two channels of column tile n of a pixel.
template <class N, class T>
__device__ __forceinline__ T* two_of(T* sheet, int pixel, int part, int parts, int n) {
  return sheet + (static_cast<int64_t>(pixel) * parts + part) * N::kChannels + 8 * n +
         lane_of_warp() % 4 * 2;
}

template <class N>
__device__ __forceinline__ void store_result(typename N::T* sheet, const Pixels<N>& pixels,
                                             const typename N::Result& result, int part = 0,
                                             int parts = 1) {
#pragma unroll
  for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (pixels.at[m][half] < 0) continue;
#pragma unroll
      for (int n = 0; n < N::kColumns; ++n) {
        store_two(two_of<N>(sheet, pixels.at[m][half], part, parts, n), result[m][n][2 * half],
                  result[m][n][2 * half + 1]);
      }
    }
  }
}

// Zero outside the map.
template <class N>
__device__ __forceinline__ void load_result(const typename N::T* sheet, const Pixels<N>& pixels,
                                            typename N::Result& result, int part = 0,
                                            int parts = 1) {
#pragma unroll
  for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < N::kColumns; ++n) {
        float2 two = {0.0f, 0.0f};
        if (pixels.at[m][half] >= 0) {
          two = load_two(two_of<N>(sheet, pixels.at[m][half], part, parts, n));
        }
        result[m][n][2 * half] = two.x;
        result[m][n][2 * half + 1] = two.y;
      }
    }
  }
}

// Three parts of a warp's pixels as a sheet has them, zero outside the map: operands of products
// over the parts, and their values. They are read for every use, from the first-level cache: held,
// they would fill the registers that a second block needs to hide such loads.
template <class N>
struct Parts {
  using Values = typename N::Values;

  const typename N::T* sheet;
  const Pixels<N>& pixels;

  __device__ __forceinline__ Values values(int part, int m, int step) const {
    Values out;
#pragma unroll
    for (int t = 0; t < N::kChain; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 two = {0.0f, 0.0f};
        if (pixels.at[m][half] >= 0) {
          two = load_two(two_of<N>(sheet, pixels.at[m][half], part, 3, step * N::kChain + t));
        }
        out.d[t][2 * half] = two.x;
        out.d[t][2 * half + 1] = two.y;
      }
    }
    return out;
  }

  __device__ __forceinline__ void operand(typename N::A& a, int part, int m, int step) const {
    if constexpr (sizeof(typename N::T) == 2) {  // as chain would pack them
#pragma unroll
      for (int t = 0; t < N::kChain; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pixel = pixels.at[m][half];
          a.bits[2 * t + half] =
              pixel >= 0 ? *reinterpret_cast<const uint32_t*>(
                               two_of<N>(sheet, pixel, part, 3, step * N::kChain + t))
                         : 0u;
        }
      }
    } else {
      N::F::chain(a, values(part, m, step).d);
    }
  }

  // result += row k of a 3c×3c weight, whose tiles begin at `tile`, times the parts; column tiles
  // first….
  template <int kCount>
  __device__ __forceinline__ void multiply(float (&result)[N::kRows][kCount][4], int k,
                                           const typename N::Packed& packed, int tile,
                                           int first) const {
#pragma unroll 1
    for (int part = 0; part < 3; ++part) {
#pragma unroll(sizeof(typename N::T) == 2 ? N::kSteps : 1)
      for (int step = 0; step < N::kSteps; ++step) {
        typename N::A a[N::kRows];
#pragma unroll
        for (int m = 0; m < N::kRows; ++m) operand(a[m], part, m, step);
        N::multiply(result, a, packed, tile + 3 * k + part, step, first);
      }
    }
  }
};

// Operands of the depth step `step` from results.
template <class N>
__device__ __forceinline__ void operands(typename N::A (&a)[N::kRows],
                                         const typename N::Result& result, int step) {
#pragma unroll
  for (int m = 0; m < N::kRows; ++m) {
    float d[N::kChain][4];
#pragma unroll
    for (int t = 0; t < N::kChain; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[t][i] = result[m][step * N::kChain + t][i];
    }
    N::F::chain(a[m], d);
  }
}

}  // namespace cross_spatial
}  // namespace ciema
