// The frozen backbone's kernels on the CPU, as the dispatcher calls them.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace ciema::cpu {

using torch::stable::Tensor;

// weight float32 (N, K) -> weight panels of this machine: float32, or, if asked for and this
// machine multiplies them, pairs of bfloat16. The result's dtype tells which.
Tensor separable_pack(Tensor weight, bool pairs);

// x (B, C, H, W), depthwise float32 (9, C), its bias (C), packed (C -> N), bias (N)
// -> (B, N, ceil(H/stride), ceil(W/stride)) of x's dtype, channels_last
Tensor separable_block(Tensor x, Tensor depthwise, Tensor depthwise_bias, Tensor packed,
                       Tensor bias, int64_t stride, bool inner_relu, bool relu);

// images (B, I, H, W), packed floats (9 I -> N), bias (N) -> relu of the 3x3 convolution of
// stride 2, (B, N, ceil(H/2), ceil(W/2)) of the dtype asked for, channels_last
Tensor stem(Tensor images, Tensor packed, Tensor bias, torch::headeronly::ScalarType dtype);

}  // namespace ciema::cpu
