// The CUDA C++ that kernel files may use, for g++: what csrc/common/device.cuh includes when
// CIEMA_EMULATOR is defined. Everything that waits or touches memory goes to the machine and the
// shadow; a name that is not here does not compile, so that nothing runs unchecked.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Code that works for the emulator, not for the kernel: its memory accesses are not checked.
#define EMULATOR_UNCHECKED __attribute__((no_sanitize("thread")))

using std::isfinite;
using std::isinf;
using std::isnan;

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float rsqrtf(float value) { return static_cast<float>(1.0 / std::sqrt(double{value})); }
inline float __expf(float value) { return std::exp(value); }
// As the hardware: 0 where the reciprocal of the divisor would be subnormal.
inline float __fdividef(float a, float b) { return std::fabs(b) > 0x1p126f ? a * 0.0f : a / b; }
// Of integers of one type; of floats, fminf and fmaxf.
template <class T>
  requires std::is_integral_v<T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
  requires std::is_integral_v<T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

using Where = std::source_location;

// Defined in runtime.cpp, outside the instrumented code.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_dim();
[[gnu::const]] dim3 grid_dim();
unsigned lane();
void block_barrier(const Where& where);
void sync_warp(unsigned mask, const Where& where);
unsigned ballot(unsigned mask, bool predicate, const char* operation, const Where& where);
// value: in this lane's, out that of lane `source`.
void shuffle(unsigned mask, void* value, size_t bytes, int source, const char* operation,
             const Where& where);
bool arrive_last(int* counter, int expected, const Where& where);
void record_read(const void* address, size_t bytes, const Where& where);
void record_write(const void* address, size_t bytes, const Where& where);
void record_atomic(const void* address, size_t bytes, const Where& where);
void* shared_array(const char* name, size_t bytes, const Where& where);
void* dynamic_shared();

template <class Array>
EMULATOR_UNCHECKED Array& shared(const char* name, const Where& where = Where::current()) {
  return *static_cast<Array*>(shared_array(name, sizeof(Array), where));
}

template <class T>
EMULATOR_UNCHECKED T shuffle_from(unsigned mask, T value, int source, const char* operation,
                                  const Where& where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  shuffle(mask, &value, sizeof(T), source, operation, where);
  return value;
}

// CUDA's rule for `width`: the warp is cut into segments of it, and no lane reads past its own.
struct Segment {
  int lane, first, width;
  EMULATOR_UNCHECKED explicit Segment(int segment_width)
      : lane(static_cast<int>(emulator::lane())),
        first(lane & ~(segment_width - 1)),
        width(segment_width) {}
  EMULATOR_UNCHECKED int inside(int source) const {
    return source >= first && source < first + width ? source : lane;
  }
};

template <class T, class Update>
EMULATOR_UNCHECKED T atomic_update(T* address, const Where& where, Update update) {
  record_atomic(address, sizeof(T), where);
  T old;
  std::memcpy(&old, address, sizeof(T));
  const T next = update(old);
  std::memcpy(address, &next, sizeof(T));
  return old;
}

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_dim())
#define gridDim (::emulator::grid_dim())

#define CIEMA_SHARED(type, name, dims) \
  using name##_array = type dims;      \
  name##_array& name = ::emulator::shared<name##_array>(#name)
// The block's dynamic shared memory, of the size given at the launch.
#define CIEMA_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(::emulator::dynamic_shared())

// ---- barriers and warp operations -------------------------------------------------------------
// `where` is the caller's line: threads meet at the same line, not at the same machine instruction.

#define EMULATOR_WHERE const ::emulator::Where& where = ::emulator::Where::current()

