// The stage gated_fusion on the CPU, as the dispatcher calls it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace ciema::cpu {

using torch::stable::Tensor;

// e (B, C, H, W), w (B, G, H, W) -> out like e, or with mean_only its mean over the pixels, float32
// (B, C). Weights are packed, vectors float32.
Tensor gated_fusion_packed(Tensor e, Tensor w, Tensor squeeze_packed, Tensor squeeze_scale,
                           Tensor squeeze_shift, Tensor fusion_of_s_packed,
                           Tensor fusion_of_r_packed, Tensor fusion_scale, Tensor fusion_shift,
                           bool mean_only);

// out from the last batch norm's input: phi = sigmoid(scale logits + shift).
Tensor gated_fusion_apply(Tensor e, Tensor w, Tensor logits, Tensor scale, Tensor shift);

// Gradients for e and w, given those of the logits and of the squeezing product; the packed weights
// are transposed, Ws^T (C, C) and W1^T (C, C//4).
std::tuple<Tensor, Tensor> gated_fusion_input_backward(
    Tensor grad_out, Tensor e, Tensor w, Tensor logits, Tensor scale, Tensor shift,
    Tensor grad_logits, Tensor fusion_packed, Tensor grad_hidden, Tensor squeeze_packed);

}  // namespace ciema::cpu
