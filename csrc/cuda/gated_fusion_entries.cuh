// From the arguments of gated fusion's entries to the parameters of its kernels.
#pragma once

#include "gated_fusion.cuh"
#include "product_launch.cuh"

namespace ciema {
namespace gated_fusion {

inline int number(const Arguments& a, const char* name) {
  return static_cast<int>(a.integer(name));
}

// Values of a channel.
inline float count_of(const Arguments& a) {
  return static_cast<float>(a.integer("batch") * a.integer("pixels"));
}

// Norm 1, 2 or 3: `weight1`, `bias1`, `mean1`, `var1`, `eps1`; null without its weight.
inline Norm norm_of(const Arguments& a, const char* which) {
  using product::Name;
  const float* weight = a.pointer<const float>(Name("weight", which).text);
  if (weight == nullptr) return {};
  return {{weight, a.pointer<const float>(Name("bias", which).text),
           a.pointer<const float>(Name("mean", which).text),
           a.pointer<const float>(Name("var", which).text), a.real(Name("eps", which).text)}};
}

// A 1×1 convolution's weight (O, I), contiguous, from column `first` on; its depth is I.
template <class T>
matrix::Matrix weight_of(const Arguments& a, const char* name, int64_t columns, int64_t first = 0) {
  const bool is_float = sizeof(T) == sizeof(float) || a.integer("weight_is_float") != 0;
  const int64_t size = is_float ? sizeof(float) : sizeof(T);
  return {a.pointer<const char>(name) + first * size, columns, 1, is_float};
}

// The same with lines and depth exchanged.
inline matrix::Matrix transposed(const matrix::Matrix& m) {
  return {m.data, m.stride_depth, m.stride_line, m.is_float};
}

inline bool has(const Arguments& a, const char* name) {
  return a.pointer<const void>(name) != nullptr;
}

// A product of `x0` (times `w`, if it is `scaled`) and of `x1`, if given, with their weights.
template <class T>
product::ProductParams product_of(const Arguments& a, Layout layout) {
  product::ProductParams p{};
  p.operand[0] = product::operand_of<T>(a, "x0", "weight_of_x0", "channels0", layout);
  if (has(a, "x1")) {
    p.operand[1] = product::operand_of<T>(a, "x1", "weight_of_x1", "channels1", layout);
  }
  if (a.integer("scaled") != 0) p.scale = product::map_of<T>(a, "w", layout);
  p.scale_width = number(a, "group_channels");
  p.weight_is_float = a.integer("weight_is_float") != 0;
  p.partials = a.pointer<float>("partials");
  p.rows = number(a, "rows");
  p.pixels = number(a, "pixels");
  return p;
}

template <class T, product::Reduction kReduce>
Epilogue<T, kReduce> epilogue_of(const Arguments& a, Layout layout) {
  Epilogue<T, kReduce> epilogue{};
  epilogue.finish = static_cast<Finish>(a.integer("finish"));
  epilogue.norm = norm_of(a, "");
  epilogue.scale = a.pointer<const float>("scale");
  epilogue.shift = a.pointer<const float>("shift");
  epilogue.out = product::map_of<T>(a, "out", layout);
  epilogue.other = product::map_of<T>(a, has(a, "other") ? "other" : "x0", layout);
  epilogue.w = product::map_of<T>(a, "w", layout);
  epilogue.group_channels = number(a, "group_channels");
  epilogue.partner = product::map_of<T>(a, "partner", layout);
  epilogue.partner_mean = a.pointer<const float>("partner_mean");
  return epilogue;
}

template <class T>
FoldParams fold_of(const Arguments& a) {
  const int64_t channels = a.integer("channels"), squeezed = a.integer("squeezed");
  return {weight_of<T>(a, "fusion", 2 * channels, channels),
          transposed(weight_of<T>(a, "expand", squeezed)),
          norm_of(a, "2"),
          norm_of(a, "3"),
          a.pointer<void>("combined"),
          a.pointer<float>("bias_of_r"),
          static_cast<int>(channels),
          static_cast<int>(squeezed)};
}

// Calls function.operator()<Layout>() for the layout that the arguments name.
template <class Function>
void with_layout(const Arguments& a, Function function) {
  if (a.integer("channels_last") != 0) {
    function.template operator()<Layout::kChannelsLast>();
  } else {
    function.template operator()<Layout::kRows>();
  }
}

// Calls function.operator()<Precision>() for what float32 products may do.
template <class T, class Function>
void with_precision(const Arguments& a, Function function) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (a.integer("tf32") != 0) {
      function.template operator()<Precision::kTf32>();
      return;
    }
  }
  function.template operator()<Precision::kSplit>();
}

