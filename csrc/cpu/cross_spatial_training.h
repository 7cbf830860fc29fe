// The CPU kernels of the stage cross_spatial with batch statistics, and its backward.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace ciema::cpu {

using torch::stable::Tensor;

// parameters: gn_weight, gn_bias, conv3x3_weight, conv3x3_bias, spatial_conv{1,3,5}_weight,
// attention_weight, attention_bn_weight, attention_bn_bias, reduce_weight, reduce_bn_weight,
// reduce_bn_bias, channel_feat_weight, alpha; float32 and contiguous, as the vectors are.
// -> w (B, G, H, W) of e's dtype, softmax1, softmax2 (B, G, c), attention_mean, attention_var
// (2G, 3c), reduce_mean, reduce_var (2G, c), or with pooled (1, 3c), (1, c): spec.md 3
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_spatial_train(
    Tensor e, Tensor alpha_h, Tensor alpha_w, Tensor mean, Tensor rstd,
    std::vector<Tensor> parameters, int64_t groups, bool pooled, double attention_eps,
    double reduce_eps);

// grad_w and w float32 and contiguous. constants: the statistics are (1, 3c) and (1, c) and carry no
// gradient. -> grad_e of e's dtype and format, gradients of the vectors, and all parameters'
// gradients one behind the other, float32
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_spatial_backward(
    Tensor grad_w, Tensor e, Tensor alpha_h, Tensor alpha_w, Tensor mean, Tensor rstd, Tensor w,
    Tensor softmax1, Tensor softmax2, Tensor attention_mean, Tensor attention_var,
    Tensor reduce_mean, Tensor reduce_var, std::vector<Tensor> parameters, int64_t groups,
    bool constants, bool pooled, double attention_eps, double reduce_eps);

}  // namespace ciema::cpu
