// What one block does for one slab of coordinate attention (spec.md 2.2): pools, gates, moments.
// A slab is one sample's group, c channels of H×W; every function is called by all threads of a
// block, on tables that lie in shared memory or scratch (coordinate_slab.cuh). The kernels are in
// coordinate_attention_kernels.cuh; cross_spatial's may call the same.
//
//   pool           means over W and over H
//   apply_kernel   M p for every position, M (c, c) in shared memory
//   write_gates    σ(K p + b)
//   slab_moments   mean and Σ(u − mean)² of u = e·αw·αh for every channel
//
// Reads       each of the three passes reads the slab once; the first from device memory, the
//             others from the second-level cache, which holds it (200 KB at 32×56×56 in float16).
// Accuracy    float32; moments in registers by two passes over a few packs around their first
//             value, merged by Chan's formula, so that equal values have a variance of exactly 0.
//             Fixed-order trees, no atomics. u is rounded before its mean is subtracted: where the
//             variance vanishes u − mean must be the 0 that the large slope of rstd expects.
#pragma once

#include "coordinate_slab.cuh"
#include "moments.cuh"

// Bugs for the tests; none in a build. 1, 3: a barrier left out, 2: gates past the last channel.
#ifndef PLANT
#define PLANT 0
#endif

namespace ciema::coordinate {

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
#pragma unroll 1
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
  constexpr int kTogether = kLanesMoments > 4 ? 2 : kInFlight;  // what the registers hold
  int pack = lane;
#pragma unroll 1
  for (; pack < packs - (kTogether - 1) * step; pack += kTogether * step) {
    float u[kTogether][S::kVector];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) load(pack + i * step, u[i]);
#pragma unroll
    for (int e = 0; e < kLanesMoments; ++e) {
      moments[e].template add<kTogether * kOfPack>(&u[0][e], S::kChannelsLast ? S::kVector : 1);
    }
  }
#pragma unroll 1
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
