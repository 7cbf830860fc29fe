// Stage coordinate_attention on the CPU (spec.md 2.2); simd/coordinate_attention_body.h has the
// equations and the precision of the sums.
//
// Layouts  e with neighbouring pixels (rows) or neighbouring channels (channels_last) is read where
//          it lies, other strides are made contiguous first.
// Threads  over the B*G slabs, each one thread's: the bits do not depend on the number of threads.
// Bytes    reads e once into a core's cache, writes B*C*(H + W + 2) floats.
#include "coordinate_attention.h"

#include "isa.h"
#include "slabs.h"

namespace ciema::cpu {

Tensor coordinate_attention_pack(Tensor weight, Tensor bias) {
  const int64_t c = bias.numel();
  STD_TORCH_CHECK(c > 0, "bias is empty");
  const CoordinateAttention& kernels = *chosen_instruction_set().coordinate_attention;
  Tensor gate = empty_floats(bias, {kernels.packed_size(c)});
  kernels.pack(float_values(weight, "weight", c * c), float_values(bias, "bias", c), c,
               data_of(gate));
  return gate;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> coordinate_attention_packed(Tensor e, Tensor gate,
                                                                       int64_t groups, double eps) {
  check_slabs(e, groups);
  const int64_t batch = e.size(0), channels = e.size(1), height = e.size(2), width = e.size(3);
  const int64_t c = channels / groups;
  const CoordinateAttention& kernels = *chosen_instruction_set().coordinate_attention;
  const float* const weights = float_values(gate, "gate", kernels.packed_size(c));
  Tensor alpha_h = empty_floats(e, {batch, channels, height});
  Tensor alpha_w = empty_floats(e, {batch, channels, width});
  Tensor mean = empty_floats(e, {batch, channels}), rstd = empty_floats(e, {batch, channels});
  if (batch == 0) return {alpha_h, alpha_w, mean, rstd};
  e = readable_slabs(e);
  const Slabs slabs(e, groups);
  const CoordinateShape shape = {c, height, width};
  float *const gates_h = data_of(alpha_h), *const gates_w = data_of(alpha_w);
  float *const means = data_of(mean), *const rstds = data_of(rstd);
  for_each_slab(slabs.count, kernels.scratch_size(shape),
                [&](int64_t first, int64_t last, float* scratch) {
                  for (int64_t i = first; i < last; ++i) {
                    const int64_t at = i * c;
                    const CoordinateSlab slab = {slabs.map(i), gates_h + at * height,
                                                 gates_w + at * width, means + at, rstds + at};
                    kernels.slab(shape, weights, eps, slab, scratch);
                  }
                });
  return {alpha_h, alpha_w, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> coordinate_attention_backward(
    Tensor grad_alpha_h, Tensor grad_alpha_w, Tensor grad_mean, Tensor grad_rstd, Tensor e,
    Tensor alpha_h, Tensor alpha_w, Tensor mean, Tensor rstd, Tensor weight, int64_t groups) {
  check_slabs(e, groups);
  const int64_t batch = e.size(0), channels = e.size(1), height = e.size(2), width = e.size(3);
  const int64_t c = channels / groups, vectors = batch * channels;
  const CoordinateAttention& kernels = *chosen_instruction_set().coordinate_attention;
  Tensor packed = empty_floats(e, {kernels.packed_size(c)});
  kernels.pack_backward(float_values(weight, "weight", c * c), c, data_of(packed));
  const float* const weights = data_of(packed);
  const CoordinateBackwardSlab first = {
      {},
      float_values(alpha_h, "alpha_h", vectors * height),
      float_values(alpha_w, "alpha_w", vectors * width),
      float_values(mean, "mean", vectors),
      float_values(rstd, "rstd", vectors),
      float_values(grad_alpha_h, "grad_alpha_h", vectors * height),
      float_values(grad_alpha_w, "grad_alpha_w", vectors * width),
      float_values(grad_mean, "grad_mean", vectors),
      float_values(grad_rstd, "grad_rstd", vectors),
      {},
      nullptr,
      nullptr};
  Tensor grad_e = torch::stable::empty(e.sizes(), e.scalar_type(), std::nullopt, e.device(),
                                       std::nullopt, memory_format_of(e));
  const int64_t count = c * c + c;
  Tensor shares = empty_floats(e, {batch * groups, count});
  Tensor grad_weight = empty_floats(e, {c, c}), grad_bias = empty_floats(e, {c});
  e = readable_slabs(e);
  const Slabs slabs(e, groups), grads(grad_e, groups);
  const CoordinateShape shape = {c, height, width};
  float* const share = data_of(shares);
  for_each_slab(slabs.count, kernels.backward_scratch_size(shape),
                [&](int64_t begin, int64_t end, float* scratch) {
                  for (int64_t i = begin; i < end; ++i) {
                    CoordinateBackwardSlab slab = first;
                    const int64_t at = i * c;
                    slab.map = slabs.map(i);
                    slab.grad_e = grads.map(i);
                    slab.alpha_h += at * height;
                    slab.alpha_w += at * width;
                    slab.mean += at;
                    slab.rstd += at;
                    slab.grad_alpha_h += at * height;
                    slab.grad_alpha_w += at * width;
                    slab.grad_mean += at;
                    slab.grad_rstd += at;
                    slab.grad_weight = share + i * count;
                    slab.grad_bias = slab.grad_weight + c * c;
                    kernels.backward(shape, weights, slab, scratch);
                  }
                });
  add_shares(share, slabs.count, count, 0, c * c, data_of(grad_weight));
  add_shares(share, slabs.count, count, c * c, c, data_of(grad_bias));
  return {grad_e, grad_weight, grad_bias};
}

}  // namespace ciema::cpu
