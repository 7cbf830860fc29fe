// Small products of matrices, as weights and their gradients need them beside the products over
// pixels: one tile of 64×64 results to a block.
//
//   acc[i, j] = Σ_k L[i, k] · d[k] · R[k, j]        d may be absent
//
// L and R are of Element or float32 with any strides (one of them 1, for whole sectors), L ⊙ d and
// R are rounded to T, the sums are float32 of the tensor cores in a fixed order. Steps of 64 bytes
// of depth go through registers to shared memory; which index is the neighbour decides how they lie
// there. Bytes: L once for every 64 columns, R once for every 64 rows, from the second-level cache.
#pragma once

#include "fragments.cuh"

#ifndef PLANT
#define PLANT 0
#endif

namespace ciema::matrix {

constexpr int kTile = 64;

__host__ __device__ constexpr int tiles(int size) { return (size + kTile - 1) / kTile; }

// A matrix whose element [line, depth] lies at line · stride_line + depth · stride_depth.
struct Matrix {
  const void* data;
  int64_t stride_line, stride_depth;
  bool is_float;  // else of Element

  template <class Element>
  __device__ __forceinline__ float at(int line, int depth) const {
    return read<Element>(line * stride_line + depth * stride_depth);
  }
  template <class Element>
  __device__ __forceinline__ float read(int64_t offset) const {
    return is_float ? static_cast<const float*>(data)[offset]
                    : to_float(static_cast<const Element*>(data)[offset]);
  }
};

// One operand's tile of a step in shared memory. kDeep: its depth are neighbours, also in memory.
template <class T, class Element, Precision kPrecision, bool kDeep, int kThreads>
struct Side {
  using F = Fragments<T, kPrecision>;
  static constexpr int kStep = 64 / static_cast<int>(sizeof(T));
  static constexpr int kPitch = kDeep ? kStep + 16 / static_cast<int>(sizeof(T)) : kTile + 8;
  static constexpr int kElements = (kDeep ? kTile : kStep) * kPitch;
  static constexpr int kOwn = kTile * kStep / kThreads;
  using Values = float[kOwn];

  // A thread's elements lie on one line of the shared tile's longer axis, so many lines or depths
  // apart.
  static constexpr int kLineStep = kDeep ? kThreads / kStep : 0;
  static constexpr int kDepthStep = kDeep ? 0 : kThreads / kTile;
  static_assert(kThreads % kStep == 0 && kThreads % kTile == 0);

  __device__ __forceinline__ static int line() {
    const int thread = static_cast<int>(threadIdx.x);
    return kDeep ? thread / kStep : thread % kTile;
  }
  __device__ __forceinline__ static int depth() {
    const int thread = static_cast<int>(threadIdx.x);
    return kDeep ? thread % kStep : thread / kTile;
  }

  // Scale(k): d[k].
  template <class Scale>
  __device__ __forceinline__ static void load(const Matrix& matrix, int first, int lines, int k,
                                              int depths, Scale scale, Values& values) {
    const int own_line = first + line(), own_depth = k + depth();
    const int64_t step = kLineStep * matrix.stride_line + kDepthStep * matrix.stride_depth;
    int64_t offset = own_line * matrix.stride_line + own_depth * matrix.stride_depth;
    const float common = kDeep && own_depth < depths ? scale(own_depth) : 0.0f;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int at = own_depth + n * kDepthStep;
      const bool inside = own_line + n * kLineStep < lines && at < depths;
      values[n] = inside ? matrix.template read<Element>(offset) * (kDeep ? common : scale(at))
                         : 0.0f;
      offset += step;
    }
  }
  __device__ __forceinline__ static void store(T* tile, const Values& values) {
    T* own = tile + (kDeep ? line() * kPitch + depth() : depth() * kPitch + line());
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      own[n * (kLineStep + kDepthStep) * kPitch] = from_float<T>(values[n]);
    }
  }
  __device__ __forceinline__ static void load_a(typename F::A& a, const T* tile, int line, int k) {
    if constexpr (kDeep) {
      F::load_a(a, tile + line * kPitch + k, kPitch);
    } else {
      F::load_a_columns(a, tile + k * kPitch + line, kPitch);
    }
  }
  __device__ __forceinline__ static void load_b(typename F::B (&b)[2], const T* tile, int line,
                                                int k) {
    if constexpr (kDeep) {
      F::load_b(b, tile + line * kPitch + k, kPitch);
    } else {
      F::load_b_columns(b, tile + k * kPitch + line, kPitch);
    }
  }
};

