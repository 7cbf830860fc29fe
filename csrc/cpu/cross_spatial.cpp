// Stage cross_spatial on the CPU, in evaluation (spec.md 2.3); simd/cross_spatial_body.h has the
// equations and what is computed where.
//
// Layouts  e with neighbouring pixels (rows) or neighbouring channels (channels_last) is read where
//          it lies, other strides are made contiguous first.
// Threads  over the B*G slabs. A slab is one thread's from e to w, so the bits do not depend on the
//          number of threads.
// Bytes    reads e once, writes w once; about 2.6 MB of scratch a thread at c = 32, 56x56.
#include "cross_spatial.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "../common/layout.h"
#include "isa.h"
#include "slabs.h"

namespace ciema::cpu {
namespace {

// Measured at c = 32 and 2: tiles waste work on narrow maps, the smallest maps do not earn back the
// transformed weights' way through the cache, and few channels not the transforms.
constexpr int64_t kNarrowest = 3, kFewestPixels = 26, kFewestChannels = 3;

int form_for(int64_t channels, int64_t height, int64_t width) {
  const bool direct = std::min(height, width) < kNarrowest || height * width < kFewestPixels ||
                      channels < kFewestChannels;
  return direct ? kDirectForm : kWinogradForm;
}

// All slabs; `first` holds slab 0's pointers, and its map is filled in here.
void run_slabs(const Tensor& map, int64_t groups, const Tensor& packed,
               const CrossSpatialSlab& first) {
  const Tensor e = readable_slabs(map);
  const Slabs slabs(e, groups);
  const CrossSpatial& kernels = *chosen_instruction_set().cross_spatial;
  const int64_t c = slabs.channels, height = e.size(2), width = e.size(3);
  const CrossSpatialShape shape = {
      c, height, width, form_for(c, height, width),
      slabs.element == Element::kBFloat16 ? chosen_instruction_set().cross_spatial_bf16 : nullptr};
  const float* weights = float_values(packed, "packed", packed.numel());
  const int forms = shape.form | (shape.bf16 != nullptr ? kBf16Form : 0);
  STD_TORCH_CHECK(kernels.is_packed(weights, packed.numel(), c, forms),
                  "packed does not hold weights of cross_spatial_pack for ", c,
                  " channels a group, this map's size and this instruction set");
  for_each_slab(slabs.count, kernels.scratch_size(shape),
                [&](int64_t begin, int64_t end, float* scratch) {
                  kernels.prepare(shape, scratch);
                  for (int64_t i = begin; i < end; ++i) {
                    CrossSpatialSlab slab = first;
                    slab.map = slabs.map(i);
                    if (slab.gate == nullptr) {
                      slab.alpha_h += i * c * height;
                      slab.alpha_w += i * c * width;
                      slab.mean += i * c;
                      slab.rstd += i * c;
                    }
                    slab.w = static_cast<char*>(first.w) + i * height * width * slabs.element_size;
                    slab.softmax1 += i * c;
                    slab.softmax2 += i * c;
                    kernels.slab(shape, weights, slab, scratch);
                  }
                });
}

}  // namespace

Tensor cross_spatial_pack(Tensor gn_weight, Tensor gn_bias, Tensor conv3x3_weight,
                          Tensor conv3x3_bias, Tensor spatial_conv1_weight,
                          Tensor spatial_conv3_weight, Tensor spatial_conv5_weight,
                          Tensor attention_weight, Tensor attention_bn_weight,
                          Tensor attention_bn_bias, Tensor attention_running_mean,
                          Tensor attention_running_var, Tensor reduce_weight,
                          Tensor reduce_bn_weight, Tensor reduce_bn_bias,
                          Tensor reduce_running_mean, Tensor reduce_running_var,
                          Tensor channel_feat_weight, Tensor alpha, double attention_eps,
                          double reduce_eps, int64_t height, int64_t width) {
  const int64_t c = gn_weight.numel(), square = c * c;
  STD_TORCH_CHECK(c > 0, "gn_weight is empty");
  const CrossSpatialParameters parameters = {
      float_values(gn_weight, "gn_weight", c),
      float_values(gn_bias, "gn_bias", c),
      float_values(conv3x3_weight, "conv3x3_weight", 9 * square),
      float_values(conv3x3_bias, "conv3x3_bias", c),
      float_values(spatial_conv1_weight, "spatial_conv1_weight", square),
      float_values(spatial_conv3_weight, "spatial_conv3_weight", 9 * square),
      float_values(spatial_conv5_weight, "spatial_conv5_weight", 25 * square),
      float_values(attention_weight, "attention_weight", 9 * square),
      float_values(attention_bn_weight, "attention_bn_weight", 3 * c),
      float_values(attention_bn_bias, "attention_bn_bias", 3 * c),
      float_values(attention_running_mean, "attention_running_mean", 3 * c),
      float_values(attention_running_var, "attention_running_var", 3 * c),
      float_values(reduce_weight, "reduce_weight", 3 * square),
      float_values(reduce_bn_weight, "reduce_bn_weight", c),
      float_values(reduce_bn_bias, "reduce_bn_bias", c),
      float_values(reduce_running_mean, "reduce_running_mean", c),
      float_values(reduce_running_var, "reduce_running_var", c),
      float_values(channel_feat_weight, "channel_feat_weight", square),
      float_values(alpha, "alpha", 1),
      attention_eps,
      reduce_eps,
      chosen_instruction_set().cross_spatial_bf16,
  };
  const CrossSpatial& kernels = *chosen_instruction_set().cross_spatial;
  const int forms =
      (height < 0 || width < 0 ? kWinogradForm | kDirectForm : form_for(c, height, width)) |
      (parameters.bf16 != nullptr ? kBf16Form : 0);
  Tensor packed = empty_floats(gn_weight, {kernels.packed_size(c, forms)});
  kernels.pack(parameters, c, forms, data_of(packed));
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> cross_spatial_packed(Tensor e, Tensor alpha_h, Tensor alpha_w,
                                                        Tensor mean, Tensor rstd, Tensor packed,
                                                        int64_t groups) {
  check_slabs(e, groups);
  const int64_t batch = e.size(0), channels = e.size(1), height = e.size(2), width = e.size(3);
  Tensor w = torch::stable::empty({batch, groups, height, width}, e.scalar_type(), std::nullopt,
                                  e.device());
  Tensor softmax1 = empty_floats(e, {batch, groups, channels / groups});
  Tensor softmax2 = empty_floats(e, {batch, groups, channels / groups});
  CrossSpatialSlab first = {};
  first.alpha_h = float_values(alpha_h, "alpha_h", batch * channels * height);
  first.alpha_w = float_values(alpha_w, "alpha_w", batch * channels * width);
  first.mean = float_values(mean, "mean", batch * channels);
  first.rstd = float_values(rstd, "rstd", batch * channels);
  first.w = w.mutable_data_ptr();
  first.softmax1 = data_of(softmax1);
  first.softmax2 = data_of(softmax2);
  if (batch > 0) run_slabs(e, groups, packed, first);
  return {w, softmax1, softmax2};
}

Tensor coordinate_cross_spatial_packed(Tensor e, Tensor gate, double eps, Tensor packed,
                                       int64_t groups) {
  check_slabs(e, groups);
  const int64_t batch = e.size(0), c = e.size(1) / groups;
  const CoordinateAttention& coordinate = *chosen_instruction_set().coordinate_attention;
  Tensor w = torch::stable::empty({batch, groups, e.size(2), e.size(3)}, e.scalar_type(),
                                  std::nullopt, e.device());
  Tensor softmax = empty_floats(e, {2, batch, groups, c});
  CrossSpatialSlab first = {};
  first.gate = float_values(gate, "gate", coordinate.packed_size(c));
  first.gate_eps = eps;
  first.w = w.mutable_data_ptr();
  first.softmax1 = data_of(softmax);
  first.softmax2 = first.softmax1 + batch * groups * c;
  if (batch > 0) run_slabs(e, groups, packed, first);
  return w;
}

}  // namespace ciema::cpu
