// What one block does for one slab of coordinate attention (spec.md 2.2): pools, gates, moments.
// A slab is one sample's group, c channels of H×W; every function is called by all threads of a
// block, on tables of H + W positions (columns 0…W−1, then rows) that lie in shared memory or
// scratch. The kernels are in coordinate_attention_kernels.cuh; cross_spatial's may call the same.
//
//   sum_along_rows, sum_along_columns   sums of any terms of a slab over W and over H
//   apply_kernel                        M p for every position, M (c, c) in shared memory
//   write_gates                         σ(K p + b)
//   slab_moments                        mean and Σ(u − mean)² of u = e·αw·αh for every channel
//
// Layouts     rows: a pack is kVector neighbouring columns of a channel; channels_last: kVector
//             neighbouring channels of a pixel. Tables lie the same way, so that a pack's gates are
//             neighbours too: [channel][position] or [position][channel], pitch ≡ 4 (mod 8).
// Reads       each of the three passes reads the slab once; the first from device memory, the
//             others from the second-level cache, which holds it (200 KB at 32×56×56 in float16).
// Accuracy    float32; moments in registers by two passes over a few packs around their first
//             value, merged by Chan's formula, so that equal values have a variance of exactly 0.
//             Fixed-order trees, no atomics. u is rounded before its mean is subtracted: where the
//             variance vanishes u − mean must be the 0 that the large slope of rstd expects.
#pragma once

#include <type_traits>

#include "../common/device.cuh"

// Bugs for the tests; none in a build. 1, 3: a barrier left out, 2: gates past the last channel.
#ifndef PLANT
#define PLANT 0
#endif

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
  for (int first = 0; first < items; first += step * kInFlight, item += step * kInFlight) {
    float sums[kInFlight][kSums] = {};
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

// Means over H and over W of every channel, to `pooled`; readable after a barrier.
template <class S>
__device__ void pool(const S& slab, const Table<S::kChannelsLast>& pooled) {
  const auto same = [](const float(&x)[S::kVector], int, int, int,
                       float(&terms)[1][S::kVector]) {
#pragma unroll
    for (int e = 0; e < S::kVector; ++e) terms[0][e] = x[e];
  };
  const auto width = static_cast<float>(slab.width), height = static_cast<float>(slab.height);
  sum_along_rows<1>(slab, same, [&](int channel, int row, const float(&sums)[1]) {
    *pooled.at(channel, slab.width + row) = sums[0] / width;
  });
  sum_along_columns<1>(slab, same, [&](int channel, int column, const float(&sums)[1]) {
    *pooled.at(channel, column) = sums[0] / height;
  });
}

// ---- products with the c×c kernel --------------------------------------------------------------

// K (outputs, inputs) to shared memory as [input][output], or transposed, so that apply_kernel
// multiplies with Kᵀ; outputs past c are zero. Readable after a barrier.
template <class W>
__device__ void stage_kernel(const W* weight, int c, bool transposed, float* staged) {
  const int pitch = table_pitch(c), count = c * pitch;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const int output = i % pitch, input = i / pitch;
    const int at = transposed ? input * c + output : output * c + input;
    staged[i] = output < c ? to_float(weight[at]) : 0.0f;
  }
}

// store(channel, position, value) for value = K·p at every output channel and position. A thread
// takes four outputs of one position: a 16-byte load of K and one value of p for four products.
template <class S, class Store>
__device__ void apply_kernel(const S& slab, const Table<S::kChannelsLast>& p, const float* staged,
                             Store store) {
  const int c = slab.channels, positions = slab.height + slab.width, pitch = table_pitch(c);
  const int quads = (c + 3) / 4;
  for (int item = static_cast<int>(threadIdx.x); item < quads * positions;
       item += static_cast<int>(blockDim.x)) {
    const int quad = S::kChannelsLast ? item % quads : item / positions;
    const int position = S::kChannelsLast ? item / quads : item % positions;
    float sum[4] = {};
#pragma unroll 4
    for (int input = 0; input < c; ++input) {
      const auto k = load_vector<Vector<float>>(staged + input * pitch + 4 * quad);
      const float value = *p.at(input, position);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] = fmaf(k.element[e], value, sum[e]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (PLANT == 2 || 4 * quad + e < c) store(4 * quad + e, position, sum[e]);
    }
  }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// σ(K·p + b) to the table `gates`, and to alpha_h (c, H) and alpha_w (c, W) unless these are null.
template <class S>
__device__ void write_gates(const S& slab, const Table<S::kChannelsLast>& pooled,
                            const float* staged, const float* bias,
                            const Table<S::kChannelsLast>& gates, float* alpha_h, float* alpha_w) {
  apply_kernel(slab, pooled, staged, [&](int channel, int position, float logit) {
    const float gate = sigmoid(logit + bias[channel]);
    *gates.at(channel, position) = gate;
    if (alpha_h == nullptr) return;
    if (position < slab.width) {
      alpha_w[channel * slab.width + position] = gate;
    } else {
      alpha_h[channel * slab.height + position - slab.width] = gate;
    }
  });
}

// ---- moments -----------------------------------------------------------------------------------

// Mean and Σ(x − mean)² of some values, by Chan's formula.
struct Moments {
  float mean = 0.0f, m2 = 0.0f, count = 0.0f;

  __device__ __forceinline__ void merge(float other_mean, float other_m2, float other_count) {
    const float total = count + other_count;
    if (total == 0.0f) return;
    const float delta = other_mean - mean, share = other_count / total;
    mean += delta * share;
    m2 += other_m2 + delta * delta * (count * share);
    count = total;
  }
  // `count` values, `step` elements apart.
  template <int kCount>
  __device__ __forceinline__ void add(const float* values, int step) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 1; i < kCount; ++i) sum += values[i * step] - values[0];
    const float own = values[0] + sum / static_cast<float>(kCount);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float centred = values[i * step] - own;
      squares += centred * centred;
    }
    merge(own, squares, static_cast<float>(kCount));
  }
  // Of the lanes whose numbers differ in the bits [lowest, end): every lane gets the whole.
  __device__ __forceinline__ void merge_lanes(int lowest, int end) {
    for (int distance = lowest; distance < end; distance *= 2) {
      const float other_mean = __shfl_xor_sync(kFullMask, mean, distance);
      const float other_m2 = __shfl_xor_sync(kFullMask, m2, distance);
      const float other_count = __shfl_xor_sync(kFullMask, count, distance);
      merge(other_mean, other_m2, other_count);
    }
  }
};

