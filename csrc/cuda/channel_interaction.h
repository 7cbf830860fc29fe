// The CUDA kernels of the stage channel_interaction, as the dispatcher calls them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace ciema::cuda {

using torch::stable::Tensor;

// x (B, C, H, W) -> mean, max float32 (B, C), argmax int64 (B, C); on the current stream
std::tuple<Tensor, Tensor, Tensor> channel_statistics(Tensor x);

// -> grad_x, shape, dtype and memory format of x; argmax must come from channel_statistics(x)
Tensor channel_statistics_backward(Tensor grad_mean, Tensor grad_max, Tensor argmax, Tensor x);

}  // namespace ciema::cuda
