// Entries of cross_spatial's forward with batch statistics. The kernels and what they compute are
// in cross_spatial_training.cuh and cross_spatial_gate.cuh.
#include "cross_spatial_arguments.cuh"
#include "cross_spatial_gate.cuh"

namespace ciema {
namespace {

using namespace cross_spatial;

CrossSpatialNorm norm_of(const Arguments& a, bool attention) {
  CrossSpatialNorm norm{};
  norm.weight = a.pointer<const float>(attention ? "attention_weight" : "reduce_weight");
  norm.bias = a.pointer<const float>(attention ? "attention_bias" : "reduce_bias");
  norm.mean = a.pointer<float>(attention ? "attention_mean" : "reduce_mean");
  norm.var = a.pointer<float>(attention ? "attention_var" : "reduce_var");
  norm.eps = a.real(attention ? "attention_eps" : "reduce_eps");
  return norm;
}

CrossSpatialTrainingParams params_of(const Arguments& a) {
  CrossSpatialTrainingParams p{};
  p.sizes = sizes_of(a);
  p.packed = a.pointer<const void>("packed");
  p.vectors = a.pointer<const float>("vectors");
  p.sheets = a.pointer<void>("sheets");
  p.features = a.pointer<void>("features");
  p.reduced = a.pointer<void>("reduced");
  p.moments = a.pointer<float>("moments");
  p.reduced_moments = a.pointer<float>("reduced_moments");
  p.sums = a.pointer<float>("sums");
  p.counters = a.pointer<int>("counters");
  return p;
}

template <class T>
void branches(const Arguments& a) {
  CrossSpatialTrainingParams p = params_of(a);
  p.e = a.pointer<const void>("e");
  p.e_stride_b = a.integer("e_stride_b");
  p.map = map_of<T>(p.e, p.sizes.channels, p.e_stride_b, a.integer("e_stride_c"),
                    a.integer("e_stride_s"), a.integer("e_channels_last") != 0);
  p.alpha_h = a.pointer<const float>("alpha_h");
  p.alpha_w = a.pointer<const float>("alpha_w");
  p.mean = a.pointer<const float>("mean");
  p.rstd = a.pointer<const float>("rstd");
  p.copies_e = a.integer("copies_e") != 0;
  with_network<T>(a, [&](auto network) {
    using N = decltype(network);
    launch(a, "cross_spatial_branches", dim3(grid_size(p.sizes.slabs), p.sizes.shares),
           dim3(kTileThreads<N>), window_size<N>(1) * sizeof(T), branches_kernel<N>, p);
  });
}

template <class T>
void features(const Arguments& a) {
  CrossSpatialTrainingParams p = params_of(a);
  p.attention.mean = a.pointer<float>("attention_mean");
  p.attention.var = a.pointer<float>("attention_var");
  with_network<T>(a, [&](auto network) {
    using N = decltype(network);
    launch(a, "cross_spatial_features", dim3(grid_size(2 * p.sizes.slabs), p.sizes.shares),
           dim3(kTileThreads<N>), window_size<N>(2) * sizeof(T), features_kernel<N>, p);
  });
}

template <class T>
void reduce(const Arguments& a) {
  CrossSpatialTrainingParams p = params_of(a);
  p.attention = norm_of(a, true);
  p.reduce.mean = a.pointer<float>("reduce_mean");
  p.reduce.var = a.pointer<float>("reduce_var");
  with_network<T>(a, [&](auto network) {
    using N = decltype(network);
    launch(a, "cross_spatial_reduce", dim3(grid_size(2 * p.sizes.slabs), p.sizes.shares),
           dim3(kTileThreads<N>), 0, reduce_kernel<N>, p);
  });
}

template <class T>
void gate(const Arguments& a) {
  CrossSpatialTrainingParams p = params_of(a);
  p.reduce = norm_of(a, false);
  p.channel_feat = a.pointer<const float>("channel_feat");
  p.alpha = a.pointer<const float>("alpha");
  p.w = a.pointer<void>("w");
  p.softmax1 = a.pointer<float>("softmax1");
  p.softmax2 = a.pointer<float>("softmax2");
  with_network<T>(a, [&](auto network) {
    using N = decltype(network);
    launch(a, "cross_spatial_gate", dim3(grid_size(p.sizes.slabs), p.sizes.shares),
           dim3(kGateThreads), 0, gate_kernel<N>, p);
  });
}

const Entry kEntries[] = {
    {"cross_spatial_branches_float32", branches<float>},
    {"cross_spatial_branches_float16", branches<__half>},
    {"cross_spatial_branches_bfloat16", branches<__nv_bfloat16>},
    {"cross_spatial_features_float32", features<float>},
    {"cross_spatial_features_float16", features<__half>},
    {"cross_spatial_features_bfloat16", features<__nv_bfloat16>},
    {"cross_spatial_reduce_float32", reduce<float>},
    {"cross_spatial_reduce_float16", reduce<__half>},
    {"cross_spatial_reduce_bfloat16", reduce<__nv_bfloat16>},
    {"cross_spatial_gate_float32", gate<float>},
    {"cross_spatial_gate_float16", gate<__half>},
    {"cross_spatial_gate_bfloat16", gate<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
