// The stage channel_interaction on the CPU, as the dispatcher calls it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace ciema::cpu {

using torch::stable::Tensor;

// x (B, C, H, W) -> e like x, gate, mean, maximum float32 (B, C), argmax int64 (B, C);
// x's mean, maximum and argmax are found here unless all three are given
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_interaction_packed(
    Tensor x, Tensor squeeze_weight, Tensor excite_weight, Tensor interaction_packed,
    std::optional<Tensor> x_mean, std::optional<Tensor> x_maximum,
    std::optional<Tensor> x_argmax);

// grad_x from grad_e and the gradients of the statistics; the packed weight is transposed.
Tensor channel_interaction_input_backward(Tensor grad_e, Tensor gate, Tensor interaction_packed,
                                          Tensor grad_mean, Tensor grad_maximum, Tensor argmax);

}  // namespace ciema::cpu
