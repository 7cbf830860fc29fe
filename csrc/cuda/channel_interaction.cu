// Entries of channel interaction: the gate, and the product that it weighs against x.
#include "channel_interaction.cuh"

#include "product_epilogues.cuh"
#include "product_launch.cuh"

namespace ciema {
namespace {

using namespace channel_interaction;

template <class W>
void launch_gate(const Arguments& a) {
  GateParams p{};
  p.mean = a.pointer<const float>("mean");
  p.maximum = a.pointer<const float>("maximum");
  p.squeeze = a.pointer<const void>("squeeze_weight");
  p.excite = a.pointer<const void>("excite_weight");
  p.gate = a.pointer<float>("gate");
  p.channels = static_cast<int>(a.integer("channels"));
  p.hidden = static_cast<int>(a.integer("hidden"));
  p.piece = static_cast<int>(a.integer("piece"));
  p.squeeze_aligned = p.channels % Vector<W>::kElements == 0 &&
                      is_aligned(static_cast<const W*>(p.squeeze)) && is_aligned(p.mean) &&
                      is_aligned(p.maximum);
  const dim3 grid(grid_size(blocks(p.channels, p.piece)), grid_size(a.integer("batch"), kGridY));
  launch(a, "channel_interaction_gate", grid, dim3(kThreads), p.hidden * sizeof(float),
         gate_kernel<W>, p);
}

template <class T>
void gate_entry(const Arguments& a) {
  a.integer("weight_is_float") != 0 ? launch_gate<float>(a) : launch_gate<T>(a);
}

template <class T, product::Layout kLayout>
void launch_interaction(const Arguments& a) {
  product::ProductParams p{};
  p.operand[0] = product::operand_of<T>(a, "x", "weight", "rows", kLayout);
  p.weight_is_float = a.integer("weight_is_float") != 0;
  p.out = product::map_of<T>(a, "e", kLayout);
  p.rows = static_cast<int>(a.integer("rows"));
  p.pixels = static_cast<int>(a.integer("pixels"));
  const product::Gate<T> epilogue{a.pointer<const float>("gate"), p.operand[0].x, p.rows};
  product::launch_product<T, kLayout, product::PlainLoader>(a, "channel_interaction", p, epilogue);
}

template <class T>
void interaction_entry(const Arguments& a) {
  if (a.integer("channels_last") != 0) {
    launch_interaction<T, product::Layout::kChannelsLast>(a);
  } else {
    launch_interaction<T, product::Layout::kRows>(a);
  }
}

const Entry kEntries[] = {
    {"channel_interaction_gate_float32", gate_entry<float>},
    {"channel_interaction_gate_float16", gate_entry<__half>},
    {"channel_interaction_gate_bfloat16", gate_entry<__nv_bfloat16>},
    {"channel_interaction_float32", interaction_entry<float>},
    {"channel_interaction_float16", interaction_entry<__half>},
    {"channel_interaction_bfloat16", interaction_entry<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
