// Mean and sum of squared deviations of values that come in parts, for every norm's statistics.
#pragma once

#include "../common/device.cuh"

namespace ciema {

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

}  // namespace ciema
