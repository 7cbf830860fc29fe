// What a kernel file needs from the compiler, under one name for both of its lives: nvcc builds it
// for the GPU; g++ with -DCIEMA_EMULATOR builds the same source for the CPU (csrc/emulator, tests).
// Kernel files include this header and no torch header, and use no CUDA feature not named here.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef CIEMA_EMULATOR

#include "../emulator/device.h"
#include "../emulator/launch.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A block-shared array: CIEMA_SHARED(float, sums, [8][32]);
#define CIEMA_SHARED(type, name, dims) __shared__ __align__(16) type name dims
// The block's dynamic shared memory, of the size given at the launch.
#define CIEMA_DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char ciema_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(ciema_dynamic_shared)

namespace ciema {

template <size_t kBytes>
using VectorBits =
    std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, unsigned>>;

// One access of 4, 8 or 16 bytes; the address must be a multiple of as many.
template <class V>
__device__ __forceinline__ V load_vector(const void* address) {
  using Bits = VectorBits<sizeof(V)>;
  static_assert(sizeof(V) == sizeof(Bits), "vector accesses are 4, 8 or 16 bytes");
  const Bits bits = *static_cast<const Bits*>(address);
  V value;
  memcpy(&value, &bits, sizeof(V));
  return value;
}

template <class V>
__device__ __forceinline__ void store_vector(void* address, const V& value) {
  using Bits = VectorBits<sizeof(V)>;
  static_assert(sizeof(V) == sizeof(Bits), "vector accesses are 4, 8 or 16 bytes");
  Bits bits;
  memcpy(&bits, &value, sizeof(V));
  *static_cast<Bits*>(address) = bits;
}

// a·b rounded, never fused with an addition.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }

// Called by all threads of a block: true in the last of `expected` blocks to call it, which may
// then read what the others wrote before their calls (through pointers that are not
// const __restrict__: such loads may be stale). Nobody waits. The counter, in global memory, must
// be zero at first and is zero again afterwards.
__device__ __forceinline__ bool arrive_last(int* counter, int expected) {
  CIEMA_SHARED(bool, is_last, [1]);
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    __threadfence();  // after the barrier it covers the writes of the whole block
    const auto last = static_cast<unsigned>(expected - 1);
    is_last[0] = atomicInc(reinterpret_cast<unsigned*>(counter), last) == last;
    __threadfence();
  }
  __syncthreads();
  return is_last[0];
}

}  // namespace ciema

#endif  // CIEMA_EMULATOR

namespace ciema {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ __half from_float<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// The bytes of one vector access, as elements.
template <class T, int kBytes = 16>
struct alignas(kBytes) Vector {
  static constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
  T element[kElements];
};

}  // namespace ciema
