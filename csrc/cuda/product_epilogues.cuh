// What becomes of a product's results before they are stored (product.cuh): all in float32, vectors
// (rows,) or (B, rows) float32, other maps in the layout of the results.
#pragma once

#include "product.cuh"

namespace ciema::product {

__device__ __forceinline__ float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

// max(value, 0), and NaN where value is NaN.
__device__ __forceinline__ float relu(float value) { return value < 0.0f ? 0.0f : value; }

// out = acc
template <class Out, Reduction kReduce = Reduction::kNone, bool kStore = true>
struct Plain {
  using Output = Out;
  static constexpr bool kStores = kStore;
  static constexpr Reduction kReduction = kReduce;
  static constexpr int kVectors = 0;

  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void apply(const Run&, const float (&)[1][kRun],
                                        float (&)[kRun]) const {}
};

// Batch norm with known statistics as scale = γ / sqrt(var + eps) and shift = β − mean · scale.
struct Norm {
  const float *weight, *bias, *mean, *var;
  float eps;

  __device__ __forceinline__ void vectors(int channel, float& scale, float& shift) const {
    scale = weight[channel] / sqrtf(var[channel] + eps);
    shift = bias[channel] - mean[channel] * scale;
  }
};

// out = relu(norm(acc))
template <class Out, Reduction kReduce = Reduction::kNone, bool kStore = true>
struct NormRelu {
  using Output = Out;
  static constexpr bool kStores = kStore;
  static constexpr Reduction kReduction = kReduce;
  static constexpr int kVectors = 2;
  Norm norm;

  __device__ __forceinline__ void vectors(int64_t, int channel, float (&value)[2]) const {
    norm.vectors(channel, value[0], value[1]);
  }
  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void apply(const Run&, const float (&vectors)[2][kRun],
                                        float (&value)[kRun]) const {
#pragma unroll
    for (int e = 0; e < kRun; ++e) value[e] = relu(value[e] * vectors[0][e] + vectors[1][e]);
  }
};

// out = a ⊙ x + (1 − a) ⊙ acc, with a (B, rows)
template <class T>
struct Gate {
  using Output = T;
  static constexpr bool kStores = true;
  static constexpr Reduction kReduction = Reduction::kNone;
  static constexpr int kVectors = 1;
  const float* gate;
  Map x;
  int rows;

  __device__ __forceinline__ void vectors(int64_t b, int channel, float (&value)[1]) const {
    value[0] = gate[b * rows + channel];
  }
  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void apply(const Run& run, const float (&vectors)[1][kRun],
                                        float (&value)[kRun]) const {
    float own[kRun];
    load_run<T>(x, run, own);
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      value[e] = vectors[0][e] * own[e] + (1.0f - vectors[0][e]) * value[e];
    }
  }
};

// out = φ ⊙ e + (1 − φ) ⊙ s with φ = σ(norm(acc)), s = e ⊙ w; w (B, G, S) as the loader has it
template <class T, Reduction kReduce = Reduction::kNone, bool kStore = true>
struct NormGate {
  using Output = T;
  static constexpr bool kStores = kStore;
  static constexpr Reduction kReduction = kReduce;
  static constexpr int kVectors = 2;
  Norm norm;
  Map e, w;
  int width;  // channels to a group

  __device__ __forceinline__ void vectors(int64_t, int channel, float (&value)[2]) const {
    norm.vectors(channel, value[0], value[1]);
  }
  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void apply(const Run& run, const float (&vectors)[2][kRun],
                                        float (&value)[kRun]) const {
    float own[kRun], gate[kRun];
    load_run<T>(e, run, own);
    load_gate<kLayout>(run, gate);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float phi = sigmoid(value[i] * vectors[0][i] + vectors[1][i]);
      value[i] = own[i] * (phi + gate[i] * (1.0f - phi));
    }
  }

 private:
  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void load_gate(const Run& run, float (&gate)[kRun]) const {
    const Run first{run.b, run.channel / width, run.pixel, run.count};
    if (kLayout == Layout::kRows && w.stride_s == 1) return load_run<T>(w, first, gate);
    if (kLayout == Layout::kChannelsLast && width % kRun == 0) {
      const float one = to_float(*address_of<const T>(w, first));
#pragma unroll
      for (int i = 0; i < kRun; ++i) gate[i] = one;
      return;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const bool rows = kLayout == Layout::kRows;
      const Run own{run.b, (run.channel + (rows ? 0 : i)) / width, run.pixel + (rows ? i : 0), 1};
      gate[i] = i < run.count ? to_float(*address_of<const T>(w, own)) : 0.0f;
    }
  }
};

}  // namespace ciema::product
