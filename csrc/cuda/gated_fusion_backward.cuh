// Gated fusion (spec.md 2.4), backward through the middle: Wf_m, BN2, W2, and to e and w. With
// z the gradient of the logits (gated_fusion_gate_backward.cuh), r and s as there:
//
//   N = z·rᵀ, Q = r·rᵀ, S = z·sᵀ        summed over samples and pixels, by the library
//   grad_Wf = [S | N·(D2·W2)ᵀ + Σz·shift2ᵀ]             K = Wf_mᵀ·N
//   grad_γ2 = rstd2 ⊙ (Σ_j W2 ⊙ K − mean2 ⊙ Wf_mᵀ·Σz)   grad_β2 = Wf_mᵀ·Σz
//   slope   = scale2 ⊙ rstd2 ⊙ grad_γ2 / count
//   grad_W2 = scale2 ⊙ K − slope ⊙ (W2·Q − mean2·(Σr)ᵀ)
//   h       = (r > 0) ⊙ ((Wf_m·D2·W2)ᵀ∗z − (W2ᵀ·slope·W2)∗r + W2ᵀ·(slope ⊙ mean2))
//   of_s    = Wf_sᵀ∗z + W1ᵀ∗BN1ᵀ(h)
//   grad_e  = g ⊙ (w + φ (1 − w)) + of_s ⊙ w      grad_w = Σ_c e ⊙ (g (1 − φ) + of_s)
//
// M and its gradient are never formed: they meet the pixels through r alone. In training Σz is 0,
// as batch norm takes off what it adds; frozen norms have no slope.
// Kernels: `matrices` (grad_Wf, K, W2·Q, and the weights of the two products over pixels as these
// take them), `rows` (what belongs to a channel of M), `statistics` (W2ᵀ·slope·W2), `input` (grad_e
// and grad_w; a thread adds up one group, so in a fixed order). h and of_s are products of
// gated_fusion.cuh. Precision: gradients of weights as split float32; operands of h and of_s in the
// map's dtype. Bytes of `input`: g, e, logits, of_s in, grad_e out: 5 passes, w and grad_w.
#pragma once

#include "gated_fusion.cuh"

namespace ciema {
namespace gated_fusion {

struct MatricesParams {
  const void* fusion;   // (C, 2C)
  const void* expand;   // (C, C/4)
  const void* squeeze;  // (C/4, C)
  bool is_float;        // all three, and grad_fusion; else of T
  Norm norm2, norm3;
  const float* by_maps;    // (C, C + C/4): [S | N]
  const float* squares;    // Q (C/4, C/4), training
  const float* grad_bias;  // of norm 3
  void* grad_fusion;       // (C, 2C)
  float* of_expand;        // K (C, C/4)
  float* of_squares;       // W2·Q (C, C/4), training
  void* to_hidden;         // (C/4, C + C/4) of T; its last C/4 columns are for `statistics`
  void* to_s;              // (C, C + C/4) of T: [Wf_sᵀ | W1ᵀ]
  int channels, squeezed;
  bool training;

