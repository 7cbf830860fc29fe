// Entries of coordinate attention: which kernel, on which grid. The kernels and what they compute
// are in coordinate_attention_kernels.cuh.
#include "coordinate_attention_kernels.cuh"
#include "cross_spatial_pack_arguments.cuh"
#include "launch.cuh"

namespace ciema {
namespace {

using namespace coordinate;

CoordinateAttentionParams params_of(const Arguments& a, bool channels_last) {
  CoordinateAttentionParams p{};
  p.e = a.pointer<const void>("e");
  p.grad_e = a.pointer<void>("grad_e");
  p.weight = a.pointer<const float>("weight");
  p.bias = a.pointer<const float>("bias");
  p.alpha_h = a.pointer<float>("alpha_h");
  p.alpha_w = a.pointer<float>("alpha_w");
  p.mean = a.pointer<float>("mean");
  p.rstd = a.pointer<float>("rstd");
  p.saved_alpha_h = a.pointer<const float>("saved_alpha_h");
  p.saved_alpha_w = a.pointer<const float>("saved_alpha_w");
  p.saved_mean = a.pointer<const float>("saved_mean");
  p.saved_rstd = a.pointer<const float>("saved_rstd");
  p.grad_alpha_h = a.pointer<const float>("grad_alpha_h");
  p.grad_alpha_w = a.pointer<const float>("grad_alpha_w");
  p.grad_mean = a.pointer<const float>("grad_mean");
  p.grad_rstd = a.pointer<const float>("grad_rstd");
  p.partials = a.pointer<float>("partials");
  p.tables = a.pointer<float>("tables");
  p.slabs = static_cast<int>(a.integer("slabs"));
  p.groups = static_cast<int>(a.integer("groups"));
  p.channels = static_cast<int>(a.integer("group_channels"));
  p.height = static_cast<int>(a.integer("height"));
  p.width = static_cast<int>(a.integer("width"));
  p.stride_b = a.integer("e_stride_b");
  p.stride = a.integer(channels_last ? "e_stride_s" : "e_stride_c");
  p.stride_group = a.integer("e_stride_c") * p.channels;
  return p;
}

// Whether all packs of kVector elements of a map are 16-byte aligned, and none is cut.
template <class T>
bool takes_vectors(const CoordinateAttentionParams& p, const void* map, int64_t stride_b,
                   int64_t stride, bool channels_last) {
  constexpr int kVector = Vector<T>::kElements;
  const auto* address = static_cast<const T*>(map);
  const int run = channels_last ? p.channels : p.width;
  return run % kVector == 0 && is_aligned(address, stride_b) && is_aligned(address, stride);
}

template <class T, bool kForward, bool kChannelsLast, int kVector>
void launch_slabs(const Arguments& a, const CoordinateAttentionParams& p) {
  const int tables = kForward ? kForwardTables : kBackwardTables;
  int floats = round_up(workspace_size(p.channels), 4);
  if (p.tables == nullptr) {
    floats += tables * table_size(kChannelsLast, p.channels, p.height + p.width);
  }
  if constexpr (kForward) {
    const bool packs = a.pointer<void>("packed") != nullptr;
    const auto pack = packs ? cross_spatial::pack_params_of(a, false) : CrossSpatialPackParams{};
    const int own = floats * static_cast<int>(sizeof(float));
    const int other = packs ? cross_spatial::pack_bytes<T>(pack.padded) : 0;
    const int64_t grid = int64_t{p.slabs} + (packs ? cross_spatial::kTiles + 1 : 0);
    launch(a, "coordinate_attention", dim3(grid_size(grid)), dim3(kThreads),
           own > other ? own : other, forward_kernel<T, kChannelsLast, kVector>, p, pack);
  } else {
    launch(a, "coordinate_attention_backward", dim3(grid_size(p.slabs)), dim3(kThreads),
           floats * sizeof(float), backward_kernel<T, kChannelsLast, kVector>, p);
  }
}

template <class T, bool kForward, bool kChannelsLast>
void entry_of_layout(const Arguments& a) {
  CoordinateAttentionParams p = params_of(a, kChannelsLast);
  bool vectors = takes_vectors<T>(p, p.e, p.stride_b, p.stride, kChannelsLast);
  if constexpr (kForward) {
    p.eps = a.real("eps");
  } else {
    p.grad_stride_b = a.integer("grad_stride_b");
    p.grad_stride = a.integer(kChannelsLast ? "grad_stride_s" : "grad_stride_c");
    p.grad_stride_group = a.integer("grad_stride_c") * p.channels;
    vectors =
        vectors && takes_vectors<T>(p, p.grad_e, p.grad_stride_b, p.grad_stride, kChannelsLast);
  }
  if (vectors) {
    launch_slabs<T, kForward, kChannelsLast, Vector<T>::kElements>(a, p);
  } else {
    launch_slabs<T, kForward, kChannelsLast, 1>(a, p);
  }
}

template <class T, bool kForward>
void entry(const Arguments& a) {
  if (a.integer("e_channels_last") != 0) {
    entry_of_layout<T, kForward, true>(a);
  } else {
    entry_of_layout<T, kForward, false>(a);
  }
}

const Entry kEntries[] = {
    {"coordinate_attention_float32", entry<float, true>},
    {"coordinate_attention_float16", entry<__half, true>},
    {"coordinate_attention_bfloat16", entry<__nv_bfloat16, true>},
    {"coordinate_attention_backward_float32", entry<float, false>},
    {"coordinate_attention_backward_float16", entry<__half, false>},
    {"coordinate_attention_backward_bfloat16", entry<__nv_bfloat16, false>},
};

}  // namespace
}  // namespace ciema
