// Starts kernels from entries (csrc/common/entries.h), under nvcc and in the emulator alike.
#pragma once

#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "../common/device.cuh"
#include "../common/entries.h"

namespace ciema {

#ifdef CIEMA_EMULATOR

template <class... Parameters>
EMULATOR_UNCHECKED void launch(const Arguments&, const char* name, dim3 grid, dim3 block,
                               size_t shared_bytes, void (*kernel)(Parameters...),
                               std::type_identity_t<Parameters>... parameters) {
  const auto call = [=]() EMULATOR_UNCHECKED { kernel(parameters...); };
  const emulator::Parameter values[] = {{&parameters, sizeof(parameters)}..., {nullptr, 0}};
  emulator::launch_body(
      name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [](const void* closure) EMULATOR_UNCHECKED { (*static_cast<decltype(&call)>(closure))(); },
      &call, values);
}

#else

inline void check_launch(cudaError_t error, const char* name) {
  if (error != cudaSuccess) fail_launch(name, cudaGetErrorString(error));
}

// Lets a kernel have all the dynamic shared memory that the current device gives. Unasked, its own
// static arrays and this fit 48 KiB together, so that no kernel's share is known here; once for each
// kernel and device, so that no other thread can lower it between asking and starting.
inline void allow_shared_memory(const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  check_launch(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.contains({kernel, device})) return;
  int most = 0;
  check_launch(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               name);
  cudaFuncAttributes of_kernel{};
  check_launch(cudaFuncGetAttributes(&of_kernel, kernel), name);
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    most - static_cast<int>(of_kernel.sharedSizeBytes)),
               name);
  allowed.insert({kernel, device});
}

// On the stream of the arguments; nothing synchronises. `shared_bytes`: dynamic, of a block.
template <class... Parameters>
void launch(const Arguments& arguments, const char* name, dim3 grid, dim3 block,
            size_t shared_bytes, void (*kernel)(Parameters...),
            std::type_identity_t<Parameters>... parameters) {
  if (shared_bytes > 0) allow_shared_memory(reinterpret_cast<const void*>(kernel), name);
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(arguments.stream)>>>(
      parameters...);
  check_launch(cudaGetLastError(), name);
}

#endif

// Whether a vector access of 16 bytes fits at every multiple of `step` elements from `pointer`.
template <class T>
bool is_aligned(const T* pointer, int64_t step = 0) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 &&
         step * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

}  // namespace ciema
