// From an entry's arguments to the parameters of cross_spatial's packing.
#pragma once

#include "cross_spatial_pack.cuh"
#include "launch.cuh"

namespace ciema::cross_spatial {

// In training the batch norms are not folded, and the tensors and numbers of them are not there.
inline CrossSpatialPackParams pack_params_of(const Arguments& a, bool training) {
  CrossSpatialPackParams p{};
  p.gn_weight = a.pointer<const void>("gn_weight");
  p.gn_bias = a.pointer<const void>("gn_bias");
  p.conv3x3_weight = a.pointer<const void>("conv3x3_weight");
  p.conv3x3_bias = a.pointer<const void>("conv3x3_bias");
  p.spatial_conv1_weight = a.pointer<const void>("spatial_conv1_weight");
  p.spatial_conv3_weight = a.pointer<const void>("spatial_conv3_weight");
  p.spatial_conv5_weight = a.pointer<const void>("spatial_conv5_weight");
  p.attention_weight = a.pointer<const void>("attention_weight");
  p.reduce_weight = a.pointer<const void>("reduce_weight");
  p.channel_feat_weight = a.pointer<const void>("channel_feat_weight");
  p.alpha = a.pointer<const void>("alpha");
  p.packed = a.pointer<void>("packed");
  p.vectors = a.pointer<float>("vectors");
  p.counters = a.pointer<int>("counters");
  p.counts = static_cast<int>(a.integer("counts"));
  p.channels = static_cast<int>(a.integer("group_channels"));
  p.padded = static_cast<int>(a.integer("padded"));
  p.training = training;
  p.float32_weights = training || a.integer("float32_weights") != 0;
  if (training) return p;
  p.attention_bn_weight = a.pointer<const void>("attention_bn_weight");
  p.attention_bn_bias = a.pointer<const void>("attention_bn_bias");
  p.attention_running_mean = a.pointer<const void>("attention_running_mean");
  p.attention_running_var = a.pointer<const void>("attention_running_var");
  p.reduce_bn_weight = a.pointer<const void>("reduce_bn_weight");
  p.reduce_bn_bias = a.pointer<const void>("reduce_bn_bias");
  p.reduce_running_mean = a.pointer<const void>("reduce_running_mean");
  p.reduce_running_var = a.pointer<const void>("reduce_running_var");
  p.attention_eps = a.real("attention_eps");
  p.reduce_eps = a.real("reduce_eps");
  p.tf32 = a.integer("tf32") != 0;
  return p;
}

}  // namespace ciema::cross_spatial
