// What each instruction set offers the stage cross_spatial in evaluation: one table of functions.
#pragma once

#include "cross_spatial_bf16.h"
#include "slab.h"
#include "target.h"

namespace ciema::cpu {

// Parameters as the op takes them, float32 and contiguous.
struct CrossSpatialParameters {
  const float *gn_weight, *gn_bias, *conv3x3_weight, *conv3x3_bias;
  const float *spatial_conv1_weight, *spatial_conv3_weight, *spatial_conv5_weight;
  const float *attention_weight, *attention_bn_weight, *attention_bn_bias;
  const float *attention_running_mean, *attention_running_var;
  const float *reduce_weight, *reduce_bn_weight, *reduce_bn_bias;
  const float *reduce_running_mean, *reduce_running_var;
  const float *channel_feat_weight, *alpha;
  double attention_eps, reduce_eps;
  const CrossSpatialBf16* bf16;  // null where it is not to be packed for
};

// How the 3x3 and 5x5 convolutions are done; packed weights hold one form's or both's.
constexpr int kWinogradForm = 1;
constexpr int kDirectForm = 2;
constexpr int kBf16Form = 4;  // and the attention product in bfloat16, beside one of those

struct CrossSpatialShape {
  int64_t channels, height, width;  // of a slab: one group of one sample
  int form;
  const CrossSpatialBf16* bf16;  // null: the attention product is float32
};

struct CrossSpatialSlab {
  SlabMap map;
  const float* gate;               // packed weights of coordinate_attention, which then runs first
  double gate_eps;                 // on the same copy of e; or null, and the four vectors are given
  const float *alpha_h, *alpha_w;  // (c, H), (c, W)
  const float *mean, *rstd;        // (c)
  void* w;                         // (H, W), contiguous, of e's type
  float *softmax1, *softmax2;      // (c)
};

struct CrossSpatial {
  int64_t (*packed_size)(int64_t channels, int forms);  // in floats
  void (*pack)(const CrossSpatialParameters& parameters, int64_t channels, int forms,
               float* packed);
  bool (*is_packed)(const float* packed, int64_t size, int64_t channels, int form);
  int64_t (*scratch_size)(const CrossSpatialShape& shape);  // in floats
  // Before the first of a run of slabs: zeroes what slabs leave at zero.
  void (*prepare)(const CrossSpatialShape& shape, float* scratch);
  void (*slab)(const CrossSpatialShape& shape, const float* packed, const CrossSpatialSlab& slab,
               float* scratch);
};

extern const CrossSpatial kPortableCrossSpatial;
#ifdef CIEMA_X86_SIMD
extern const CrossSpatial kAvx2CrossSpatial;
extern const CrossSpatial kAvx512CrossSpatial;
#endif

}  // namespace ciema::cpu
