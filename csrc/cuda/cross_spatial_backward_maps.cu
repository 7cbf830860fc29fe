// Entries of cross_spatial's backward for X, e and its vectors. The kernels and what they compute
// are in cross_spatial_backward_maps.cuh.
#include "cross_spatial_backward_arguments.cuh"
#include "cross_spatial_backward_maps.cuh"

namespace ciema {
namespace {

using namespace cross_spatial;

template <class T>
void inputs(const Arguments& a) {
  with_network<T>(a, [&](auto network) {
    using N = decltype(network);
    const CrossSpatialBackwardParams p = backward_params_of<N>(a);
    launch(a, "cross_spatial_inputs_backward", dim3(grid_size(2 * p.sizes.slabs), p.sizes.shares),
           dim3(kTileThreads<N>), window_size<N>(2) * sizeof(T), inputs_backward_kernel<N>, p);
  });
}

template <class T>
void branches(const Arguments& a) {
  CrossSpatialBranchesBackwardParams p{};
  p.sizes = sizes_of(a);
  p.e = a.pointer<const void>("e");
  p.grad_e = a.pointer<void>("grad_e");
  p.e_stride_b = a.integer("e_stride_b");
  p.grad_stride_b = a.integer("grad_stride_b");
  p.map = map_of<T>(p.e, p.sizes.channels, p.e_stride_b, a.integer("e_stride_c"),
                    a.integer("e_stride_s"), a.integer("e_channels_last") != 0);
  p.grad_map = map_of<T>(p.grad_e, p.sizes.channels, p.grad_stride_b, a.integer("grad_stride_c"),
                         a.integer("grad_stride_s"), a.integer("grad_channels_last") != 0);
  p.grad_sheets = a.pointer<const void>("grad_sheets");
  p.alpha_h = a.pointer<const float>("alpha_h");
  p.alpha_w = a.pointer<const float>("alpha_w");
  p.mean = a.pointer<const float>("mean");
  p.rstd = a.pointer<const float>("rstd");
  p.gn_weight = a.pointer<const float>("gn_weight");
  p.grad_alpha_h = a.pointer<float>("grad_alpha_h");
  p.grad_alpha_w = a.pointer<float>("grad_alpha_w");
  p.grad_mean = a.pointer<float>("grad_mean");
  p.grad_rstd = a.pointer<float>("grad_rstd");
  p.partials = a.pointer<float>("partials");
  with_network<T>(a, [&](auto network) {
    using N = decltype(network);
    p.transposed = a.pointer<const char>("packed") + N::Packed::kBytes;
    launch(a, "cross_spatial_branches_backward", dim3(grid_size(p.sizes.slabs)),
           dim3(kTileThreads<N>),
           branches_first_bytes<N>() + kTilePixels * N::kPitch * sizeof(T),
           branches_backward_kernel<N>, p);
  });
}

const Entry kEntries[] = {
    {"cross_spatial_inputs_backward_float32", inputs<float>},
    {"cross_spatial_inputs_backward_float16", inputs<__half>},
    {"cross_spatial_inputs_backward_bfloat16", inputs<__nv_bfloat16>},
    {"cross_spatial_branches_backward_float32", branches<float>},
    {"cross_spatial_branches_backward_float16", branches<__half>},
    {"cross_spatial_branches_backward_bfloat16", branches<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
