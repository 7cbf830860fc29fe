// Entry of multi-scale fusion: a map's product at its own size, z's moments, or out.
#include "msff.cuh"

#include "product_launch.cuh"

namespace ciema {
namespace {

using namespace msff;

// What is made is what the caller gives room for: `product`, `partials`, or `out` and, if its
// channel statistics are wanted, `extremes` and `positions`.
template <class T, Layout kLayout>
void launch_fuse(const Arguments& a) {
  ProductParams p{};
  p.operand[0] = operand_of<T>(a, "x", "weight", "channels", kLayout);
  p.weight_is_float = a.integer("weight_is_float") != 0;
  p.rows = static_cast<int>(a.integer("rows"));
  p.pixels = static_cast<int>(a.integer("pixels"));
  p.partials = a.pointer<float>("partials");
  p.extremes = a.pointer<float>("extremes");
  p.positions = a.pointer<int>("positions");
  Fuse<T> epilogue{};
  epilogue.out = map_of<float>(a, "product", kLayout);
  epilogue.make = Make::kProduct;
  if (p.partials != nullptr) epilogue.make = Make::kMoments;
  if (a.pointer<T>("out") != nullptr) {
    epilogue.make = Make::kOut;
    epilogue.out = map_of<T>(a, "out", kLayout);
  }
  epilogue.count = static_cast<int>(a.integer("products"));
  if (epilogue.count > kMostProducts) fail_launch("msff", "too many maps");
  for (int i = 0; i < epilogue.count; ++i) {
    const char index[2] = {static_cast<char>('0' + i), '\0'};
    epilogue.native[i] = {map_of<float>(a, Name("product", index).text, kLayout),
                          static_cast<int>(a.integer(Name("height", index).text)),
                          static_cast<int>(a.integer(Name("width", index).text))};
  }
  epilogue.height = static_cast<int>(a.integer("height"));
  epilogue.width = static_cast<int>(a.integer("width"));
  epilogue.norm = {a.pointer<const float>("gamma"), a.pointer<const float>("beta"),
                   a.pointer<const float>("mean"), a.pointer<const float>("var"), a.real("eps")};
  launch_product<T, kLayout, PlainLoader>(a, "msff", p, epilogue);
}

template <class T>
void entry(const Arguments& a) {
  if (a.integer("channels_last") != 0) {
    launch_fuse<T, Layout::kChannelsLast>(a);
  } else {
    launch_fuse<T, Layout::kRows>(a);
  }
}

const Entry kEntries[] = {
    {"msff_float32", entry<float>},
    {"msff_float16", entry<__half>},
    {"msff_bfloat16", entry<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
