// Gated fusion (spec.md 2.4), evaluation, in two launches (identity 5.3):
//
//   r = relu(BN1(W1∗s)), s = e ⊙ w                            `fold`, its first blocks
//   combined = (Wf_m·D2)·W2, D2 the scale of BN2              `fold`, blocks of 64×64
//   scale and shift of BN3, with Wf_m·shift2 in the latter    `fold`, a warp for a channel
//   out = e ⊙ (w + φ (1 − w)), φ = σ(scale ⊙ (Wf_s∗s + combined∗r) + shift)
//
// out may stay unwritten, with the moments of its tiles instead (identity 5.6), whose means
// gated_fusion_out.cuh merges.
// The forward that keeps its maps folds likewise, but for BN3, because the logits come before it:
// logits = Wf_s∗s + combined∗r + Wf_m·shift2, and M is never formed.
// Layouts, grid of the products, bytes: product.cuh; e comes twice, r goes out and in.
// Precision: s, r, combined and Wf_m·D2 are rounded to the map's dtype, all else is float32.
// Recomputed: s.
#pragma once

#include "gated_fusion_norms.cuh"
#include "matrix_product.cuh"
#include "product_epilogues.cuh"

namespace ciema {
namespace gated_fusion {

struct FoldParams {
  matrix::Matrix of_m;    // [o, c]
  matrix::Matrix expand;  // W2, [j, c]: c is the depth
  Norm norm2, norm3;      // norm3 without weight: the bias stays before it
  void* combined;         // (C, C/4) of what the weights are of
  float* bias;            // (C,), or with norm3 its scale and shift (2, C)
  int channels, squeezed;

  __host__ __device__ int product_blocks() const {
    return matrix::tiles(channels) * matrix::tiles(squeezed);
  }
  // Blocks of the launch, for `threads` each.
  __host__ __device__ int blocks(int threads) const {
    const int warps = threads / kWarp;
    return product_blocks() + (channels + warps - 1) / warps;
  }
};

template <class T, Precision kPrecision, int kThreads>
using FoldProduct = matrix::Product<T, T, kPrecision, true, false, kThreads>;

// A warp's Σ_c Wf_m[o, c] · shift2[c].
template <class T>
__device__ __forceinline__ float shifted_row(const FoldParams& p, int row) {
  float sum = 0.0f;
  for (int c = static_cast<int>(threadIdx.x) % kWarp; c < p.channels; c += kWarp) {
    sum += p.of_m.template at<T>(row, c) * p.norm2.shift(c);
  }
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(kFullMask, sum, lanes);
  }
  return sum;
}

template <class T, Precision kPrecision, int kThreads>
__device__ __forceinline__ void fold(const FoldParams& p, int block, T* shared) {
  if (block < p.product_blocks()) {
    FoldProduct<T, kPrecision, kThreads>::tile(
        p.of_m, p.expand, block, p.channels, p.squeezed, p.channels,
        [&](int c) { return p.norm2.scale(c); },
        [&](int o, int j, float value) {
          // Rounded to T by this or by the next product, which takes all weights alike.
          const int64_t at = static_cast<int64_t>(o) * p.squeezed + j;
          if (p.of_m.is_float) {
            static_cast<float*>(p.combined)[at] = value;
          } else {
            static_cast<T*>(p.combined)[at] = from_float<T>(value);
          }
        },
        shared);
    return;
  }
  const int row = (block - p.product_blocks()) * (kThreads / kWarp) +
                  static_cast<int>(threadIdx.x) / kWarp;
  if (row >= p.channels) return;  // whole warps
  const float sum = shifted_row<T>(p, row);
  if (static_cast<int>(threadIdx.x) % kWarp == 0) {
    if (p.norm3.weight == nullptr) {
      p.bias[row] = sum;
    } else {
      p.bias[row] = p.norm3.scale(row);
      p.bias[p.channels + row] = p.norm3.shift(row) + p.norm3.scale(row) * sum;
    }
  }
}

// What becomes of a product's results, which are scale ⊙ acc + shift first.
enum class Finish : int {
  kPlain,
  kRelu,  // max(·, 0)
  kGate,  // e ⊙ (w + φ (1 − w)), φ = σ(·)
  kMask,  // 0 where other is not > 0
};

// One epilogue for all products of this stage, so that they share kernels: the choice costs a
// branch a run, kernels of their own would cost minutes of compilation. out may be absent.
template <class T, product::Reduction kReduce>
struct Epilogue {
  using Output = T;
  static constexpr bool kStores = false;  // by itself
  static constexpr product::Reduction kReduction = kReduce;
  static constexpr int kVectors = 2;
  Finish finish;
  Norm norm;           // scale and shift, if it has a weight,
  const float* scale;  // else these; null: 1
  const float* shift;  // null: 0
  Map out, other, w;   // kGate: other is e
  int group_channels;
  Map partner;  // see Reduction
  const float* partner_mean;

