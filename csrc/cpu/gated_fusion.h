// The stage gated_fusion on the CPU, as the dispatcher calls it.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace ciema::cpu {

using torch::stable::Tensor;

// e (B, C, H, W), w (B, G, H, W) -> out like e, or with mean_only its mean over the pixels, float32
// (B, C). Weights are packed, vectors float32.
Tensor gated_fusion_packed(Tensor e, Tensor w, Tensor squeeze_packed, Tensor squeeze_scale,
                           Tensor squeeze_shift, Tensor fusion_of_s_packed,
                           Tensor fusion_of_r_packed, Tensor fusion_scale, Tensor fusion_shift,
                           bool mean_only);

}  // namespace ciema::cpu
