// Mean and variance in pieces.
#pragma once

#include "../common/device.cuh"

namespace ciema::product {

// Count, mean and sum of squared deviations, joined by Chan's formula: n = n1 + n2,
// d = mean2 − mean1, mean = mean1 + d n2/n, M2 = M2_1 + M2_2 + d² n1 n2/n.
struct Moments {
  float count, mean, m2;

  __device__ __forceinline__ void join(const Moments& other) {
    const float total = count + other.count;
    if (total == 0.0f) return;
    const float delta = other.mean - mean, share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

}  // namespace ciema::product
