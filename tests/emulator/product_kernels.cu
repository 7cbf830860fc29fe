// The shared product with every loader, epilogue and reduction that it offers, for its tests.
#include "../../csrc/cuda/product_epilogues.cuh"
#include "../../csrc/cuda/product_launch.cuh"

namespace ciema::product {
namespace {

template <class T>
ProductParams params_of(const Arguments& a, Layout layout) {
  ProductParams p{};
  p.operand[0] = operand_of<T>(a, "x", "weight", "channels", layout);
  p.weight_is_float = a.integer("weight_is_float") != 0;
  p.partials = a.pointer<float>("partials");
  p.rows = static_cast<int>(a.integer("rows"));
  p.pixels = static_cast<int>(a.integer("pixels"));
  return p;
}

template <class T>
void add_scale(const Arguments& a, Layout layout, ProductParams& p) {
  p.scale = map_of<T>(a, "w", layout);
  p.scale_width = static_cast<int>(a.integer("width"));
}

Norm norm_of(const Arguments& a) {
  return {a.pointer<const float>("gamma"), a.pointer<const float>("beta"),
          a.pointer<const float>("mean"), a.pointer<const float>("var"), a.real("eps")};
}

// out = W x, float32 whatever T
template <class T, Layout kLayout>
void plain(const Arguments& a) {
  ProductParams p = params_of<T>(a, kLayout);
  p.out = map_of<float>(a, "out", kLayout);
  launch_product<T, kLayout, PlainLoader>(a, "plain", p, Plain<float>{});
}

// out = a x + (1 − a) W x
template <class T, Layout kLayout>
void gate(const Arguments& a) {
  ProductParams p = params_of<T>(a, kLayout);
  p.out = map_of<T>(a, "out", kLayout);
  const Gate<T> epilogue{a.pointer<const float>("gate"), p.operand[0].x, p.rows};
  launch_product<T, kLayout, PlainLoader>(a, "gate", p, epilogue);
}

// out = relu(norm(W (x w))), with the moments of its tiles
template <class T, Layout kLayout>
void scaled_relu(const Arguments& a) {
  ProductParams p = params_of<T>(a, kLayout);
  add_scale<T>(a, kLayout, p);
  p.out = map_of<T>(a, "out", kLayout);
  const NormRelu<T, Reduction::kMoments> epilogue{norm_of(a)};
  launch_product<T, kLayout, ScaledLoader>(a, "scaled_relu", p, epilogue);
}

// out = φ x + (1 − φ) s, s = x w, φ = σ(norm(W [s; r])), with the sums of its tiles
template <class T, Layout kLayout>
void fusion(const Arguments& a) {
  ProductParams p = params_of<T>(a, kLayout);
  add_scale<T>(a, kLayout, p);
  p.operand[1] = operand_of<T>(a, "r", "weight1", "channels1", kLayout);
  p.out = map_of<T>(a, "out", kLayout);
  const NormGate<T, Reduction::kSums> epilogue{norm_of(a), p.operand[0].x, p.scale,
                                               p.scale_width};
  launch_product<T, kLayout, ScaledThenPlainLoader>(a, "fusion", p, epilogue);
}

template <void (*kRows)(const Arguments&), void (*kChannelsLast)(const Arguments&)>
void entry(const Arguments& a) {
  a.integer("channels_last") != 0 ? kChannelsLast(a) : kRows(a);
}

#define CIEMA_ENTRIES(function)                                                          \
  {#function "_float32", entry<function<float, Layout::kRows>,                           \
                               function<float, Layout::kChannelsLast>>},                 \
      {#function "_float16", entry<function<__half, Layout::kRows>,                      \
                                   function<__half, Layout::kChannelsLast>>},            \
      {#function "_bfloat16", entry<function<__nv_bfloat16, Layout::kRows>,              \
                                    function<__nv_bfloat16, Layout::kChannelsLast>>}

const Entry kEntries[] = {CIEMA_ENTRIES(plain), CIEMA_ENTRIES(gate), CIEMA_ENTRIES(scaled_relu),
                          CIEMA_ENTRIES(fusion)};

}  // namespace
}  // namespace ciema::product
