// How launches of kernel files reach the machine; csrc/cuda/launch.cuh is their face.
#pragma once

#include "device.h"

namespace emulator {

// `kernel`: the function's address, by which a dry launch names it.
void launch_body(const char* name, const void* kernel, dim3 grid, dim3 block,
                 size_t dynamic_shared_bytes, void (*body)(const void*), const void* closure);

}  // namespace emulator
