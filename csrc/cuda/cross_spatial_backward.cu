// Entries of the first half of cross_spatial's backward. The kernels and what they compute are in
// cross_spatial_backward.cuh.
#include "cross_spatial_backward.cuh"

#include "cross_spatial_backward_arguments.cuh"

namespace ciema {
namespace {

using namespace cross_spatial;

template <class T>
void recompute(const Arguments& a) {
  with_network<T>(a, [&](auto network) {
    using N = decltype(network);
    const CrossSpatialBackwardParams p = backward_params_of<N>(a);
    launch(a, "cross_spatial_recompute", dim3(grid_size(2 * p.sizes.slabs), p.sizes.shares),
           dim3(kTileThreads<N>), window_size<N>(2) * sizeof(T), recompute_kernel<N>, p);
  });
}

void vectors(const Arguments& a) {
  with_network<float>(a, [&](auto network) {
    using N = decltype(network);
    launch(a, "cross_spatial_vectors", dim3(grid_size(a.integer("groups"))), dim3(kVectorThreads),
           0, vectors_kernel<N::kChannels>, backward_params_of<N>(a));
  });
}

template <class T>
void attention(const Arguments& a) {
  with_network<T>(a, [&](auto network) {
    using N = decltype(network);
    const CrossSpatialBackwardParams p = backward_params_of<N>(a);
    launch(a, "cross_spatial_attention_backward",
           dim3(grid_size(2 * p.sizes.slabs), p.sizes.shares), dim3(kTileThreads<N>), 0,
           attention_backward_kernel<N>, p);
  });
}

template <class T>
void features(const Arguments& a) {
  with_network<T>(a, [&](auto network) {
    using N = decltype(network);
    const CrossSpatialBackwardParams p = backward_params_of<N>(a);
    launch(a, "cross_spatial_features_backward",
           dim3(grid_size(2 * p.sizes.slabs), p.sizes.shares), dim3(kTileThreads<N>), 0,
           features_backward_kernel<N>, p);
  });
}

const Entry kEntries[] = {
    {"cross_spatial_recompute_float32", recompute<float>},
    {"cross_spatial_recompute_float16", recompute<__half>},
    {"cross_spatial_recompute_bfloat16", recompute<__nv_bfloat16>},
    {"cross_spatial_vectors_float32", vectors},
    {"cross_spatial_vectors_float16", vectors},
    {"cross_spatial_vectors_bfloat16", vectors},
    {"cross_spatial_attention_backward_float32", attention<float>},
    {"cross_spatial_attention_backward_float16", attention<__half>},
    {"cross_spatial_attention_backward_bfloat16", attention<__nv_bfloat16>},
    {"cross_spatial_features_backward_float32", features<float>},
    {"cross_spatial_features_backward_float16", features<__half>},
    {"cross_spatial_features_backward_bfloat16", features<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
