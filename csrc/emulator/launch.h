// How a kernel file enters the emulator: a named entry that takes addresses and numbers by name and
// launches kernels. Included only by files compiled as kernel code.
//
//   static emulator::Entry scale{"scale", [](const emulator::Arguments& a) {
//     emulator::launch("scale", dim3{blocks}, dim3{256}, 0, scale_kernel, a.pointer<float>("x"));
//   }};
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <type_traits>

#include "device.h"

namespace emulator {

class Arguments {
 public:
  explicit Arguments(std::map<std::string, int64_t> values) : values_(std::move(values)) {}
  // Throws std::invalid_argument when the caller did not give it.
  int64_t integer(const std::string& name) const;
  // Null when the caller gave 0 or nothing.
  template <class T>
  T* pointer(const std::string& name) const {
    return reinterpret_cast<T*>(address(name));
  }

 private:
  uintptr_t address(const std::string& name) const;
  std::map<std::string, int64_t> values_;
};

struct Entry {
  using Function = void (*)(const Arguments&);
  Entry(const char* name, Function function);
};

void launch_body(const char* name, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                 void (*body)(const void*), const void* closure);

template <class... Parameters>
EMULATOR_UNCHECKED void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                               void (*kernel)(Parameters...),
                               std::type_identity_t<Parameters>... arguments) {
  const auto call = [=]() EMULATOR_UNCHECKED { kernel(arguments...); };
  launch_body(
      name, grid, block, dynamic_shared_bytes,
      [](const void* closure) EMULATOR_UNCHECKED { (*static_cast<decltype(&call)>(closure))(); },
      &call);
}

}  // namespace emulator
