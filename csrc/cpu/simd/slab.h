// A slab of a map: one group of one sample, as the kernels of the grouped stages read it.
#pragma once

#include "channel_statistics.h"

namespace ciema::cpu {

struct SlabMap {
  const void* e;
  Element element;
  int64_t stride_c, stride_h, stride_w;  // in elements; stride_w or stride_c is 1
};

}  // namespace ciema::cpu