// Blocks over a map of `channels`; the caller says how many go along the pixels.
template <class L>
Cover cover_of(const Arguments& a, const char* channels, const char* runs) {
  Cover cover{};
  cover.batch = number(a, "batch");
  cover.channels = number(a, channels);
  cover.pixels = number(a, "pixels");
  cover.tiles = static_cast<int>(blocks(cover.pixels, L::kTile));
  cover.runs = number(a, runs);
  cover.run = static_cast<int>(blocks(int64_t{cover.batch} * cover.tiles, cover.runs));
  return cover;
}

template <class L>
int64_t blocks_of(const Cover& cover) {
  return cover.runs * blocks(cover.channels, L::kChannels);
}

// Moments of the tiles of a product's result of this many pixels.
inline TileMoments moments_of(const Arguments& a, const char* name) {
  TileMoments moments{};
  moments.data = a.pointer<const float>(name);
  if (moments.data == nullptr) return moments;
  moments.pixels = number(a, "pixels");
  moments.tile_pixels = Shape<float>::kN;
  moments.tiles = static_cast<int>(blocks(moments.pixels, moments.tile_pixels));
  moments.parts = number(a, "batch") * moments.tiles;
  return moments;
}

template <class T, Precision kPrecision, Layout kLayout, product::Reduction kReduce>
void launch_product(const Arguments& a, const char* name, const FoldParams& folding) {
  using Tile = Shape<T>;
  using Kernel = Epilogue<T, kReduce>;
  product::ProductParams p{};
  Kernel epilogue{};
  if (has(a, "x0")) {
    p = product_of<T>(a, kLayout);
    epilogue = epilogue_of<T, kReduce>(a, kLayout);
  }
  p.row_tiles = static_cast<int>(blocks(p.rows, Tile::kM));
  p.pixel_tiles = static_cast<int>(blocks(p.pixels, Tile::kN));
  const int64_t product_blocks =
      has(a, "x0") ? a.integer("batch") * p.row_tiles * p.pixel_tiles : 0;
  const int64_t fold_blocks = folding.combined == nullptr ? 0 : folding.blocks(Tile::kThreads);
  constexpr int kOfProduct = product::shared_bytes<T, kPrecision, kLayout, Tile,
                                                   product::ScaledThenPlainLoader, Kernel>();
  constexpr int kOfFold = FoldProduct<T, kPrecision, Tile::kThreads>::kBytes;
  launch(a, name, dim3(grid_size(product_blocks + fold_blocks)), dim3(Tile::kThreads),
         kOfProduct > kOfFold ? kOfProduct : kOfFold,
         product_kernel<T, kPrecision, kLayout, kReduce>, p, epilogue,
         static_cast<int>(product_blocks), folding,
         Statistics{a.pointer<int>("counters"), a.pointer<float>("mean_of_out"),
                    a.pointer<float>("var_of_out"), moments_of(a, "partials")});
}

template <class T, product::Reduction kReduce>
void product_entry(const Arguments& a, const char* name) {
  const FoldParams folding = has(a, "combined") ? fold_of<T>(a) : FoldParams{};
  with_layout(a, [&]<Layout kLayout>() {
    with_precision<T>(a, [&]<Precision kPrecision>() {
      launch_product<T, kPrecision, kLayout, kReduce>(a, name, folding);
    });
  });
}

}  // namespace gated_fusion
}  // namespace ciema
