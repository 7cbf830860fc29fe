// The emulated twins of csrc/cuda/ptx.cuh, under the same signatures; what they do is said there.
//
// Sums of products are cut off as the A100 does it, not rounded (instructions.cpp).
// An asynchronous copy reads global memory at once; its destination is poison and may be neither
// read nor written until the thread's copy_async_wait.
#pragma once

#include "device.h"

namespace emulator {

enum class Operand { kFloat16, kBfloat16, kTf32 };

// Defined in instructions.cpp, outside the instrumented code. Accesses are known by the return
// address, which leads from csrc/cuda/fragments.cuh, inlined, to the kernel's own line.
void copy_async(void* shared, const void* global, size_t bytes, size_t valid);
void copy_async_commit();
void copy_async_wait(unsigned pending);
void load_matrices(uint32_t* registers, const void* row, bool transposed, const Where& where);
void multiply_add(float* d, const uint32_t* a, const uint32_t* b, Operand operand,
                  const Where& where);

}  // namespace emulator

namespace ciema::ptx {

EMULATOR_UNCHECKED __forceinline__ void copy_async(void* shared, const void* global,
                                                   bool inside = true) {
  emulator::copy_async(shared, global, 16, inside ? 16 : 0);
}

template <int kBytes>
EMULATOR_UNCHECKED __forceinline__ void copy_async_part(void* shared, const void* global,
                                                        int valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::copy_async(shared, global, kBytes, static_cast<size_t>(valid));
}

EMULATOR_UNCHECKED __forceinline__ void copy_async_commit() { emulator::copy_async_commit(); }

template <int kPending>
EMULATOR_UNCHECKED __forceinline__ void copy_async_wait() {
  static_assert(kPending >= 0);
  emulator::copy_async_wait(kPending);
}

EMULATOR_UNCHECKED __forceinline__ void load_matrices(
    uint32_t (&registers)[4], const void* row, EMULATOR_WHERE) {
  emulator::load_matrices(registers, row, false, where);
}

EMULATOR_UNCHECKED __forceinline__ void load_matrices_transposed(
    uint32_t (&registers)[4], const void* row, EMULATOR_WHERE) {
  emulator::load_matrices(registers, row, true, where);
}

EMULATOR_UNCHECKED __forceinline__ void multiply_add_float16(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_WHERE) {
  emulator::multiply_add(d, a, b, emulator::Operand::kFloat16, where);
}

EMULATOR_UNCHECKED __forceinline__ void multiply_add_bfloat16(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_WHERE) {
  emulator::multiply_add(d, a, b, emulator::Operand::kBfloat16, where);
}

EMULATOR_UNCHECKED __forceinline__ void multiply_add_tf32(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_WHERE) {
  emulator::multiply_add(d, a, b, emulator::Operand::kTf32, where);
}

EMULATOR_UNCHECKED inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFFFFFFu;  // NaN
  return (bits + 0x1000u) & ~0x1FFFu;
}

EMULATOR_UNCHECKED inline void hide(int&) {}

}  // namespace ciema::ptx
