// The only inline PTX of the CUDA kernels: asynchronous copies, matrix loads, tensor-core products.
// csrc/emulator/instructions.h holds the twin of every function here, under the same signature.
//
// Fragments of one warp, lane = 4 g + q (PTX ISA, "Matrix fragments for mma.m16n8k16 / m16n8k8"):
//   m16n8k16, two values of 16 bits a register   a[0] (g, 2q..)   a[1] (g+8, 2q..)
//                                                a[2] (g, 2q+8..) a[3] (g+8, 2q+8..)
//                                                b[0] (2q.., g)   b[1] (2q+8.., g)
//   m16n8k8, one tf32 value a register           a[0] (g, q) a[1] (g+8, q) a[2] (g, q+4) a[3] (g+8, q+4)
//                                                b[0] (q, g) b[1] (q+4, g)
//   d of both, float32                           d[0] (g, 2q) d[1] (g, 2q+1) d[2] (g+8, 2q) d[3] (g+8, 2q+1)
#pragma once

#include "../common/device.cuh"

#ifdef CIEMA_EMULATOR

#include "../emulator/instructions.h"

#else

namespace ciema::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, or 16 zero bytes if not `inside` (then global may be any
// address). Both addresses are multiples of 16. The data may be read after copy_async_wait by this
// thread, and after a barrier by the others.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(inside ? 16 : 0)
               : "memory");
}

// kBytes (4, 8 or 16), of which the first `valid`, 0…kBytes, come from global memory; zeros follow.
// Both addresses are multiples of kBytes.
template <int kBytes>
__device__ __forceinline__ void copy_async_part(void* shared, const void* global, int valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)),
               "l"(global), "n"(kBytes), "r"(valid)
               : "memory");
}

// Closes the group of the copies since the last commit.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's groups, the youngest, are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows of 16 bytes in shared memory; lane l gives the address of row l % 8 of
// matrix l / 8, a multiple of 16. Register i gets bytes 4q.. of row g of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix of 8×8 values of 16 bits transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&registers)[4],
                                                         const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b, 16×8×16 in float16, accumulated in float32.
__device__ __forceinline__ void multiply_add_float16(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b, 16×8×16 in bfloat16, accumulated in float32.
__device__ __forceinline__ void multiply_add_bfloat16(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b, 16×8×8 in tf32 (the low 13 bits of the operands are ignored), accumulated in float32.
__device__ __forceinline__ void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest tf32 value (ties away from zero), as a float's bits with 13 zeros at the end.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

// Makes a value unknown to the compiler, which then neither keeps in registers nor moves out of a
// loop what is computed from it.
__device__ __forceinline__ void hide(int& value) { asm volatile("" : "+r"(value)); }

}  // namespace ciema::ptx

#endif  // CIEMA_EMULATOR
