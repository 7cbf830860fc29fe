// A slab (one sample's group, c channels of H×W) and its tables as one block of coordinate
// attention sees them, and sums of any terms of it along rows and columns.
//
// Layouts     rows: a pack is kVector neighbouring columns of a channel; channels_last: kVector
//             neighbouring channels of a pixel. Tables of H + W positions (columns 0…W−1, then
//             rows) lie the same way, so that a pack's values are neighbours too:
//             [channel][position] or [position][channel], with a pitch ≡ 4 (mod 8).
// Reads       a sum reads the slab once, in 16-byte loads where packs are aligned.
// Accuracy    float32; a thread's packs in order, then a fixed tree over lanes. No atomics.
#pragma once

#include <type_traits>

#include "../common/device.cuh"

namespace ciema::coordinate {

constexpr int kInFlight = 4;  // packs that a thread has under way

__host__ __device__ constexpr int round_up(int value, int step) {
  return (value + step - 1) / step * step;
}
// Elements from one row of a table to the next: 16-byte packs, and rows 4 banks apart (mod 8).
__host__ __device__ constexpr int table_pitch(int length) { return round_up(length + 4, 8) - 4; }
__host__ __device__ constexpr int table_size(bool channels_last, int c, int positions) {
  return channels_last ? positions * table_pitch(c) : c * table_pitch(positions);
}
// The staged c×c weight, [input][output].
__host__ __device__ constexpr int kernel_size(int c) { return c * table_pitch(c); }

__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warps_of_block() { return static_cast<int>(blockDim.x) / kWarp; }

// Lanes that share `count` things: a power of two, at most a warp.
__device__ __forceinline__ int lanes_for(int count) {
  int lanes = 1;
  while (lanes < count && lanes < kWarp) lanes *= 2;
  return lanes;
}

// kVector neighbouring floats, 16-byte aligned if there is more than one.
template <int kVector>
__device__ __forceinline__ void load_floats(const float* address, float (&value)[kVector]) {
  if constexpr (kVector == 1) {
    value[0] = *address;
  } else {
#pragma unroll
    for (int quad = 0; quad < kVector / 4; ++quad) {
      const auto loaded = load_vector<Vector<float>>(address + 4 * quad);
#pragma unroll
      for (int e = 0; e < 4; ++e) value[4 * quad + e] = loaded.element[e];
    }
  }
}

// A slab in memory. kVector > 1 needs 16-byte aligned packs.
template <class T, bool kLast, int kElements>
struct Slab {
  static constexpr bool kChannelsLast = kLast;
  static constexpr int kVector = kElements;
  static constexpr int kChannels = kLast ? kElements : 1;  // of a pack
  static constexpr int kColumns = kLast ? 1 : kElements;

  T* data;
  int channels, height, width;
  int64_t stride;  // from channel to channel, or (channels_last) from pixel to pixel

  __device__ __forceinline__ int channel_packs() const { return channels / kChannels; }
  __device__ __forceinline__ int column_packs() const { return width / kColumns; }
  // First element of the pack of channels channel… and columns column… in a row.
  __device__ __forceinline__ T* pack(int channel, int row, int column) const {
    const int pixel = row * width + column;
    return kLast ? data + pixel * stride + channel : data + channel * stride + pixel;
  }
  __device__ __forceinline__ void load(int channel, int row, int column,
                                       float (&x)[kVector]) const {
    if constexpr (kVector == 1) {
      x[0] = to_float(*pack(channel, row, column));
    } else {
      const auto loaded = load_vector<Vector<std::remove_const_t<T>>>(pack(channel, row, column));
#pragma unroll
      for (int e = 0; e < kVector; ++e) x[e] = to_float(loaded.element[e]);
    }
  }
};

// Floats by (channel, position) in the order of a slab's layout.
template <bool kChannelsLast>
struct Table {
  float* data;
  int pitch;

