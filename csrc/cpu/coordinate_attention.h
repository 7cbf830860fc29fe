// The CPU kernels of the stage coordinate_attention, as the dispatcher calls them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace ciema::cpu {

using torch::stable::Tensor;

// e (B, C, H, W), weight and bias float32 -> alpha_h (B, C, H), alpha_w (B, C, W), mean and rstd
// (B, C) of u = e alpha_h alpha_w, all float32
std::tuple<Tensor, Tensor, Tensor, Tensor> coordinate_attention(Tensor e, Tensor weight,
                                                                Tensor bias, int64_t groups,
                                                                double eps);

}  // namespace ciema::cpu
