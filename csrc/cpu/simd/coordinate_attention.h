// What each instruction set offers the stage coordinate_attention: one table a file.
#pragma once

#include "slab.h"
#include "target.h"

namespace ciema::cpu {

struct CoordinateShape {
  int64_t channels, height, width;  // of a slab
};

struct CoordinateSlab {
  SlabMap map;
  float *alpha_h, *alpha_w;  // (c, H), (c, W)
  float *mean, *rstd;        // (c)
};

struct CoordinateBackwardSlab {
  SlabMap map;
  const float *alpha_h, *alpha_w, *mean, *rstd;
  const float *grad_alpha_h, *grad_alpha_w, *grad_mean, *grad_rstd;
  SlabMap grad_e;                  // written
  float *grad_weight, *grad_bias;  // (c, c), (c): this slab's share
};

struct CoordinateAttention {
  int64_t (*packed_size)(int64_t channels);  // in floats
  void (*pack)(const float* weight, const float* bias, int64_t channels, float* packed);
  int64_t (*scratch_size)(const CoordinateShape& shape);  // in floats
  void (*slab)(const CoordinateShape& shape, const float* packed, double eps,
               const CoordinateSlab& slab, float* scratch);
  void (*pack_backward)(const float* weight, int64_t channels, float* packed);  // c * padded c
  int64_t (*backward_scratch_size)(const CoordinateShape& shape);
  void (*backward)(const CoordinateShape& shape, const float* packed,
                   const CoordinateBackwardSlab& slab, float* scratch);
};

extern const CoordinateAttention kPortableCoordinateAttention;
#ifdef CIEMA_X86_SIMD
extern const CoordinateAttention kAvx2CoordinateAttention;
extern const CoordinateAttention kAvx512CoordinateAttention;
#endif

}  // namespace ciema::cpu
