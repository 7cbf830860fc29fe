// Entries of gated fusion's backward that go through maps one norm at a time. What they compute is
// in gated_fusion_gate_backward.cuh.
#include "gated_fusion_gate_backward.cuh"

#include "gated_fusion_entries.cuh"

namespace ciema {
namespace {

using namespace gated_fusion;

template <class T>
GateMaps maps_of(const Arguments& a, Layout layout) {
  return {product::map_of<T>(a, "grad_out", layout), product::map_of<T>(a, "e", layout),
          product::map_of<T>(a, "w", layout), product::map_of<T>(a, "logits", layout),
          number(a, "group_channels")};
}

// Sums of t, r and its sums
template <class T>
void gate_sums_entry(const Arguments& a) {
  with_layout(a, [&]<Layout kLayout>() {
    using L = Lanes<T, kLayout>;
    const GateSumsParams p = {maps_of<T>(a, kLayout),
                              product::map_of<T>(a, "hidden", kLayout),
                              product::map_of<T>(a, "r", kLayout),
                              norm_of(a, "1"),
                              norm_of(a, "3"),
                              a.pointer<float>("sums"),
                              a.pointer<float>("sums_r"),
                              cover_of<L>(a, "channels", "runs"),
                              cover_of<L>(a, "squeezed", "runs_r")};
    launch(a, "gated_fusion_gate_sums",
           dim3(grid_size(blocks_of<L>(p.cover) + blocks_of<L>(p.cover_r))), dim3(kThreads), 0,
           gate_sums_kernel<L>, p);
  });
}

// z and s, and the gradients of norm 3
template <class T>
void grad_logits_entry(const Arguments& a) {
  with_layout(a, [&]<Layout kLayout>() {
    using L = Lanes<T, kLayout>;
    const Cover cover = cover_of<L>(a, "channels", "runs");
    const GradLogitsParams p = {maps_of<T>(a, kLayout),
                                product::map_of<T>(a, "grad_logits", kLayout),
                                product::map_of<T>(a, "s", kLayout),
                                norm_of(a, "3"),
                                a.pointer<const float>("sums"),
                                cover.runs,
                                a.pointer<float>("affine"),
                                a.pointer<const float>("sums_r"),
                                a.pointer<float>("sum_r"),
                                number(a, "runs_r"),
                                number(a, "squeezed"),
                                a.pointer<float>("grad_weight"),
                                a.pointer<float>("grad_bias"),
                                count_of(a),
                                a.integer("training") != 0,
                                  cover};
    const int64_t count = blocks_of<L>(cover) + blocks(p.squeezed, L::kChannels);
    launch(a, "gated_fusion_grad_logits", dim3(grid_size(count)), dim3(kThreads), 0,
           grad_logits_kernel<L>, p);
  });
}

// BN1ᵀ(h), and the gradients of norm 1
template <class T>
void norm_backward_entry(const Arguments& a) {
  with_layout(a, [&]<Layout kLayout>() {
    using L = Lanes<T, kLayout>;
    const NormBackwardParams p = {product::map_of<T>(a, "hidden", kLayout),
                                  product::map_of<T>(a, "grad_relu", kLayout),
                                  product::map_of<T>(a, "grad_hidden", kLayout),
                                  norm_of(a, "1"),
                                  a.pointer<const float>("sums"),
                                  number(a, "parts"),
                                  a.pointer<float>("grad_weight"),
                                  a.pointer<float>("grad_bias"),
                                  count_of(a),
                                  a.integer("training") != 0,
                                  cover_of<L>(a, "squeezed", "runs")};
    launch(a, "gated_fusion_norm_backward", dim3(grid_size(blocks_of<L>(p.cover))), dim3(kThreads),
           0, norm_backward_kernel<L>, p);
  });
}

const Entry kEntries[] = {
    {"gated_fusion_gate_sums_float32", gate_sums_entry<float>},
    {"gated_fusion_gate_sums_float16", gate_sums_entry<__half>},
    {"gated_fusion_gate_sums_bfloat16", gate_sums_entry<__nv_bfloat16>},
    {"gated_fusion_grad_logits_float32", grad_logits_entry<float>},
    {"gated_fusion_grad_logits_float16", grad_logits_entry<__half>},
    {"gated_fusion_grad_logits_bfloat16", grad_logits_entry<__nv_bfloat16>},
    {"gated_fusion_norm_backward_float32", norm_backward_entry<float>},
    {"gated_fusion_norm_backward_float16", norm_backward_entry<__half>},
    {"gated_fusion_norm_backward_bfloat16", norm_backward_entry<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
