// How a tensor x (B, C, H, W) lies in memory, as the channel statistics see it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>

namespace ciema {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Layout { kRows, kChannelsLast };

struct Planes {
  Layout layout;
  int64_t batch, channels, plane;        // plane = H*W
  int64_t stride_b, stride_c, stride_s;  // in elements; stride_s from pixel to pixel
};

// stride_s when the H*W pixels of a plane are evenly spaced in row-major order, else -1.
inline int64_t pixel_stride(const Tensor& x) {
  const int64_t height = x.size(2), width = x.size(3);
  const int64_t stride_h = x.stride(2), stride_w = x.stride(3);
  if (height == 1 && width == 1) return 1;
  if (width == 1) return stride_h;
  if (height == 1 || stride_h == width * stride_w) return stride_w;
  return -1;
}

inline bool readable_in_place(const Tensor& x) {
  const int64_t stride_s = pixel_stride(x);
  return stride_s == 1 || (stride_s >= 0 && (x.stride(1) == 1 || x.size(1) == 1));
}

// x must be readable_in_place.
inline Planes planes_of(const Tensor& x) {
  const int64_t plane = x.size(2) * x.size(3);
  const int64_t stride_s = pixel_stride(x);
  // A single pixel is a row of length 1: channels_last reads many channels at once instead.
  const bool rows = stride_s == 1 && !(plane == 1 && x.stride(1) == 1);
  return {rows ? Layout::kRows : Layout::kChannelsLast, x.size(0), x.size(1), plane, x.stride(0),
          x.stride(1), stride_s};
}

// The memory format of grad_x: channels_last if x is that and not contiguous, else contiguous.
// As in torch, a dimension of size 1 may have any stride.
inline MemoryFormat memory_format_of(const Tensor& x) {
  if (x.is_contiguous()) return MemoryFormat::Contiguous;
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return MemoryFormat::Contiguous;
    expected *= x.size(dim);
  }
  return MemoryFormat::ChannelsLast;
}

inline Tensor empty_per_channel(const Tensor& x, ScalarType dtype) {
  return torch::stable::empty({x.size(0), x.size(1)}, dtype, std::nullopt, x.device());
}

}  // namespace ciema
