// Gated fusion (spec.md 2.4), evaluation, in two launches (identity 5.3):
//
//   r = relu(BN1(W1∗s)), s = e ⊙ w                            `fold`, its first blocks
//   combined = (Wf_m·D2)·W2, D2 the scale of BN2              `fold`, blocks of 64×64
//   scale and shift of BN3, with Wf_m·shift2 in the latter    `fold`, a warp for a channel
//   out = e ⊙ (w + φ (1 − w)), φ = σ(scale ⊙ (Wf_s∗s + combined∗r) + shift)
//
// out may stay unwritten, with the sums of its tiles instead (identity 5.6), which
// gated_fusion_out.cuh adds up.
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

// What becomes of a product's results; out may be absent.
enum class Finish : int {
  kPlain,
  kBias,  // + shift[channel]
  kRelu,  // relu(norm(acc))
  kGate,  // e ⊙ (w + φ (1 − w)), φ = σ(scale[channel] · acc + shift[channel])
  kMask,  // acc (+ shift[channel], if there is one) where other > 0, else 0
};

// A vector (C,) at the channels of a run.
template <Layout kLayout, int kRun>
__device__ __forceinline__ void load_channels(const float* vector, const Run& run,
                                              float (&value)[kRun]) {
  if constexpr (kLayout == Layout::kRows) {
    const float all = vector[run.channel];
#pragma unroll
    for (int e = 0; e < kRun; ++e) value[e] = all;
  } else {
#pragma unroll
    for (int e = 0; e < kRun; ++e) value[e] = vector[product::channel_of<kLayout>(run, e)];
  }
}

// One epilogue for all products of this stage, so that they share kernels: the choice costs a branch
// a run, the kernels would cost minutes of compilation.
template <class T, product::Reduction kReduce>
struct Epilogue {
  using Output = T;
  static constexpr bool kStores = false;  // by itself
  static constexpr product::Reduction kReduction = kReduce;
  Finish finish;
  Norm norm;
  const float* scale;
  const float* shift;
  Map out, other, w;  // kGate: other is e
  int group_channels;

  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void apply(const Run& run, float (&value)[kRun]) const {
    if (finish == Finish::kGate) {
      gate<kLayout>(run, value);
    } else if (finish == Finish::kRelu) {
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        const int channel = product::channel_of<kLayout>(run, e);
        value[e] = relu((value[e] - norm.mean[channel]) * norm.scale(channel) +
                        norm.bias[channel]);
      }
    } else if (finish != Finish::kPlain) {
      float addend[kRun];
      if (shift != nullptr) {
        load_channels<kLayout>(shift, run, addend);
#pragma unroll
        for (int e = 0; e < kRun; ++e) value[e] += addend[e];
      }
      if (finish == Finish::kMask) {
        load_run<T>(other, run, addend);
#pragma unroll
        for (int e = 0; e < kRun; ++e) value[e] = addend[e] > 0.0f ? value[e] : 0.0f;
      }
    }
    if (out.data != nullptr) store_run<T>(out, run, value);
  }

  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void gate(const Run& run, float (&value)[kRun]) const {
    float own[kRun];
    load_channels<kLayout>(scale, run, own);
#pragma unroll
    for (int e = 0; e < kRun; ++e) value[e] *= own[e];
    load_channels<kLayout>(shift, run, own);
#pragma unroll
    for (int e = 0; e < kRun; ++e) value[e] = sigmoid(value[e] + own[e]);
    if constexpr (kLayout == Layout::kRows) {
      load_run<T>(w, {run.b, run.channel / group_channels, run.pixel, run.count}, own);
    } else {
      const T* from = product::address_of<T>(w, {run.b, 0, run.pixel, 0});
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        const int channel = product::channel_of<kLayout>(run, e);
        own[e] = to_float(from[channel / group_channels * w.stride_c]);
      }
    }
#pragma unroll
    for (int e = 0; e < kRun; ++e) value[e] = own[e] + value[e] * (1.0f - own[e]);
    load_run<T>(other, run, own);
#pragma unroll
    for (int e = 0; e < kRun; ++e) value[e] *= own[e];
  }
};

// A product in the first `product_blocks` blocks, and folding in the others, if there are any.
template <class T, Precision kPrecision, Layout kLayout, class Shape, product::Reduction kReduce>
__global__ void __launch_bounds__(Shape::kThreads, sizeof(T) == 2 ? 2 : 1)
    product_kernel(product::ProductParams p, Epilogue<T, kReduce> epilogue, int product_blocks,
                   FoldParams folding) {
  using Loading = product::ScaledThenPlainLoader;  // w and the second operand may be absent
  CIEMA_DYNAMIC_SHARED(T, shared);
  if constexpr (kReduce == product::Reduction::kNone) {
    const int block = static_cast<int>(blockIdx.x);
    if (block >= product_blocks) {
      fold<T, kPrecision, Shape::kThreads>(folding, block - product_blocks, shared);
      return;
    }
  }
  using Main = product::Tiles<T, kPrecision, kLayout, Shape, Loading>;
  const product::Corner corner = product::corner_of(p, Shape::kM, Shape::kN);
  typename Main::Accumulators acc = {};
  Main::accumulate(p, corner, shared, acc);
  product::Results<T, kPrecision, kLayout, Shape, Loading, Epilogue<T, kReduce>>::store(
      p, corner, epilogue, acc, reinterpret_cast<float*>(shared));
}

}  // namespace gated_fusion
}  // namespace ciema
