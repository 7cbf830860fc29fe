// The CPU kernels of the stage coordinate_attention, as the dispatcher calls them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace ciema::cpu {

using torch::stable::Tensor;

// weight (c, c, 1, 1) and bias (c), float32, contiguous -> what the kernels read of them, float32
Tensor coordinate_attention_pack(Tensor weight, Tensor bias);

// e (B, C, H, W), gate from coordinate_attention_pack -> alpha_h (B, C, H), alpha_w (B, C, W), mean
// and rstd (B, C) of u = e alpha_h alpha_w, all float32
std::tuple<Tensor, Tensor, Tensor, Tensor> coordinate_attention_packed(Tensor e, Tensor gate,
                                                                       int64_t groups, double eps);

// All float32 and contiguous but e -> grad_e of e's dtype and format, grad_weight (c, c), grad_bias
// (c), float32
std::tuple<Tensor, Tensor, Tensor> coordinate_attention_backward(
    Tensor grad_alpha_h, Tensor grad_alpha_w, Tensor grad_mean, Tensor grad_rstd, Tensor e,
    Tensor alpha_h, Tensor alpha_w, Tensor mean, Tensor rstd, Tensor weight, int64_t groups);

}  // namespace ciema::cpu
