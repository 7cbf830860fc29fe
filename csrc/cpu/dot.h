// A product of vectors.
#pragma once

#include <cstdint>

namespace ciema::cpu {

inline float dot(const float* a, const float* b, int64_t count) {
  constexpr int kChains = 16;  // independent sums, which the compiler keeps in vectors
  float sum[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    for (int j = 0; j < kChains; ++j) sum[j] += a[i + j] * b[i + j];
  }
  float total = 0.0f;
  for (; i < count; ++i) total += a[i] * b[i];
  for (int j = 0; j < kChains; ++j) total += sum[j];
  return total;
}

}  // namespace ciema::cpu