  __device__ __forceinline__ float* at(int channel, int position) const {
    return kChannelsLast ? data + position * pitch + channel : data + channel * pitch + position;
  }
  // Of a pack, the values for its columns, and those for its row.
  template <class S>
  __device__ __forceinline__ void of_columns(const S&, int channel, int column,
                                             float (&value)[S::kVector]) const {
    load_floats<S::kVector>(at(channel, column), value);
  }
  template <class S>
  __device__ __forceinline__ void of_row(const S& slab, int channel, int row,
                                         float (&value)[S::kVector]) const {
    if constexpr (kChannelsLast) {
      load_floats<S::kVector>(at(channel, slab.width + row), value);
    } else {
      const float one = *at(channel, slab.width + row);
#pragma unroll
      for (int e = 0; e < S::kVector; ++e) value[e] = one;
    }
  }
};

template <class S>
__device__ __forceinline__ Table<S::kChannelsLast> table_of(const S& slab, float* data) {
  const int positions = slab.height + slab.width;
  return {data, table_pitch(S::kChannelsLast ? slab.channels : positions)};
}

// ---- sums along rows and columns ---------------------------------------------------------------
// term(x, channel, row, column, terms) sets terms[kSums][kVector] for a pack of values x.

// store(channel, row, sums[kSums]) is called once for every channel and row.
template <int kSums, class S, class Term, class Store>
__device__ void sum_along_rows_of_planes(const S& slab, Term term, Store store) {
  const int lanes = lanes_for(slab.column_packs()), lane = lane_of_warp() % lanes;
  const int items = slab.channels * slab.height, step = warps_of_block() * (kWarp / lanes);
  int item = static_cast<int>(threadIdx.x) / lanes;
#pragma unroll 1
  for (int first = 0; first < items; first += step * kInFlight, item += step * kInFlight) {
    float sums[kInFlight][kSums] = {};
#pragma unroll 1
    for (int pack = lane; pack < slab.column_packs(); pack += lanes) {
      const int column = pack * S::kColumns;
      float x[kInFlight][S::kVector];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int at = item + u * step;
        if (at < items) slab.load(at / slab.height, at % slab.height, column, x[u]);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int at = item + u * step;
        if (at >= items) continue;
        float terms[kSums][S::kVector];
        term(x[u], at / slab.height, at % slab.height, column, terms);
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
#pragma unroll
          for (int e = 0; e < S::kVector; ++e) sums[u][s] += terms[s][e];
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      for (int distance = lanes / 2; distance >= 1; distance /= 2) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
          sums[u][s] += __shfl_xor_sync(kFullMask, sums[u][s], distance);
        }
      }
      const int at = item + u * step;
      if (lane == 0 && at < items) store(at / slab.height, at % slab.height, sums[u]);
    }
  }
}

template <int kSums, class S, class Term, class Store>
__device__ void sum_along_rows_of_pixels(const S& slab, Term term, Store store) {
  const int lanes = lanes_for(slab.channel_packs()), lane = lane_of_warp() % lanes;
  const int chunks = (slab.channel_packs() + lanes - 1) / lanes;
#pragma unroll 1
  for (int item = warp_of_block(); item < slab.height * chunks; item += warps_of_block()) {
    const int row = item % slab.height;
    const int channel = (item / slab.height * lanes + lane) * S::kChannels;
    float sums[kSums][S::kVector] = {};
    if (channel < slab.channels) {
#pragma unroll 4
      for (int column = lane_of_warp() / lanes; column < slab.width; column += kWarp / lanes) {
        float x[S::kVector], terms[kSums][S::kVector];
        slab.load(channel, row, column, x);
        term(x, channel, row, column, terms);
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
#pragma unroll
          for (int e = 0; e < S::kVector; ++e) sums[s][e] += terms[s][e];
        }
      }
    }
    for (int distance = lanes; distance < kWarp; distance *= 2) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
#pragma unroll
        for (int e = 0; e < S::kVector; ++e) {
          sums[s][e] += __shfl_xor_sync(kFullMask, sums[s][e], distance);
        }
      }
    }
    if (lane_of_warp() >= lanes || channel >= slab.channels) continue;
#pragma unroll
    for (int e = 0; e < S::kVector; ++e) {
      float of_channel[kSums];
#pragma unroll
      for (int s = 0; s < kSums; ++s) of_channel[s] = sums[s][e];
      store(channel + e, row, of_channel);
    }
  }
}

template <int kSums, class S, class Term, class Store>
__device__ __forceinline__ void sum_along_rows(const S& slab, Term term, Store store) {
  if constexpr (S::kChannelsLast) {
    sum_along_rows_of_pixels<kSums>(slab, term, store);
  } else {
    sum_along_rows_of_planes<kSums>(slab, term, store);
  }
}

// store(channel, column, sums[kSums]) is called once for every channel and column.
template <int kSums, class S, class Term, class Store>
__device__ void sum_along_columns(const S& slab, Term term, Store store) {
  const int items = slab.channel_packs() * slab.column_packs();
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < items;
       item += static_cast<int>(blockDim.x)) {
    const int inner = S::kChannelsLast ? slab.channel_packs() : slab.column_packs();
    const int channel = (S::kChannelsLast ? item % inner : item / inner) * S::kChannels;
    const int column = (S::kChannelsLast ? item / inner : item % inner) * S::kColumns;
    float sums[kSums][S::kVector] = {};
#pragma unroll 4
    for (int row = 0; row < slab.height; ++row) {
      float x[S::kVector], terms[kSums][S::kVector];
      slab.load(channel, row, column, x);
      term(x, channel, row, column, terms);
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
#pragma unroll
        for (int e = 0; e < S::kVector; ++e) sums[s][e] += terms[s][e];
      }
    }
#pragma unroll
    for (int e = 0; e < S::kVector; ++e) {
      float of_element[kSums];
#pragma unroll
      for (int s = 0; s < kSums; ++s) of_element[s] = sums[s][e];
      const int own = S::kChannelsLast ? channel + e : channel;
      store(own, S::kChannelsLast ? column : column + e, of_element);
    }
  }
}

}  // namespace ciema::coordinate
