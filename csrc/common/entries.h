// How kernels are started: by an entry's name, with arguments by name. A kernel file of csrc/cuda
// defines entries; Python (fused/backends/cuda/launch.py) calls them through the op that
// csrc/cuda/launch.cpp registers, or, in the tests, through csrc/emulator. Knows no torch.
//
//   void scale(const Arguments& a) {
//     const int64_t n = a.integer("n");
//     launch(a, "scale", dim3(grid_size(blocks(n, 256))), dim3(256), 0, scale_kernel,
//            a.pointer<float>("x"), n);
//   }
//   const Entry kEntries[] = {{"scale_float32", scale}};
//
// Nothing of the C++ library is inline here: the emulator instruments all code of a kernel file,
// and the linker keeps one copy of an inline function. Nothing of it is included either: nvcc would
// read it again for every file and family of architectures.
#pragma once

#include <cstdint>

namespace ciema {

struct ArgumentValues;  // argument_values.h

struct Arguments {
  const ArgumentValues& values;
  void* stream = nullptr;  // cudaStream_t

  // Null when the caller gave an empty tensor or none.
  template <class T>
  T* pointer(const char* name) const {
    return static_cast<T*>(address(name));
  }
  // Throws std::invalid_argument when the caller did not give it.
  int64_t integer(const char* name) const;
  float real(const char* name) const;
  void* address(const char* name) const;
};

// A named entry; registers itself.
struct Entry {
  using Function = void (*)(const Arguments&);
  Entry(const char* name, Function function);
};

// The entry of that name, or null.
Entry::Function find_entry(const char* name);

constexpr int64_t kGridX = 2147483647;  // most blocks along x; along y and z
constexpr int64_t kGridY = 65535;

// Blocks along a grid dimension; std::invalid_argument past its limit.
unsigned grid_size(int64_t count, int64_t limit = kGridX);

// Throws std::runtime_error: "<kernel>: <message>".
[[noreturn]] void fail_launch(const char* kernel, const char* message);

// Blocks of `size` that cover `total`.
constexpr int64_t blocks(int64_t total, int64_t size) { return (total + size - 1) / size; }

}  // namespace ciema
