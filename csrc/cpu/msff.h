// The stage msff on the CPU, as the dispatcher calls it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

namespace ciema::cpu {

using torch::stable::Tensor;

// features (B, C_i, H_i, W_i), a packed weight (C_out, C_i) for each, scale and shift float32
// (C_out) -> out (B, C_out, max H_i, max W_i), dtype and memory format of the first
Tensor msff_packed(std::vector<Tensor> features, std::vector<Tensor> packed, Tensor scale,
                   Tensor shift);

// The sum before the batch norm, float32, and with `moments` its rows' means and biased variances.
std::tuple<Tensor, Tensor, Tensor> msff_sum(std::vector<Tensor> features,
                                            std::vector<Tensor> packed, bool moments);

// The adjoint of bilinear resizing from height x width to the size of grad.
Tensor msff_shrink(Tensor grad, int64_t height, int64_t width);

}  // namespace ciema::cpu
