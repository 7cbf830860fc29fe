// From an entry's arguments to a launch of the shared product (product.cuh).
#pragma once

#include "launch.cuh"
#include "product.cuh"

namespace ciema::product {

// "<name><suffix>" in a buffer, for arguments that belong to a map.
struct Name {
  char text[64];
  Name(const char* name, const char* suffix) {
    const size_t length = strlen(name), more = strlen(suffix);
    if (length + more >= sizeof(text)) fail_launch(name, "the argument's name is too long");
    memcpy(text, name, length);
    memcpy(text + length, suffix, more + 1);
  }
};

// The map `name` of T and its `<name>_stride_b`, `…_c`, `…_s`; no data when it was not given.
template <class T>
Map map_of(const Arguments& a, const char* name, Layout layout) {
  Map map{};
  const T* data = a.pointer<const T>(name);
  if (data == nullptr) return map;
  map.data = const_cast<T*>(data);
  map.stride_b = a.integer(Name(name, "_stride_b").text);
  map.stride_c = a.integer(Name(name, "_stride_c").text);
  map.stride_s = a.integer(Name(name, "_stride_s").text);
  const int64_t across = layout == Layout::kRows ? map.stride_c : map.stride_s;
  map.aligned = is_aligned(data, map.stride_b) && is_aligned(data, across);
  return map;
}

// W's columns for one operand: `<weight>` and `<weight>_stride`, of T or, with the integer
// `weight_is_float`, of float32.
template <class T>
Operand operand_of(const Arguments& a, const char* x, const char* weight, const char* channels,
                   Layout layout) {
  Operand operand{};
  operand.channels = static_cast<int>(a.integer(channels));
  if (operand.channels == 0) return operand;
  operand.x = map_of<T>(a, x, layout);
  operand.weight = a.pointer<const void>(weight);
  operand.weight_stride = a.integer(Name(weight, "_stride").text);
  operand.weight_aligned =
      a.integer("weight_is_float") != 0
          ? is_aligned(static_cast<const float*>(operand.weight), operand.weight_stride)
          : is_aligned(static_cast<const T*>(operand.weight), operand.weight_stride);
  return operand;
}

template <class T, Precision kPrecision, Layout kLayout, class Shape, class Loading, class Epilogue>
void launch_tile(const Arguments& a, const char* name, ProductParams p, const Epilogue& epilogue) {
  p.row_tiles = static_cast<int>(blocks(p.rows, Shape::kM));
  p.pixel_tiles = static_cast<int>(blocks(p.pixels, Shape::kN));
  const int64_t count = a.integer("batch") * p.row_tiles * p.pixel_tiles;
  launch(a, name, dim3(grid_size(count)), dim3(Shape::kThreads),
         shared_bytes<T, kPrecision, kLayout, Shape, Loading, Epilogue>(),
         product_kernel<T, kPrecision, kLayout, Shape, Loading, Epilogue>, p, epilogue);
}

// The integer `tile` names the shape (fused/backends/cuda/product.py chooses it): 0 narrow, 1
// medium, 2 wide; `tf32` lets the wide one round float32 operands so.
template <class T, Layout kLayout, class Loading, class Epilogue>
void launch_product(const Arguments& a, const char* name, const ProductParams& p,
                    const Epilogue& epilogue) {
  constexpr Precision kExact = Precision::kSplit;
  switch (a.integer("tile")) {
    case 0:
      return launch_tile<T, kExact, kLayout, NarrowTile, Loading>(a, name, p, epilogue);
    case 1:
      return launch_tile<T, kExact, kLayout, MediumTile, Loading>(a, name, p, epilogue);
    case 2:
      if constexpr (sizeof(T) == sizeof(float)) {
        if (a.integer("tf32") != 0) {
          return launch_tile<T, Precision::kTf32, kLayout, WideTile, Loading>(a, name, p, epilogue);
        }
      }
      return launch_tile<T, kExact, kLayout, WideTile, Loading>(a, name, p, epilogue);
    default:
      fail_launch(name, "no such tile");
  }
}

}  // namespace ciema::product
