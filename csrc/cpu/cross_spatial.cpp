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

// Tiles waste work on maps that are narrower than this: the direct form takes them.
constexpr int64_t kNarrowest = 3;

int form_for(int64_t height, int64_t width) {
  return std::min(height, width) < kNarrowest ? kDirectForm : kWinogradForm;
}

const float* values(const Tensor& parameter, const char* name, int64_t numel) {
  STD_TORCH_CHECK(parameter.scalar_type() == ScalarType::Float && parameter.is_contiguous(), name,
                  " must be float32 and contiguous");
  STD_TORCH_CHECK(parameter.numel() == numel, name, " must have ", numel, " values, got ",
                  parameter.numel());
  return static_cast<const float*>(parameter.const_data_ptr());
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
      values(gn_weight, "gn_weight", c),
      values(gn_bias, "gn_bias", c),
      values(conv3x3_weight, "conv3x3_weight", 9 * square),
      values(conv3x3_bias, "conv3x3_bias", c),
      values(spatial_conv1_weight, "spatial_conv1_weight", square),
      values(spatial_conv3_weight, "spatial_conv3_weight", 9 * square),
      values(spatial_conv5_weight, "spatial_conv5_weight", 25 * square),
      values(attention_weight, "attention_weight", 9 * square),
      values(attention_bn_weight, "attention_bn_weight", 3 * c),
      values(attention_bn_bias, "attention_bn_bias", 3 * c),
      values(attention_running_mean, "attention_running_mean", 3 * c),
      values(attention_running_var, "attention_running_var", 3 * c),
      values(reduce_weight, "reduce_weight", 3 * square),
      values(reduce_bn_weight, "reduce_bn_weight", c),
      values(reduce_bn_bias, "reduce_bn_bias", c),
      values(reduce_running_mean, "reduce_running_mean", c),
      values(reduce_running_var, "reduce_running_var", c),
      values(channel_feat_weight, "channel_feat_weight", square),
      values(alpha, "alpha", 1),
      attention_eps,
      reduce_eps,
  };
  const CrossSpatial& kernels = *chosen_instruction_set().cross_spatial;
  const int forms =
      height < 0 || width < 0 ? kWinogradForm | kDirectForm : form_for(height, width);
  Tensor packed = torch::stable::empty({kernels.packed_size(c, forms)}, ScalarType::Float,
                                       std::nullopt, gn_weight.device());
  kernels.pack(parameters, c, forms, static_cast<float*>(packed.mutable_data_ptr()));
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> cross_spatial_packed(Tensor e, Tensor alpha_h, Tensor alpha_w,
                                                        Tensor mean, Tensor rstd, Tensor packed,
                                                        int64_t groups) {
  check_slabs(e, groups);
  const int64_t batch = e.size(0), channels = e.size(1), height = e.size(2), width = e.size(3);
  const int64_t c = channels / groups;
  const float* gates_h = values(alpha_h, "alpha_h", batch * channels * height);
  const float* gates_w = values(alpha_w, "alpha_w", batch * channels * width);
  const float* means = values(mean, "mean", batch * channels);
  const float* rstds = values(rstd, "rstd", batch * channels);
  const float* weights = values(packed, "packed", packed.numel());
  const CrossSpatial& kernels = *chosen_instruction_set().cross_spatial;
  const CrossSpatialShape shape = {c, height, width, form_for(height, width)};
  STD_TORCH_CHECK(kernels.is_packed(weights, packed.numel(), c, shape.form),
                  "packed does not hold weights of cross_spatial_pack for ", c,
                  " channels a group, this map's size and this instruction set");

  Tensor w = torch::stable::empty({batch, groups, height, width}, e.scalar_type(), std::nullopt,
                                  e.device());
  Tensor softmax1 =
      torch::stable::empty({batch, groups, c}, ScalarType::Float, std::nullopt, e.device());
  Tensor softmax2 =
      torch::stable::empty({batch, groups, c}, ScalarType::Float, std::nullopt, e.device());
  if (batch == 0) return {w, softmax1, softmax2};
  e = readable_slabs(e);
  const Slabs slabs(e, groups);
  char* const out = static_cast<char*>(w.mutable_data_ptr());
  float* const softmaxes1 = static_cast<float*>(softmax1.mutable_data_ptr());
  float* const softmaxes2 = static_cast<float*>(softmax2.mutable_data_ptr());
  for_each_slab(slabs.count, kernels.scratch_size(shape), [&](int64_t first, int64_t last,
                                                              float* scratch) {
    kernels.prepare(shape, scratch);
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = i * c;
      const CrossSpatialSlab slab = {
          slabs.data(i),      slabs.element,      slabs.stride_c, slabs.stride_h,
          slabs.stride_w,     gates_h + at * height, gates_w + at * width,
          means + at,         rstds + at,         out + i * height * width * slabs.element_size,
          softmaxes1 + at,    softmaxes2 + at};
      kernels.slab(shape, weights, slab, scratch);
    }
  });
  return {w, softmax1, softmax2};
}

}  // namespace ciema::cpu
