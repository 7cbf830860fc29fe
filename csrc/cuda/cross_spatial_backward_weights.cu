// Entries of the gradients of cross_spatial's weights. The kernels and what they compute are in
// cross_spatial_backward_weights.cuh.
#include "cross_spatial_backward_weights.cuh"

#include "cross_spatial_arguments.cuh"

namespace ciema {
namespace {

using namespace cross_spatial;

CrossSpatialWeightsParams params_of(const Arguments& a) {
  CrossSpatialWeightsParams p{};
  p.sizes = sizes_of(a);
  p.inputs = a.pointer<const void>("inputs");
  p.gradients = a.pointer<const void>("gradients");
  p.rows = static_cast<int>(a.integer("rows"));
  p.gradient_parts = static_cast<int>(a.integer("gradient_parts"));
  p.partials = a.pointer<float>("partials");
  return p;
}

template <class N, bool kNetwork>
void launch_taps(const Arguments& a) {
  using T = typename N::T;
  using Rows = TapRows<kNetwork>;
  constexpr int elements =
      window_size<N>(Rows::kRadius) + Rows::kParts * kTilePixels * kGradientPitch<T>;
  static_assert(elements * sizeof(T) <= 99 * 1024, "shared memory of a block on sm_86");
  launch(a, kNetwork ? "cross_spatial_taps_of_network" : "cross_spatial_taps_of_map",
         dim3(grid_size(a.integer("walkers")), N::kChannels / kOutputs, N::kChannels / kInputs),
         dim3(Rows::kThreads), elements * sizeof(T), taps_kernel<N, kNetwork>, params_of(a));
}

template <class T>
void taps(const Arguments& a) {
  with_network<T>(a, [&](auto network) {
    if (a.integer("network") != 0) {
      launch_taps<decltype(network), true>(a);
    } else {
      launch_taps<decltype(network), false>(a);
    }
  });
}

template <class T>
void pointwise(const Arguments& a) {
  with_network<T>(a, [&](auto network) {
    using N = decltype(network);
    launch(a, "cross_spatial_pointwise",
           dim3(grid_size(a.integer("walkers")),
                static_cast<unsigned>(a.integer("gradient_parts"))),
           dim3(kPointThreads), PointShape<N>::kElements * sizeof(T), pointwise_kernel<N>,
           params_of(a));
  });
}

const Entry kEntries[] = {
    {"cross_spatial_taps_float32", taps<float>},
    {"cross_spatial_taps_float16", taps<__half>},
    {"cross_spatial_taps_bfloat16", taps<__nv_bfloat16>},
    {"cross_spatial_pointwise_float32", pointwise<float>},
    {"cross_spatial_pointwise_float16", pointwise<__half>},
    {"cross_spatial_pointwise_bfloat16", pointwise<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
