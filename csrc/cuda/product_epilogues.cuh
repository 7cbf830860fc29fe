// What becomes of a product's results before they are stored (product.cuh): all in float32, vectors
// (rows,) or (B, rows) float32, other maps in the layout of the results.
#pragma once

#include "product.cuh"

namespace ciema::product {

__device__ __forceinline__ float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

// max(value, 0), and NaN where value is NaN.
__device__ __forceinline__ float relu(float value) { return value < 0.0f ? 0.0f : value; }

// Channel of the e-th element of a run; the last real one past the end, so that it may be looked up.
template <Layout kLayout>
__device__ __forceinline__ int channel_of(const Run& run, int e) {
  if (kLayout == Layout::kRows) return run.channel;
  return run.channel + (e < run.count ? e : run.count - 1);
}

// out = acc
template <class Out, Reduction kReduce = Reduction::kNone, bool kStore = true>
struct Plain {
  using Output = Out;
  static constexpr bool kStores = kStore;
  static constexpr Reduction kReduction = kReduce;

  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void apply(const Run&, float (&)[kRun]) const {}
};

// Batch norm with known statistics, folded: scale = γ / sqrt(var + eps), shift = β − mean · scale.
struct Norm {
  const float *weight, *bias, *mean, *var;
  float eps;

  __device__ __forceinline__ float operator()(int channel, float value) const {
    const float scale = weight[channel] / sqrtf(var[channel] + eps);
    return value * scale + (bias[channel] - mean[channel] * scale);
  }
};

// out = relu(norm(acc))
template <class Out, Reduction kReduce = Reduction::kNone, bool kStore = true>
struct NormRelu {
  using Output = Out;
  static constexpr bool kStores = kStore;
  static constexpr Reduction kReduction = kReduce;
  Norm norm;

  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void apply(const Run& run, float (&value)[kRun]) const {
#pragma unroll
    for (int e = 0; e < kRun; ++e) value[e] = relu(norm(channel_of<kLayout>(run, e), value[e]));
  }
};

// out = a ⊙ x + (1 − a) ⊙ acc, with a (B, rows)
template <class T>
struct Gate {
  using Output = T;
  static constexpr bool kStores = true;
  static constexpr Reduction kReduction = Reduction::kNone;
  const float* gate;
  Map x;
  int rows;

  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void apply(const Run& run, float (&value)[kRun]) const {
    float own[kRun];
    load_run<T>(x, run, own);
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      const float a = gate[run.b * rows + channel_of<kLayout>(run, e)];
      value[e] = a * own[e] + (1.0f - a) * value[e];
    }
  }
};

// out = φ ⊙ e + (1 − φ) ⊙ s with φ = σ(norm(acc)), s = e ⊙ w; w (B, G, S) as the loader has it
template <class T, Reduction kReduce = Reduction::kNone, bool kStore = true>
struct NormGate {
  using Output = T;
  static constexpr bool kStores = kStore;
  static constexpr Reduction kReduction = kReduce;
  Norm norm;
  Map e, w;
  int width;  // channels to a group

  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void apply(const Run& run, float (&value)[kRun]) const {
    float own[kRun];
    load_run<T>(e, run, own);
    const T* from = static_cast<const T*>(w.data) + run.b * w.stride_b + run.pixel * w.stride_s;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int channel = channel_of<kLayout>(run, i);
      const int pixel = kLayout == Layout::kRows ? (i < run.count ? i : run.count - 1) : 0;
      const float gate = to_float(from[channel / width * w.stride_c + pixel * w.stride_s]);
      const float phi = sigmoid(norm(channel, value[i]));
      value[i] = own[i] * (phi + gate * (1.0f - phi));
    }
  }
};

}  // namespace ciema::product
