// Entry of channel interaction: the shared product, weighed against x by the gate.
#include "product_epilogues.cuh"
#include "product_launch.cuh"

namespace ciema {
namespace {

using namespace product;

template <class T, Layout kLayout>
void launch_interaction(const Arguments& a) {
  ProductParams p{};
  p.operand[0] = operand_of<T>(a, "x", "weight", "rows", kLayout);
  p.weight_is_float = a.integer("weight_is_float") != 0;
  p.out = map_of<T>(a, "e", kLayout);
  p.rows = static_cast<int>(a.integer("rows"));
  p.pixels = static_cast<int>(a.integer("pixels"));
  const Gate<T> epilogue{a.pointer<const float>("gate"), p.operand[0].x, p.rows};
  launch_product<T, kLayout, PlainLoader>(a, "channel_interaction", p, epilogue);
}

template <class T>
void entry(const Arguments& a) {
  if (a.integer("channels_last") != 0) {
    launch_interaction<T, Layout::kChannelsLast>(a);
  } else {
    launch_interaction<T, Layout::kRows>(a);
  }
}

const Entry kEntries[] = {
    {"channel_interaction_float32", entry<float>},
    {"channel_interaction_float16", entry<__half>},
    {"channel_interaction_bfloat16", entry<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
