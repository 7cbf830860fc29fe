// Entries that pack cross_spatial's weights for training, forward and backward.
#include "cross_spatial_arguments.cuh"
#include "cross_spatial_training_pack.cuh"

namespace ciema {
namespace {

using namespace cross_spatial;

template <class T>
void pack(const Arguments& a) {
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
  p.slabs = static_cast<int>(a.integer("counts"));
  p.channels = static_cast<int>(a.integer("group_channels"));
  const bool backward = a.integer("backward") != 0;
  with_network<T>(a, [&](auto network) {
    using N = decltype(network);
    launch(a, "cross_spatial_training_pack", dim3(kTiles + 1 + (backward ? kTiles : 0)),
           dim3(kPackThreads), 0, training_pack_kernel<N>, p);
  });
}

const Entry kEntries[] = {
    {"cross_spatial_training_pack_float32", pack<float>},
    {"cross_spatial_training_pack_float16", pack<__half>},
    {"cross_spatial_training_pack_bfloat16", pack<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
