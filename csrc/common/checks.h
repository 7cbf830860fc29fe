// Legality of the channel statistics' arguments, as the CPU library checks them.
#pragma once

#include <torch/csrc/stable/device.h>

#include "layout.h"

namespace ciema {

inline void check_x(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions (B, C, H, W), got ", x.dim());
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "x must be float32, bfloat16 or float16");
  const int64_t plane = x.size(2) * x.size(3);
  STD_TORCH_CHECK(plane > 0, "x has no pixels: H = ", x.size(2), ", W = ", x.size(3));
  STD_TORCH_CHECK(plane <= std::numeric_limits<int32_t>::max(),
                  "H*W must be below 2^31, got ", plane);
}

inline void check_per_channel(const Tensor& value, const char* name, ScalarType dtype,
                              const char* dtype_name, const Tensor& x) {
  STD_TORCH_CHECK(value.dim() == 2 && value.size(0) == x.size(0) && value.size(1) == x.size(1),
                  name, " must have the shape (B, C) = (", x.size(0), ", ", x.size(1), ")");
  STD_TORCH_CHECK(value.scalar_type() == dtype, name, " must be ", dtype_name);
  STD_TORCH_CHECK(value.device() == x.device(), name, " must be on the device of x");
}

// A bad argmax would be a write outside grad_x; where it can be read cheaply (CPU) it is checked.
inline void check_backward(const Tensor& grad_mean, const Tensor& grad_max, const Tensor& argmax,
                           const Tensor& x) {
  check_x(x);
  check_per_channel(grad_mean, "grad_mean", ScalarType::Float, "float32", x);
  check_per_channel(grad_max, "grad_max", ScalarType::Float, "float32", x);
  check_per_channel(argmax, "argmax", ScalarType::Long, "int64", x);
}

}  // namespace ciema
