// Channel interaction's gate (spec.md 2.1): two small products of the channel statistics of x.
//
//   hidden[b] = relu(V1 mean[b]) + relu(V1 max[b])        gate[b] = σ(V2 hidden[b])
//
// What follows, e = a ⊙ x + (1 − a) ⊙ (Wci ∗ x), is the shared product with the epilogue Gate.
//
// Layouts     mean, max, gate (B, C) and V1 (hidden, C), V2 (C, hidden) row-major, of T or
//             float32.
// Grid        blockIdx.x = piece of C, blockIdx.y = b; every block computes hidden of its sample, a
//             warp to a unit, then its own channels, a warp to a channel.
// Bytes       V1 once a block, from the second-level cache; V2, the statistics and the gate once.
// Accuracy    float32 sums of a lane, then a tree over the lanes, always in the same order.
// Recomputed  hidden, by the few blocks of a sample: less than another launch would take.
#pragma once

#include "../common/device.cuh"

// Bugs for the tests, none in a build. 11: the barrier after hidden left out, 12: a piece of C that
// goes past its end.
#ifndef PLANT
#define PLANT 0
#endif

namespace ciema::channel_interaction {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

struct GateParams {
  const float *mean, *maximum;
  const void *squeeze, *excite;
  float* gate;
  int channels, hidden;
  int piece;             // channels to a block
  bool squeeze_aligned;  // rows of V1, mean and max begin at multiples of 16 bytes
};

__device__ __forceinline__ float add_warp(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kFullMask, value, lanes);
  }
  return value;
}

// max(value, 0), and NaN where value is NaN.
__device__ __forceinline__ float relu(float value) { return value < 0.0f ? 0.0f : value; }

// A lane's share of the products of one row with two vectors.
template <class W>
__device__ __forceinline__ void multiply_row(const W* row, const float* first, const float* second,
                                             int count, bool aligned, float& of_first,
                                             float& of_second) {
  constexpr int kElements = Vector<W>::kElements, kFloats = Vector<float>::kElements;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (!aligned) {
    for (int c = lane; c < count; c += kWarp) {
      const float weight = to_float(row[c]);
      of_first += weight * first[c];
      of_second += weight * second[c];
    }
    return;
  }
  for (int c = lane * kElements; c < count; c += kWarp * kElements) {  // count: whole vectors
    const auto weights = load_vector<Vector<W>>(row + c);
#pragma unroll
    for (int part = 0; part < kElements / kFloats; ++part) {
      const auto one = load_vector<Vector<float>>(first + c + part * kFloats);
      const auto other = load_vector<Vector<float>>(second + c + part * kFloats);
#pragma unroll
      for (int e = 0; e < kFloats; ++e) {
        const float weight = to_float(weights.element[part * kFloats + e]);
        of_first += weight * one.element[e];
        of_second += weight * other.element[e];
      }
    }
  }
}

template <class W>
__global__ void __launch_bounds__(kThreads) gate_kernel(GateParams p) {
  CIEMA_DYNAMIC_SHARED(float, hidden);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t sample = static_cast<int64_t>(blockIdx.y) * p.channels;
  for (int unit = warp; unit < p.hidden; unit += kWarps) {
    const W* row = static_cast<const W*>(p.squeeze) + static_cast<int64_t>(unit) * p.channels;
    float of_mean = 0.0f, of_maximum = 0.0f;
    multiply_row(row, p.mean + sample, p.maximum + sample, p.channels, p.squeeze_aligned, of_mean,
                 of_maximum);
    of_mean = add_warp(of_mean);
    of_maximum = add_warp(of_maximum);
    if (lane == 0) hidden[unit] = relu(of_mean) + relu(of_maximum);
  }
  if (PLANT != 11) __syncthreads();
  const int first = static_cast<int>(blockIdx.x) * p.piece;
  const int last = first + p.piece < p.channels || PLANT == 12 ? first + p.piece : p.channels;
  for (int channel = first + warp; channel < last; channel += kWarps) {
    const W* row = static_cast<const W*>(p.excite) + static_cast<int64_t>(channel) * p.hidden;
    float logit = 0.0f;
    for (int unit = lane; unit < p.hidden; unit += kWarp) {
      logit += to_float(row[unit]) * hidden[unit];
    }
    logit = add_warp(logit);
    if (lane == 0) p.gate[sample + channel] = 1.0f / (1.0f + expf(-logit));
  }
}

}  // namespace ciema::channel_interaction
