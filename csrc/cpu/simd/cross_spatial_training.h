// What each instruction set offers the stage cross_spatial in training: one table of functions.
#pragma once

#include "cross_spatial.h"

namespace ciema::cpu {

// The samples of one group: one task, because batch statistics are taken over them. Pointers are
// sample 0's; samples lie groups * (elements of a slab) apart.
struct TrainingGroup {
  CrossSpatialShape shape;  // form is not looked at: training always goes by tiles
  int64_t batch, groups;
  SlabMap map;
  int64_t sample_bytes;            // from sample to sample of e
  const float *alpha_h, *alpha_w;  // (B, ., c, H), (B, ., c, W)
  const float *mean, *rstd;        // (B, ., c)
  double attention_eps, reduce_eps;
};

// With statistics of each group and branch its own a group is done at one go. Where all groups and
// branches share them (spec.md 3, "pooled"), the caller joins what a phase leaves of every group
// before the next. Later phases recompute what earlier ones did, unless `kept` says that the scratch
// is as the phase before left it: the same operations, done once.
enum class Phase : int { kWhole, kFirst, kSecond, kLast };

struct TrainingForward {
  Phase phase;
  bool kept;
  void* w;                               // (B, ., H, W), of e's type
  float *softmax1, *softmax2;            // (B, ., c)
  float *attention_mean, *attention_var; // (2, 3c), of the two branches
  float *reduce_mean, *reduce_var;       // (2, c)
  // Phases: first leaves the moments of L (2, 2, 3c), second those of R (2, 2, c): of each branch
  // mean and centred squares. Then attention_mean (3c) … are what was joined, and are read.
  double* moments;
};

struct TrainingBackward {
  Phase phase;
  bool kept;
  const float *grad_w, *w;                     // (B, ., H, W)
  const float *softmax1, *softmax2;            // (B, ., c)
  const float *attention_mean, *attention_var; // (2, 3c), or (1, 3c) of constants
  const float *reduce_mean, *reduce_var;       // (2, c), or (1, c)
  bool constants;                              // evaluation: statistics carry no gradient
  bool shared;                                 // the statistics are one set, not two
  // Phases: first leaves the two sums of R's batch norm (2, c), second those of L's (2, 3c), over
  // the group; then the totals of all groups, of `count` values a channel, are read.
  double* norm_sums;
  const double *reduce_totals, *attention_totals;
  double count;
  SlabMap grad_e;                              // written; strides as e's, contiguous
  int64_t grad_sample_bytes;
  float *grad_alpha_h, *grad_alpha_w, *grad_mean, *grad_rstd;  // as the vectors
  float* parameters;  // this group's share, in the order of gradient_size
};

struct CrossSpatialTraining {
  int64_t (*packed_size)(int64_t channels, bool backward);
  void (*pack)(const CrossSpatialParameters& parameters, int64_t channels, bool backward,
               float* packed);
  int64_t (*forward_scratch)(const CrossSpatialShape& shape, int64_t batch);
  int64_t (*backward_scratch)(const CrossSpatialShape& shape, int64_t batch);
  void (*forward)(const TrainingGroup& group, const float* packed, const TrainingForward& out,
                  float* scratch);
  void (*backward)(const TrainingGroup& group, const float* packed, const TrainingBackward& out,
                   float* scratch);
};

extern const CrossSpatialTraining kPortableCrossSpatialTraining;
#ifdef CIEMA_X86_SIMD
extern const CrossSpatialTraining kAvx2CrossSpatialTraining;
extern const CrossSpatialTraining kAvx512CrossSpatialTraining;
extern const CrossSpatialTraining kAvx512bf16CrossSpatialTraining;  // products in bfloat16
#endif

}  // namespace ciema::cpu
