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

#if PLANT == 0
// out = W x, float32 whatever T
template <class T, Layout kLayout>
void plain(const Arguments& a) {
  ProductParams p = params_of<T>(a, kLayout);
  p.out = map_of<float>(a, "out", kLayout);
  launch_product<T, kLayout, PlainLoader>(a, "plain", p, Plain<float>{});
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

#endif

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

#define CIEMA_ENTRY(function, name, type) \
  {#function "_" #name, entry<function<type, Layout::kRows>, function<type, Layout::kChannelsLast>>}

const Entry kEntries[] = {
#if PLANT == 0  // a planted bug needs no more than one loader
    CIEMA_ENTRY(plain, float32, float), CIEMA_ENTRY(plain, float16, __half),
    CIEMA_ENTRY(plain, bfloat16, __nv_bfloat16), CIEMA_ENTRY(scaled_relu, float16, __half),
    CIEMA_ENTRY(scaled_relu, float32, float), CIEMA_ENTRY(fusion, float32, float),
    CIEMA_ENTRY(fusion, bfloat16, __nv_bfloat16),
#endif
    CIEMA_ENTRY(fusion, float16, __half)};

}  // namespace
}  // namespace ciema::product