  __host__ __device__ int wide() const { return matrix::tiles(channels); }
  __host__ __device__ int narrow() const { return matrix::tiles(squeezed); }
  // Blocks: to_hidden, K, W2·Q, grad_Wf's right half, then to_s and its left half.
  __host__ __device__ int blocks() const {
    return 2 * wide() * narrow() + (training ? wide() * narrow() : 0) + wide() * wide() +
           2 * wide() * wide() + wide() * narrow();
  }
};

constexpr int kMatrixThreads = 128;

template <class Element>
__device__ __forceinline__ void store_weight(void* to, int64_t at, float value, bool is_float) {
  if (is_float) {
    static_cast<float*>(to)[at] = value;
  } else {
    static_cast<Element*>(to)[at] = from_float<Element>(value);
  }
}

// to[column, row] = from[row, column], 64×64 at a time through shared memory.
template <class T, class Store>
__device__ __forceinline__ void transpose(const matrix::Matrix& from, int block, int rows,
                                          int columns, float* shared, Store store) {
  constexpr int kPitch = matrix::kTile + 1;
  const int row = block / matrix::tiles(columns) * matrix::kTile;
  const int column = block % matrix::tiles(columns) * matrix::kTile;
  for (int i = static_cast<int>(threadIdx.x); i < matrix::kTile * matrix::kTile;
       i += kMatrixThreads) {
    const int line = i / matrix::kTile, at = i % matrix::kTile;
    if (row + line < rows && column + at < columns) {
      shared[line * kPitch + at] = from.template at<T>(row + line, column + at);
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < matrix::kTile * matrix::kTile;
       i += kMatrixThreads) {
    const int at = i / matrix::kTile, line = i % matrix::kTile;
    if (row + line < rows && column + at < columns) {
      store(column + at, row + line, shared[line * kPitch + at]);
    }
  }
}

// Shared memory: the larger of two float32 tiles of a product and a tile of a transposition.
constexpr int kMatrixShared = (2 * matrix::kTile * 24 > matrix::kTile * (matrix::kTile + 1)
                                   ? 2 * matrix::kTile * 24
                                   : matrix::kTile * (matrix::kTile + 1)) *
                              static_cast<int>(sizeof(float));

// The products of `matrices`; false if the block belongs to something else.
template <class T>
__device__ __forceinline__ bool multiply_matrices(const MatricesParams& p, int& block,
                                                  void* shared) {
  using matrix::Matrix;
  constexpr Precision kExact = Precision::kSplit;
  constexpr int64_t kOne = 1;
  const int c = p.channels, q = p.squeezed;
  const int64_t wide = c, narrow = q, both = c + q;
  const void* of_m = static_cast<const char*>(p.fusion) +
                     wide * (p.is_float ? sizeof(float) : sizeof(T));
  const float* by_r = p.by_maps + wide;
  const int tiles = p.wide() * p.narrow();
  float* floats = static_cast<float*>(shared);
  if (block < tiles) {
    matrix::Product<T, T, kExact, false, true, kMatrixThreads>::tile(
        Matrix{p.expand, kOne, narrow, p.is_float}, Matrix{of_m, 2 * wide, kOne, p.is_float},
        block, q, c, c, [&](int k) { return p.norm2.scale(k); },
        [&](int j, int o, float value) {
          static_cast<T*>(p.to_hidden)[j * both + o] = from_float<T>(value);
        },
        static_cast<T*>(shared));
    return true;
  }
  block -= tiles;
  if (block < tiles) {
    matrix::Product<float, T, kExact, false, false, kMatrixThreads>::tile(
        Matrix{of_m, kOne, 2 * wide, p.is_float}, Matrix{by_r, kOne, both, true}, block, c, q, c,
        matrix::Ones{},
        [&](int m, int j, float value) { p.of_expand[m * narrow + j] = value; }, floats);
    return true;
  }
  block -= tiles;
  const bool of_squares = p.training && block < tiles;
  if (p.training && !of_squares) block -= tiles;
  const Matrix expand{p.expand, narrow, kOne, p.is_float};
  const Matrix left = of_squares ? expand : Matrix{by_r, both, kOne, true};
  const Matrix right = of_squares ? Matrix{p.squares, narrow, kOne, true} : expand;
  if (!of_squares && block >= p.wide() * p.wide()) {
    block -= p.wide() * p.wide();
    return false;
  }
  matrix::Product<float, T, kExact, true, true, kMatrixThreads>::tile(
      left, right, block, c, of_squares ? q : c, q, matrix::Ones{},
      [&](int row, int column, float value) {
        if (of_squares) {
          p.of_squares[row * narrow + column] = value;
          return;
        }
        value *= p.norm2.scale(column);
        if (!p.training) {
          value += p.norm3.scale(row) * p.grad_bias[row] * p.norm2.shift(column);
        }
        store_weight<T>(p.grad_fusion, row * 2 * wide + wide + column, value, p.is_float);
      },
      floats);
  return true;
}

template <class T>
__global__ void __launch_bounds__(kMatrixThreads, 2) matrices_kernel(MatricesParams p) {
  CIEMA_SHARED(float, shared, [kMatrixShared / sizeof(float)]);
  const int c = p.channels, q = p.squeezed;
  const int64_t both = c + q;
  int block = static_cast<int>(blockIdx.x);
  if (multiply_matrices<T>(p, block, shared)) return;
  const auto to_s = [&](int row, int64_t column, float value) {
    static_cast<T*>(p.to_s)[row * both + column] = from_float<T>(value);
  };
  const int square = p.wide() * p.wide();
  if (block < square) {
    transpose<T>({p.fusion, 2 * static_cast<int64_t>(c), 1, p.is_float}, block, c, c, shared, to_s);
    return;
  }
  block -= square;
  if (block < square) {
    const int row = block / p.wide() * matrix::kTile, column = block % p.wide() * matrix::kTile;
    for (int i = static_cast<int>(threadIdx.x); i < matrix::kTile * matrix::kTile;
         i += kMatrixThreads) {
      const int64_t line = row + i / matrix::kTile, at = column + i % matrix::kTile;
      if (line < c && at < c) {
        store_weight<T>(p.grad_fusion, line * 2 * c + at, p.by_maps[line * both + at], p.is_float);
      }
    }
    return;
  }
  block -= square;
  transpose<T>({p.squeeze, c, 1, p.is_float}, block, q, c, shared,
               [&](int row, int column, float value) { to_s(row, c + column, value); });
}

struct RowsParams {
  const void* fusion;
  const void* expand;
  bool is_float;
  Norm norm2, norm3;
  const float* of_expand;
  const float* of_squares;
  const float* sum_r;
  const float* grad_bias3;
  float* grad_weight;  // of norm 2
  float* grad_bias;
  void* grad_expand;
  float* slope;
  int channels, squeezed;
  float count;
  bool training;
};

__device__ __forceinline__ float add_warp(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kFullMask, value, lanes);
  }
  return value;
}

// A warp for a channel of M.
template <class T>
__global__ void __launch_bounds__(kThreads) rows_kernel(RowsParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int m = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (m >= p.channels) return;  // whole warps
  const int64_t c = p.channels, q = p.squeezed;
  const matrix::Matrix expand{p.expand, q, 1, p.is_float};
  float of_normalised = 0.0f, total = 0.0f;
  for (int j = lane; j < q; j += kWarp) {
    of_normalised += expand.at<T>(m, j) * p.of_expand[m * q + j];
  }
  of_normalised = add_warp(of_normalised);
  if (!p.training) {
    const matrix::Matrix fusion{p.fusion, 2 * c, 1, p.is_float};
    for (int o = lane; o < c; o += kWarp) {
      total += fusion.at<T>(o, static_cast<int>(c) + m) * p.norm3.scale(o) * p.grad_bias3[o];
    }
    total = add_warp(total);
  }
  const float rstd = p.norm2.rstd(m), scale = p.norm2.scale(m), mean = p.norm2.mean[m];
  const float weighted = rstd * (of_normalised - mean * total);
  const float slope = p.training ? scale * rstd * weighted / p.count : 0.0f;
  if (lane == 0) {
    p.grad_weight[m] = weighted;
    p.grad_bias[m] = total;
    p.slope[m] = slope;
  }
  for (int j = lane; j < q; j += kWarp) {
    float value = scale * p.of_expand[m * q + j];
    if (p.training) value -= slope * (p.of_squares[m * q + j] - mean * p.sum_r[j]);
    store_weight<T>(p.grad_expand, m * q + j, value, p.is_float);
  }
}

struct StatisticsParams {
  const void* expand;
  bool is_float;
  Norm norm2;
  const float* slope;
  void* of_r;    // the last C/4 columns of to_hidden
  float* shift;  // (C/4,): W2ᵀ·(slope ⊙ mean2)
  int channels, squeezed;
};

template <class T>
__global__ void __launch_bounds__(kMatrixThreads) statistics_kernel(StatisticsParams p) {
  CIEMA_SHARED(float, shared, [kMatrixShared / sizeof(float)]);
  const int64_t q = p.squeezed, both = p.channels + q;
  const int tiles = matrix::tiles(p.squeezed) * matrix::tiles(p.squeezed);
  const matrix::Matrix expand{p.expand, 1, q, p.is_float};
  int block = static_cast<int>(blockIdx.x);
  if (block < tiles) {
    matrix::Product<T, T, Precision::kSplit, false, false, kMatrixThreads>::tile(
        expand, expand, block, p.squeezed, p.squeezed, p.channels,
        [&](int k) { return p.slope[k]; },
        [&](int row, int column, float value) {
          static_cast<T*>(p.of_r)[row * both + column] = from_float<T>(-value);
        },
        reinterpret_cast<T*>(&shared[0]));
    return;
  }
  // A column for a lane, its channels shared by the warps.
  constexpr int kRows = kMatrixThreads / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = static_cast<int>(threadIdx.x) / kWarp;
  const int j = (block - tiles) * kWarp + lane;
  float sum = 0.0f;
  for (int m = row; j < q && m < p.channels; m += kRows) {
    sum += expand.at<T>(j, m) * p.slope[m] * p.norm2.mean[m];
  }
  shared[row * kWarp + lane] = sum;
  __syncthreads();
  if (row == 0 && j < q) {
    for (int other = 1; other < kRows; ++other) sum += shared[other * kWarp + lane];
    p.shift[j] = sum;
  }
}

struct InputParams {
  Map grad_out, e, w, logits, of_s, grad_e, grad_w;
  const float* affine;  // (2, C): norm 3's scale and shift
  bool affine_aligned;  // at every run
  int channels;
  int batch, groups, group_channels, pixels;
};

constexpr int kInputThreads = 128;

// A vector (C,) at the elements of a run.
template <Layout kLayout, int kRun>
__device__ __forceinline__ void load_channels(const float* vector, const Run& run, bool aligned,
                                              float (&value)[kRun]) {
  constexpr int kFloats = Vector<float>::kElements;
  const float* own = vector + run.channel;
  if constexpr (kLayout == Layout::kRows) {
    const float all = *own;
#pragma unroll
    for (int i = 0; i < kRun; ++i) value[i] = all;
  } else if (aligned && run.count >= kRun) {
#pragma unroll
    for (int part = 0; part < kRun; part += kFloats) {
      const auto four = load_vector<Vector<float>>(own + part);
#pragma unroll
      for (int i = 0; i < kFloats; ++i) value[part + i] = four.element[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) value[i] = i < run.count ? own[i] : 0.0f;
  }
}

// A thread goes through the channels of one group: rows at a run of pixels, channels_last at one.
template <class T, Layout kLayout>
__global__ void __launch_bounds__(kInputThreads) input_kernel(InputParams p) {
  constexpr bool kRows = kLayout == Layout::kRows;
  constexpr int kRun = Vector<T>::kElements;
  constexpr int kPixels = kRows ? kRun : 1, kChannels = kRows ? 1 : kRun;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kInputThreads + threadIdx.x;
  const int runs = (p.pixels + kPixels - 1) / kPixels;
  // Neighbours in memory are neighbouring threads.
  const int inner = kRows ? runs : p.groups, outer = kRows ? p.groups : runs;
  const int at = static_cast<int>(index % inner), across = static_cast<int>(index / inner % outer);
  const int64_t sample = index / inner / outer;
  if (sample >= p.batch) return;
  const int group = kRows ? across : at, pixel = (kRows ? at : across) * kPixels;
  const int pixels = p.pixels - pixel;
  float gate[kPixels], sum[kPixels] = {};
  load_run<T>(p.w, {sample, group, pixel, pixels}, gate);
  for (int k = 0; k < p.group_channels; k += kChannels) {
    const int channel = group * p.group_channels + k;
    const Run run{sample, channel, pixel, kRows ? pixels : p.group_channels - k};
    float grad[kRun], e[kRun], phi[kRun], of_s[kRun], scale[kRun], shift[kRun];
    load_channels<kLayout>(p.affine, run, p.affine_aligned, scale);
    load_channels<kLayout>(p.affine + p.channels, run, p.affine_aligned, shift);
    load_run<T>(p.grad_out, run, grad);
    load_run<T>(p.e, run, e);
    load_run<T>(p.logits, run, phi);
    load_run<T>(p.of_s, run, of_s);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i >= run.count) continue;
      const int n = kRows ? i : 0;
      const float f = sigmoid(phi[i] * scale[i] + shift[i]);
      sum[n] += e[i] * (grad[i] * (1.0f - f) + of_s[i]);
      grad[i] = grad[i] * (gate[n] + f * (1.0f - gate[n])) + of_s[i] * gate[n];
    }
    store_run<T>(p.grad_e, run, grad);
  }
  store_run<T>(p.grad_w, {sample, group, pixel, pixels}, sum);
}

}  // namespace gated_fusion
}  // namespace ciema
