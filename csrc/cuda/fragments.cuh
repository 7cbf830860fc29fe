// Operands and results of one warp's tensor-core product, for every dtype under one set of names.
//
//   D (16×8, float32) += A (16×kDepth) B (kDepth×8)          kDepth: 16 values of 16 bits, or 8 floats
//
// Tiles lie in shared memory with a pitch in elements; every row must start at a multiple of 16
// bytes. Without bank conflicts: a pitch of bytes ≡ 16 (mod 128), for load_a_columns,
// load_b_columns and load_b_chained of floats of 8 floats (mod 16).
//
// float32 (Precision): kSplit writes each operand as a sum of two tf32 numbers and takes three
// products, which keeps float32's accuracy (the dropped term is 2^-22 of a product); kTf32 rounds
// the operands, where torch allows it. For 16 bits the precision says nothing.
#pragma once

#include "ptx.cuh"

namespace ciema {

enum class Precision { kSplit, kTf32 };

__device__ __forceinline__ uint32_t pair_bits(float low, float high, __half) {
  const __half values[2] = {__float2half_rn(low), __float2half_rn(high)};
  uint32_t bits;
  memcpy(&bits, values, sizeof(bits));
  return bits;
}
__device__ __forceinline__ uint32_t pair_bits(float low, float high, __nv_bfloat16) {
  const __nv_bfloat16 values[2] = {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
  uint32_t bits;
  memcpy(&bits, values, sizeof(bits));
  return bits;
}

// 16-bit values.
template <class T, Precision kPrecision = Precision::kSplit>
struct Fragments {
  static constexpr int kDepth = 16;
  struct A {
    uint32_t bits[4];
  };
  struct B {
    uint32_t bits[2];
  };

  // The tile of A at `tile` as [row][depth].
  __device__ __forceinline__ static void load_a(A& a, const T* tile, int pitch) {
    const int lane = lane_of_warp();
    load_a_row(a, tile + (lane % 16) * pitch);
  }
  // The same, every lane giving the address of row lane % 16: rows may lie anywhere.
  __device__ __forceinline__ static void load_a_row(A& a, const T* row) {
    ptx::load_matrices(a.bits, row + (lane_of_warp() / 16) * 8);
  }
  // The tile of A at `tile` as [depth][row].
  __device__ __forceinline__ static void load_a_columns(A& a, const T* tile, int pitch) {
    const int lane = lane_of_warp();
    ptx::load_matrices_transposed(
        a.bits, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
  }
  // Two tiles of B, columns 0…7 and 8…15, at `tile` as [column][depth].
  __device__ __forceinline__ static void load_b(B (&b)[2], const T* tile, int pitch) {
    const int lane = lane_of_warp();
    uint32_t bits[4];
    ptx::load_matrices(bits, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
    unpack(b, bits);
  }
  // Two tiles of B, columns 0…7 and 8…15, at `tile` as [depth][column].
  __device__ __forceinline__ static void load_b_columns(B (&b)[2], const T* tile, int pitch) {
    const int lane = lane_of_warp();
    uint32_t bits[4];
    ptx::load_matrices_transposed(bits, tile + (lane % 16) * pitch + lane / 16 * 8);
    unpack(b, bits);
  }

  // Results as the next product's A: its depth are the columns of the results' kDepth / 8 tiles.
  // Multiply with B from load_b_chained.
  __device__ __forceinline__ static void chain(A& a, const float (&d)[2][4]) {
    a.bits[0] = pair_bits(d[0][0], d[0][1], T{});
    a.bits[1] = pair_bits(d[0][2], d[0][3], T{});
    a.bits[2] = pair_bits(d[1][0], d[1][1], T{});
    a.bits[3] = pair_bits(d[1][2], d[1][3], T{});
  }
  __device__ __forceinline__ static void load_b_chained(B (&b)[2], const T* tile, int pitch) {
    load_b(b, tile, pitch);
  }

  __device__ __forceinline__ static void multiply_add(float (&d)[4], const A& a, const B& b) {
    multiply_add(d, a.bits, b.bits, T{});
  }

 private:
  __device__ __forceinline__ static int lane_of_warp() {
    return static_cast<int>(threadIdx.x) % kWarp;
  }
  __device__ __forceinline__ static void unpack(B (&b)[2], const uint32_t (&bits)[4]) {
    b[0].bits[0] = bits[0];
    b[0].bits[1] = bits[1];
    b[1].bits[0] = bits[2];
    b[1].bits[1] = bits[3];
  }
  __device__ __forceinline__ static void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2], __half) {
    ptx::multiply_add_float16(d, a, b);
  }
  __device__ __forceinline__ static void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2], __nv_bfloat16) {
    ptx::multiply_add_bfloat16(d, a, b);
  }
};

