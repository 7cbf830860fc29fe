// The CPU kernels of the stage cross_spatial, as the dispatcher calls them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace ciema::cpu {

using torch::stable::Tensor;

// Parameters of the stage (float32, contiguous) -> what cross_spatial_packed reads of them, float32
// (n), for maps of any size (height or width -1) or for one size.
Tensor cross_spatial_pack(Tensor gn_weight, Tensor gn_bias, Tensor conv3x3_weight,
                          Tensor conv3x3_bias, Tensor spatial_conv1_weight,
                          Tensor spatial_conv3_weight, Tensor spatial_conv5_weight,
                          Tensor attention_weight, Tensor attention_bn_weight,
                          Tensor attention_bn_bias, Tensor attention_running_mean,
                          Tensor attention_running_var, Tensor reduce_weight,
                          Tensor reduce_bn_weight, Tensor reduce_bn_bias,
                          Tensor reduce_running_mean, Tensor reduce_running_var,
                          Tensor channel_feat_weight, Tensor alpha, double attention_eps,
                          double reduce_eps, int64_t height, int64_t width);

// e (B, C, H, W), gates and statistics of coordinate_attention -> w (B, G, H, W) of e's dtype,
// softmax1, softmax2 float32 (B, G, C/G)
std::tuple<Tensor, Tensor, Tensor> cross_spatial_packed(Tensor e, Tensor alpha_h, Tensor alpha_w,
                                                        Tensor mean, Tensor rstd, Tensor packed,
                                                        int64_t groups);

// The stages coordinate_attention and cross_spatial in one pass over e (B, C, H, W): gate from
// coordinate_attention_pack, eps of the group norm -> w (B, G, H, W)
Tensor coordinate_cross_spatial_packed(Tensor e, Tensor gate, double eps, Tensor packed,
                                       int64_t groups);

}  // namespace ciema::cpu
