// The attention product of cross_spatial with bfloat16 operands, for 16-bit maps on processors that
// have AVX512-BF16: twice the rate, sums in float32.
#pragma once

#include "target.h"

namespace ciema::cpu {

struct CrossSpatialBf16 {
  int64_t (*packed_size)(int64_t channels);  // in floats
  // matrix(o, i) of 3c x 3c: attention weights with the batch norm in them, row-major
  void (*pack)(const float* matrix, int64_t channels, void* packed);
  int64_t (*scratch_size)(int64_t channels, int64_t pixels);  // in floats
  // rows[i] = sigmoid(Wa f + bias) f of `count` pixels; f (count, 3cp), strides in floats
  void (*attend)(int64_t channels, const void* packed, const float* bias, const float* features,
                 int64_t count, float* rows, int64_t stride_rows, void* scratch);
};

#ifdef CIEMA_X86_SIMD
extern const CrossSpatialBf16 kAvx512CrossSpatialBf16;
#endif

}  // namespace ciema::cpu
