// The channel statistics on the CPU, as the dispatcher calls them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

namespace ciema::cpu {

using torch::stable::Tensor;

// x (B, C, H, W) -> mean, max float32 (B, C), argmax int64 (B, C)
std::tuple<Tensor, Tensor, Tensor> channel_statistics(Tensor x);

// -> grad_x, shape, dtype and memory format of x
Tensor channel_statistics_backward(Tensor grad_mean, Tensor grad_max, Tensor argmax, Tensor x);

std::string cpu_isa();
std::string cpu_isa_available();

}  // namespace ciema::cpu
