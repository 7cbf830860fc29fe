// Bilinear resizing with align_corners=False, along one axis.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ciema::cpu {

// Between which two of `size` places the centre of place `i` of `target` lies; double, because an
// error of a position counts as often as neighbours differ.
struct Between {
  Between(int64_t i, int64_t target, int64_t size) {
    const double ratio = static_cast<double>(size) / static_cast<double>(target);
    const double place = std::max((static_cast<double>(i) + 0.5) * ratio - 0.5, 0.0);
    low = std::min(static_cast<int64_t>(place), size - 1);
    high = std::min(low + 1, size - 1);
    share = place - static_cast<double>(low);
  }
  int64_t low, high;
  double share;  // of high
};

}  // namespace ciema::cpu