  __device__ __forceinline__ void vectors(int64_t, int channel, float (&value)[2]) const {
    if (norm.weight != nullptr) {
      value[0] = norm.scale(channel);
      value[1] = norm.shift(channel);
    } else {
      value[0] = scale != nullptr ? scale[channel] : 1.0f;
      value[1] = shift != nullptr ? shift[channel] : 0.0f;
    }
  }

  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void apply(const Run& run, const float (&vectors)[2][kRun],
                                        float (&value)[kRun]) const {
#pragma unroll
    for (int i = 0; i < kRun; ++i) value[i] = value[i] * vectors[0][i] + vectors[1][i];
    if (finish == Finish::kRelu) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) value[i] = relu(value[i]);
    } else if (finish != Finish::kPlain) {
      float own[kRun], gate[kRun] = {};
      load_run<T>(other, run, own);
      if (finish == Finish::kGate) load_gates<T, kLayout>(w, run, group_channels, gate);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (finish == Finish::kGate) {
          value[i] = own[i] * (gate[i] + sigmoid(value[i]) * (1.0f - gate[i]));
        } else {
          value[i] = own[i] > 0.0f ? value[i] : 0.0f;
        }
      }
    }
    if (out.data == nullptr) return;
    // Statistics too are then of what is kept: a norm divides that by their spread, which may be
    // smaller than the rounding.
#pragma unroll
    for (int i = 0; i < kRun; ++i) value[i] = to_float(from_float<T>(value[i]));
    store_run<T>(out, run, value);
  }
};

// Results of a block. Those of split float32 take three times the operands' registers: half the
// channels. The pixels are the same, and with them the moments' parts.
template <class T>
using Shape = product::Tile<sizeof(T) == 2 ? 128 : 64, 128, 2, 4>;

// Where the last block of each channel tile merges the moments of its tiles, if there are counters:
// (row tiles,), zero before and after.
struct Statistics {
  int* counters;
  float* mean;
  float* var;
  TileMoments moments;
};

template <int kChannels>
__device__ __forceinline__ void store_statistics(const Statistics& statistics, int first,
                                                 int channels) {
  CIEMA_SHARED(float, mean, [kChannels]);
  CIEMA_SHARED(float, var, [kChannels]);
  merge_moments(statistics.moments, first, channels, mean, var);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < kChannels && first + lane < channels) {
    statistics.mean[first + lane] = mean[lane];
    statistics.var[first + lane] = var[lane];
  }
}

// A product in the first `product_blocks` blocks, and folding in the others, if there are any.
template <class T, Precision kPrecision, Layout kLayout, product::Reduction kReduce>
__global__ void __launch_bounds__(Shape<T>::kThreads, (product::min_blocks<T, Shape<T>>()))
    product_kernel(product::ProductParams p, Epilogue<T, kReduce> epilogue, int product_blocks,
                   FoldParams folding, Statistics statistics) {
  using Loading = product::ScaledThenPlainLoader;  // w and the second operand may be absent
  CIEMA_DYNAMIC_SHARED(T, shared);
  if constexpr (kReduce == product::Reduction::kNone) {
    const int block = static_cast<int>(blockIdx.x);
    if (block >= product_blocks) {
      fold<T, kPrecision, Shape<T>::kThreads>(folding, block - product_blocks, shared);
      return;
    }
  }
  using Main = product::Tiles<T, kPrecision, kLayout, Shape<T>, Loading>;
  const product::Corner corner = product::corner_of(p, Shape<T>::kM, Shape<T>::kN);
  typename Main::Accumulators acc = {};
  Main::accumulate(p, corner, shared, acc);
  product::Results<T, kPrecision, kLayout, Shape<T>, Loading, Epilogue<T, kReduce>>::store(
      p, corner, epilogue, acc, reinterpret_cast<float*>(shared));
  if constexpr (kReduce != product::Reduction::kNone) {
    if (statistics.counters == nullptr) return;
    int* counter = statistics.counters + corner.channel / Shape<T>::kM;
    if (arrive_last(counter, statistics.moments.parts)) {
      store_statistics<Shape<T>::kM>(statistics, corner.channel, p.rows);
    }
  }
}

}  // namespace gated_fusion
}  // namespace ciema