// float32 as tf32 operands.
template <Precision kPrecision>
struct Fragments<float, kPrecision> {
  static constexpr int kDepth = 8;
  static constexpr int kTerms = kPrecision == Precision::kSplit ? 2 : 1;
  struct A {
    uint32_t bits[kTerms][4];
  };
  struct B {
    uint32_t bits[kTerms][2];
  };

  __device__ __forceinline__ static void load_a(A& a, const float* tile, int pitch) {
    load_a_row(a, tile + (lane_of_warp() % 16) * pitch);
  }
  __device__ __forceinline__ static void load_a_row(A& a, const float* row) {
    uint32_t bits[4];
    ptx::load_matrices(bits, row + (lane_of_warp() / 16) * 4);
    split(a.bits, bits);
  }
  __device__ __forceinline__ static void load_a_columns(A& a, const float* tile, int pitch) {
    const int g = lane_of_warp() / 4, q = lane_of_warp() % 4;
    const uint32_t bits[4] = {
        __float_as_uint(tile[q * pitch + g]), __float_as_uint(tile[q * pitch + g + 8]),
        __float_as_uint(tile[(q + 4) * pitch + g]), __float_as_uint(tile[(q + 4) * pitch + g + 8])};
    split(a.bits, bits);
  }
  __device__ __forceinline__ static void load_b(B (&b)[2], const float* tile, int pitch) {
    const int lane = lane_of_warp();
    uint32_t bits[4];
    ptx::load_matrices(bits, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 4);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t half[2] = {bits[2 * n], bits[2 * n + 1]};
      split(b[n].bits, half);
    }
  }
  __device__ __forceinline__ static void load_b_columns(B (&b)[2], const float* tile, int pitch) {
    const int g = lane_of_warp() / 4, q = lane_of_warp() % 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t bits[2] = {__float_as_uint(tile[q * pitch + g + 8 * n]),
                                __float_as_uint(tile[(q + 4) * pitch + g + 8 * n])};
      split(b[n].bits, bits);
    }
  }

  // The depth's order is free as long as both operands have the same: results hold columns 2q and
  // 2q + 1 where an operand holds depths q and q + 4.
  __device__ __forceinline__ static void chain(A& a, const float (&d)[1][4]) {
    const uint32_t bits[4] = {__float_as_uint(d[0][0]), __float_as_uint(d[0][2]),
                              __float_as_uint(d[0][1]), __float_as_uint(d[0][3])};
    split(a.bits, bits);
  }
  __device__ __forceinline__ static void load_b_chained(B (&b)[2], const float* tile, int pitch) {
    const int g = lane_of_warp() / 4, q = lane_of_warp() % 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const auto pair = load_vector<Vector<uint32_t, 8>>(tile + (g + 8 * n) * pitch + 2 * q);
      split(b[n].bits, pair.element);
    }
  }

  __device__ __forceinline__ static void multiply_add(float (&d)[4], const A& a, const B& b) {
    if constexpr (kTerms == 1) {
      ptx::multiply_add_tf32(d, a.bits[0], b.bits[0]);
    } else {
      // Tensor cores cut sums off, which adds up over a long depth: sums that stay are rounded.
      float sum[4] = {};
      ptx::multiply_add_tf32(sum, a.bits[1], b.bits[0]);
      ptx::multiply_add_tf32(sum, a.bits[0], b.bits[1]);
      ptx::multiply_add_tf32(sum, a.bits[0], b.bits[0]);
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] += sum[i];
    }
  }

 private:
  __device__ __forceinline__ static int lane_of_warp() {
    return static_cast<int>(threadIdx.x) % kWarp;
  }
  template <int kCount>
  __device__ __forceinline__ static void split(uint32_t (&terms)[kTerms][kCount],
                                               const uint32_t (&bits)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kTerms == 1) {
        terms[0][i] = ptx::round_to_tf32(__uint_as_float(bits[i]));
      } else {
        // The nearest, ties away from zero, in 2 instructions: the conversion's takes 6 with its
        // test for NaN. A NaN may become 0 here, but not in the rest. Products ignore the rest's
        // last 13 bits, 2^-21 of the value at most.
        const uint32_t nearest = (bits[i] + 0x1000u) & 0xffffe000u;
        const float rest = __uint_as_float(bits[i]) - __uint_as_float(nearest);
        // An infinity is a second term alone, which meets first terms only: as a first term it
        // would meet the other operand's second, often 0, and inf · 0 is NaN. inf · inf is, here.
        const bool finite = isfinite(__uint_as_float(nearest));
        terms[0][i] = finite ? nearest : 0u;
        terms[1][i] = finite ? __float_as_uint(rest) : nearest;
      }
    }
  }
};

}  // namespace ciema