struct Ones {
  __device__ __forceinline__ float operator()(int) const { return 1.0f; }
};

// kLeftDeep, kRightDeep: whether k is the neighbour in L and in R. `shared` holds kBytes.
template <class T, class Element, Precision kPrecision, bool kLeftDeep, bool kRightDeep,
          int kThreads>
struct Product {
  using F = Fragments<T, kPrecision>;
  using Left = Side<T, Element, kPrecision, kLeftDeep, kThreads>;
  using Right = Side<T, Element, kPrecision, kRightDeep, kThreads>;
  static constexpr int kWarpsN = kThreads / kWarp / 2;
  static constexpr int kFragmentsM = 2, kFragmentsN = kTile / kWarpsN / 8;
  static constexpr int kBytes =
      (Left::kElements + Right::kElements) * static_cast<int>(sizeof(T));

  // Calls emit(i, j, value) for the results of tile `block`; tiles of one row are neighbours.
  template <class Scale, class Emit>
  __device__ __forceinline__ static void tile(const Matrix& left, const Matrix& right, int block,
                                              int rows, int columns, int depths, Scale scale,
                                              Emit emit, T* shared) {
    const int row = block / tiles(columns) * kTile, column = block % tiles(columns) * kTile;
    T* left_tile = shared;
    T* right_tile = shared + Left::kElements;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int line = warp / kWarpsN * (16 * kFragmentsM);
    const int across = warp % kWarpsN * (8 * kFragmentsN);
    float acc[kFragmentsM][kFragmentsN][4] = {};
    typename Left::Values left_values;
    typename Right::Values right_values;
    Left::load(left, row, rows, 0, depths, scale, left_values);
    Right::load(right, column, columns, 0, depths, Ones{}, right_values);
    for (int k = 0; k < depths; k += Left::kStep) {
      Left::store(left_tile, left_values);
      Right::store(right_tile, right_values);
      if (PLANT != 13) __syncthreads();
      if (k + Left::kStep < depths) {
        Left::load(left, row, rows, k + Left::kStep, depths, scale, left_values);
        Right::load(right, column, columns, k + Left::kStep, depths, Ones{}, right_values);
      }
#pragma unroll
      for (int depth = 0; depth < Left::kStep; depth += F::kDepth) {
        typename F::A a[kFragmentsM];
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) Left::load_a(a[i], left_tile, line + i * 16, depth);
#pragma unroll
        for (int j = 0; j < kFragmentsN; j += 2) {
          typename F::B b[2];
          Right::load_b(b, right_tile, across + j * 8, depth);
#pragma unroll
          for (int i = 0; i < kFragmentsM; ++i) {
            F::multiply_add(acc[i][j], a[i], b[0]);
            F::multiply_add(acc[i][j + 1], a[i], b[1]);
          }
        }
      }
      __syncthreads();
    }
    const int g = static_cast<int>(threadIdx.x) % kWarp / 4, q = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int at_row = row + line + i * 16 + g + n / 2 * 8;
          const int at_column = column + across + j * 8 + 2 * q + n % 2;
          if (at_row < rows && at_column < columns) emit(at_row, at_column, acc[i][j][n]);
        }
      }
    }
  }
};

}  // namespace ciema::matrix
