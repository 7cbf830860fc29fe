// How launches of kernel files reach the machine; csrc/cuda/launch.cuh is their face.
#pragma once

#include "device.h"

namespace emulator {

struct Parameter {
  const void* value;
  size_t bytes;
};

// `kernel`: the function's address, by which a dry launch names it; `parameters`: what a GPU would
// be handed, ends with a null value.
void launch_body(const char* name, const void* kernel, dim3 grid, dim3 block,
                 size_t dynamic_shared_bytes, void (*body)(const void*), const void* closure,
                 const Parameter* parameters);

}  // namespace emulator
