// The element types of maps, as the kernels' tables are indexed.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "simd/channel_statistics.h"

namespace ciema::cpu {

inline Element element_of(const torch::stable::Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::BFloat16:
      return Element::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return Element::kHalf;
    default:
      return Element::kFloat;
  }
}

inline int64_t element_size(Element element) { return element == Element::kFloat ? 4 : 2; }

}  // namespace ciema::cpu