EMULATOR_UNCHECKED inline void __syncthreads(EMULATOR_WHERE) { emulator::block_barrier(where); }
EMULATOR_UNCHECKED inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_WHERE) {
  emulator::sync_warp(mask, where);
}
EMULATOR_UNCHECKED inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_WHERE) {
  return emulator::ballot(mask, predicate != 0, "__ballot_sync", where);
}
EMULATOR_UNCHECKED inline int __any_sync(unsigned mask, int predicate, EMULATOR_WHERE) {
  return emulator::ballot(mask, predicate != 0, "__any_sync", where) != 0;
}
EMULATOR_UNCHECKED inline int __all_sync(unsigned mask, int predicate, EMULATOR_WHERE) {
  return emulator::ballot(mask, predicate == 0, "__all_sync", where) == 0;
}
template <class T>
EMULATOR_UNCHECKED T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                                 EMULATOR_WHERE) {
  const emulator::Segment segment(width);
  return emulator::shuffle_from(mask, value, segment.first + (source & (width - 1)), "__shfl_sync",
                                where);
}
template <class T>
EMULATOR_UNCHECKED T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                    EMULATOR_WHERE) {
  const emulator::Segment segment(width);
  return emulator::shuffle_from(mask, value, segment.inside(segment.lane - static_cast<int>(delta)),
                                "__shfl_up_sync", where);
}
template <class T>
EMULATOR_UNCHECKED T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                      EMULATOR_WHERE) {
  const emulator::Segment segment(width);
  return emulator::shuffle_from(mask, value, segment.inside(segment.lane + static_cast<int>(delta)),
                                "__shfl_down_sync", where);
}
template <class T>
EMULATOR_UNCHECKED T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                                     EMULATOR_WHERE) {
  // Unlike the others it may read an earlier segment, never a later one.
  const emulator::Segment segment(width);
  const int source = segment.lane ^ lanes;
  return emulator::shuffle_from(mask, value, source < segment.first + width ? source : segment.lane,
                                "__shfl_xor_sync", where);
}

// ---- atomics ----------------------------------------------------------------------------------

template <class T>
EMULATOR_UNCHECKED T atomicAdd(T* address, std::type_identity_t<T> value, EMULATOR_WHERE) {
  return emulator::atomic_update(address, where,
                                 [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
EMULATOR_UNCHECKED T atomicMax(T* address, std::type_identity_t<T> value, EMULATOR_WHERE) {
  static_assert(std::is_integral_v<T>, "CUDA has integer atomicMax only");
  return emulator::atomic_update(address, where, [=](T old) { return old > value ? old : value; });
}
template <class T>
EMULATOR_UNCHECKED T atomicMin(T* address, std::type_identity_t<T> value, EMULATOR_WHERE) {
  static_assert(std::is_integral_v<T>, "CUDA has integer atomicMin only");
  return emulator::atomic_update(address, where, [=](T old) { return old < value ? old : value; });
}
template <class T>
EMULATOR_UNCHECKED T atomicExch(T* address, std::type_identity_t<T> value, EMULATOR_WHERE) {
  return emulator::atomic_update(address, where, [=](T) { return value; });
}
template <class T>
EMULATOR_UNCHECKED T atomicCAS(T* address, std::type_identity_t<T> expected,
                               std::type_identity_t<T> value, EMULATOR_WHERE) {
  static_assert(std::is_integral_v<T>, "CUDA has integer atomicCAS only");
  return emulator::atomic_update(address, where,
                                 [=](T old) { return old == expected ? value : old; });
}

// ---- the last block of a launch ---------------------------------------------------------------

namespace ciema {

// See csrc/common/device.cuh.
EMULATOR_UNCHECKED inline bool arrive_last(int* counter, int expected, EMULATOR_WHERE) {
  return emulator::arrive_last(counter, expected, where);
}

}  // namespace ciema

// ---- vector accesses --------------------------------------------------------------------------

namespace ciema {

template <class V>
constexpr bool kIsVector = sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16;

// One access of 4, 8 or 16 bytes; the address must be a multiple of as many.
template <class V>
EMULATOR_UNCHECKED V load_vector(const void* address, EMULATOR_WHERE) {
  static_assert(kIsVector<V>, "vector accesses are 4, 8 or 16 bytes");
  emulator::record_read(address, sizeof(V), where);
  V value;
  std::memcpy(&value, address, sizeof(V));
  return value;
}

template <class V>
EMULATOR_UNCHECKED void store_vector(void* address, const V& value, EMULATOR_WHERE) {
  static_assert(kIsVector<V>, "vector accesses are 4, 8 or 16 bytes");
  emulator::record_write(address, sizeof(V), where);
  std::memcpy(address, &value, sizeof(V));
}

// a·b rounded, never fused with an addition: kernels are built with -ffp-contract=off.
inline float rounded_product(float a, float b) { return a * b; }

}  // namespace ciema
