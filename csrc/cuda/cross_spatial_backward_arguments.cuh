// From an entry's arguments to the parameters of cross_spatial's backward kernels.
#pragma once

#include "cross_spatial_arguments.cuh"
#include "cross_spatial_backward.cuh"

namespace ciema::cross_spatial {

template <class N>
CrossSpatialBackwardParams backward_params_of(const Arguments& a) {
  CrossSpatialBackwardParams p{};
  p.sizes = sizes_of(a);
  p.packed = a.pointer<const void>("packed");
  if (p.packed != nullptr) {
    p.transposed = static_cast<const char*>(p.packed) + N::Packed::kBytes;
  }
  p.grad_w = a.pointer<const void>("grad_w");
  p.w = a.pointer<const void>("w");
  p.attention = {a.pointer<const float>("attention_weight"),
                 a.pointer<const float>("attention_bias"), a.pointer<float>("attention_mean"),
                 a.pointer<float>("attention_var"), a.real("attention_eps")};
  p.reduce = {a.pointer<const float>("reduce_weight"), a.pointer<const float>("reduce_bias"),
              a.pointer<float>("reduce_mean"), a.pointer<float>("reduce_var"),
              a.real("reduce_eps")};
  p.channel_feat = a.pointer<const float>("channel_feat");
  p.alpha = a.pointer<const float>("alpha");
  p.softmax1 = a.pointer<const float>("softmax1");
  p.softmax2 = a.pointer<const float>("softmax2");
  p.batch = a.integer("batch_statistics") != 0;
  p.count = static_cast<float>(a.integer("count"));
  p.sheets = a.pointer<const void>("sheets");
  p.features = a.pointer<void>("features");
  p.reduced = a.pointer<void>("reduced");
  p.weighted = a.pointer<void>("weighted");
  p.grad_features = a.pointer<void>("grad_features");
  p.grad_sheets = a.pointer<void>("grad_sheets");
  p.sums = a.pointer<float>("sums");
  p.gradient_vectors = a.pointer<float>("gradient_vectors");
  p.reduce_totals = a.pointer<float>("reduce_totals");
  p.group_partials = a.pointer<float>("group_partials");
  p.norm_sums = a.pointer<float>("norm_sums");
  p.attention_totals = a.pointer<float>("attention_totals");
  p.counters = a.pointer<int>("counters");
  return p;
}

}  // namespace ciema::cross_spatial