// u = e·αw·αh of a pack, rounded.
template <class S>
__device__ __forceinline__ void gated(const S& slab, const Table<S::kChannelsLast>& gates,
                                      int channel, int row, int column, float (&x)[S::kVector]) {
  float of_columns[S::kVector], of_row[S::kVector];
  gates.of_columns(slab, channel, column, of_columns);
  gates.of_row(slab, channel, row, of_row);
#pragma unroll
  for (int e = 0; e < S::kVector; ++e) {
    x[e] = rounded_product(rounded_product(x[e], of_columns[e]), of_row[e]);
  }
}

// Moments of u over the pixels of one pack of channels, of those packs of pixels that are this
// lane's: lane, lane + step, …
template <class S, int kLanesMoments>
__device__ __forceinline__ void pack_moments(const S& slab, const Table<S::kChannelsLast>& gates,
                                             int channel, int lane, int step,
                                             Moments (&moments)[kLanesMoments]) {
  constexpr int kOfPack = S::kChannelsLast ? 1 : S::kVector;  // values of one channel
  const int packs = slab.height * slab.column_packs();
  const auto load = [&](int pack, float(&u)[S::kVector]) {
    const int row = pack / slab.column_packs();
    const int column = (pack - row * slab.column_packs()) * S::kColumns;
    slab.load(channel, row, column, u);
    gated(slab, gates, channel, row, column, u);
  };
  int pack = lane;
  for (; pack < packs - (kInFlight - 1) * step; pack += kInFlight * step) {
    float u[kInFlight][S::kVector];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) load(pack + i * step, u[i]);
#pragma unroll
    for (int e = 0; e < kLanesMoments; ++e) {
      moments[e].template add<kInFlight * kOfPack>(&u[0][e], S::kChannelsLast ? S::kVector : 1);
    }
  }
  for (; pack < packs; pack += step) {
    float u[1][S::kVector];
    load(pack, u[0]);
#pragma unroll
    for (int e = 0; e < kLanesMoments; ++e) moments[e].template add<kOfPack>(&u[0][e], 1);
  }
}

// store(channel, moments) once for every channel. `merged`: shared memory of 3·warps·c floats,
// which channels_last uses.
template <class S, class Store>
__device__ void slab_moments(const S& slab, const Table<S::kChannelsLast>& gates, float* merged,
                             Store store) {
  if constexpr (!S::kChannelsLast) {
    for (int channel = warp_of_block(); channel < slab.channels; channel += warps_of_block()) {
      Moments moments[1];
      pack_moments(slab, gates, channel, lane_of_warp(), kWarp, moments);
      moments[0].merge_lanes(1, kWarp);
      if (lane_of_warp() == 0) store(channel, moments[0]);
    }
  } else {
    const int lanes = lanes_for(slab.channel_packs()), c = slab.channels;
    float* of_warp = merged + warp_of_block() * 3 * c;
    for (int first = 0; first < slab.channel_packs(); first += lanes) {
      const int channel = (first + lane_of_warp() % lanes) * S::kChannels;
      Moments moments[S::kVector];
      if (channel < c) {
        const int lane = static_cast<int>(threadIdx.x) / lanes;
        pack_moments(slab, gates, channel, lane, static_cast<int>(blockDim.x) / lanes, moments);
      }
#pragma unroll
      for (int e = 0; e < S::kVector; ++e) {
        moments[e].merge_lanes(lanes, kWarp);
        if (lane_of_warp() >= lanes || channel >= c) continue;
        of_warp[channel + e] = moments[e].mean;
        of_warp[c + channel + e] = moments[e].m2;
        of_warp[2 * c + channel + e] = moments[e].count;
      }
    }
    if (PLANT != 1) __syncthreads();
    for (int channel = static_cast<int>(threadIdx.x); channel < c;
         channel += static_cast<int>(blockDim.x)) {
      Moments whole;
      for (int warp = 0; warp < warps_of_block(); ++warp) {
        const float* other = merged + warp * 3 * c + channel;
        whole.merge(other[0], other[c], other[2 * c]);
      }
      store(channel, whole);
    }
  }
}

}  // namespace ciema::coordinate
