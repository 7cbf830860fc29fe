// Entries of the passes between the products of gated fusion's forward. What they compute is in
// gated_fusion_out.cuh.
#include "gated_fusion_out.cuh"

#include "gated_fusion_entries.cuh"

namespace ciema {
namespace {

using namespace gated_fusion;

NormSource source_of(const Arguments& a) {
  return {moments_of(a, "moments"),
          a.pointer<float>("mean"),
          a.pointer<float>("var"),
          a.pointer<const float>("weight"),
          a.pointer<const float>("bias"),
          a.real("eps")};
}

// r, and the statistics of hidden
template <class T>
void relu_entry(const Arguments& a) {
  with_layout(a, [&]<Layout kLayout>() {
    using L = Lanes<T, kLayout>;
    const ReluParams p = {product::map_of<T>(a, "hidden", kLayout),
                          product::map_of<T>(a, "r", kLayout), source_of(a),
                          a.pointer<int>("counters"), number(a, "counts"),
                          cover_of<L>(a, "squeezed", "runs")};
    launch(a, "gated_fusion_relu", dim3(grid_size(blocks_of<L>(p.cover))), dim3(kThreads), 0,
           relu_kernel<L>, p);
  });
}

// out, and the statistics of the logits
template <class T>
void out_entry(const Arguments& a) {
  with_layout(a, [&]<Layout kLayout>() {
    using L = Lanes<T, kLayout>;
    const OutParams p = {product::map_of<T>(a, "e", kLayout),
                         product::map_of<T>(a, "w", kLayout),
                         product::map_of<T>(a, "logits", kLayout),
                         product::map_of<T>(a, "out", kLayout),
                         source_of(a),
                         number(a, "group_channels"),
                         cover_of<L>(a, "channels", "runs")};
    launch(a, "gated_fusion_out", dim3(grid_size(blocks_of<L>(p.cover))), dim3(kThreads), 0,
           out_kernel<L>, p);
  });
}

// Means of out
template <class T>
void mean_entry(const Arguments& a) {
  const MeanParams p = {moments_of(a, "moments"), a.pointer<float>("mean"), number(a, "channels")};
  launch(a, "gated_fusion_mean",
         dim3(grid_size(a.integer("batch") * blocks(p.channels, kMeanChannels))), dim3(kThreads), 0,
         mean_kernel, p);
}

const Entry kEntries[] = {
    {"gated_fusion_relu_float32", relu_entry<float>},
    {"gated_fusion_relu_float16", relu_entry<__half>},
    {"gated_fusion_relu_bfloat16", relu_entry<__nv_bfloat16>},
    {"gated_fusion_out_float32", out_entry<float>},
    {"gated_fusion_out_float16", out_entry<__half>},
    {"gated_fusion_out_bfloat16", out_entry<__nv_bfloat16>},
    {"gated_fusion_mean_float32", mean_entry<float>},
    {"gated_fusion_mean_float16", mean_entry<__half>},
    {"gated_fusion_mean_bfloat16", mean_entry<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
