// Gated fusion (spec.md 2.4), the passes between the products of the forward that keeps its maps:
//
//   r = relu(BN1(hidden))      out = e ⊙ (w + φ (1 − w)), φ = σ(BN3(logits))
//
// and the means of out from the moments of its tiles (`mean`, identity 5.6).
// Grid: (channel block) × (run of pixel tiles), see gated_fusion_maps.cuh. In training every block
// first merges the moments of its channels (gated_fusion_norms.cuh); those of run 0 store them.
// Bytes, in passes over e: relu 0.5; out 3 and w. Everything in float32; r and out are rounded to
// the map's dtype.
#pragma once

#include "gated_fusion_norms.cuh"

namespace ciema {
namespace gated_fusion {

// A norm whose statistics are known, or (with moments) still to be merged and stored.
struct NormSource {
  TileMoments moments;
  float* mean;
  float* var;
  const float* weight;
  const float* bias;
  float eps;
};

// Scale and shift of a thread's channels. All threads call it; `stores` of one block a channel.
template <class L>
__device__ __forceinline__ void norm_of_block(const NormSource& norm, int first, int channels,
                                              bool stores, float (&scale)[L::kOwn],
                                              float (&shift)[L::kOwn]) {
  CIEMA_SHARED(float, mean, [L::kChannels]);
  CIEMA_SHARED(float, var, [L::kChannels]);
  const int lane = static_cast<int>(threadIdx.x);
  const bool mine = lane < L::kChannels && first + lane < channels;
  if (norm.moments.data != nullptr) {
    merge_moments(norm.moments, first, channels, mean, var);
    if (stores && mine) {
      norm.mean[first + lane] = mean[lane];
      norm.var[first + lane] = var[lane];
    }
  } else {
    if (mine) {
      mean[lane] = norm.mean[first + lane];
      var[lane] = norm.var[first + lane];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < L::kOwn; ++i) {
    const int own = L::channel() + i;
    const bool known = first + own < channels;
    scale[i] = known ? norm.weight[first + own] * rsqrtf(var[own] + norm.eps) : 0.0f;
    shift[i] = known ? norm.bias[first + own] - mean[own] * scale[i] : 0.0f;
  }
}

struct ReluParams {
  Map hidden, r;
  NormSource norm;
  int* counters;  // of the next product's Statistics, to be zeroed
  int counts;
  Cover cover;
};

template <class L>
__global__ void __launch_bounds__(kThreads) relu_kernel(ReluParams p) {
  const int first = static_cast<int>(blockIdx.x) / p.cover.runs * L::kChannels;
  const int block_run = static_cast<int>(blockIdx.x) % p.cover.runs;
  const int channel = first + L::channel();
  if (blockIdx.x == 0 && p.counters != nullptr) {
    for (int i = static_cast<int>(threadIdx.x); i < p.counts; i += kThreads) p.counters[i] = 0;
  }
  float scale[L::kOwn], shift[L::kOwn];
  norm_of_block<L>(p.norm, first, p.cover.channels, block_run == 0, scale, shift);
  if (channel >= p.cover.channels) return;
  L::for_each(p.cover, block_run, channel, [&](const Run& run) {
    float value[L::kRun];
    load_run<typename L::T>(p.hidden, run, value);
#pragma unroll
    for (int i = 0; i < L::kRun; ++i) {
      value[i] = relu(value[i] * scale[L::own(i)] + shift[L::own(i)]);
    }
    store_run<typename L::T>(p.r, run, value);
  });
}

struct OutParams {
  Map e, w, logits, out;
  NormSource norm;
  int group_channels;
  Cover cover;
};

template <class L>
__global__ void __launch_bounds__(kThreads) out_kernel(OutParams p) {
  const int first = static_cast<int>(blockIdx.x) / p.cover.runs * L::kChannels;
  const int block_run = static_cast<int>(blockIdx.x) % p.cover.runs;
  const int channel = first + L::channel();
  float scale[L::kOwn], shift[L::kOwn];
  norm_of_block<L>(p.norm, first, p.cover.channels, block_run == 0, scale, shift);
  if (channel >= p.cover.channels) return;
  L::for_each(p.cover, block_run, channel, [&](const Run& run) {
    float value[L::kRun], e[L::kRun], gate[L::kRun];
    load_run<typename L::T>(p.logits, run, value);
    load_run<typename L::T>(p.e, run, e);
    load_gates<typename L::T, L::kLayout>(p.w, run, p.group_channels, gate);
#pragma unroll
    for (int i = 0; i < L::kRun; ++i) {
      const float phi = sigmoid(value[i] * scale[L::own(i)] + shift[L::own(i)]);
      value[i] = e[i] * (gate[i] + phi * (1.0f - gate[i]));
    }
    store_run<typename L::T>(p.out, run, value);
  });
}

constexpr int kMeanChannels = 8;  // of a block: a sector of 32 bytes

// Means (B, C) of a map from the moments of its tiles; a block has kMeanChannels of a sample.
struct MeanParams {
  TileMoments moments;
  float* mean;
  int channels;
};

__global__ void __launch_bounds__(kThreads) mean_kernel(MeanParams p) {
  const int blocks = (p.channels + kMeanChannels - 1) / kMeanChannels;
  const int64_t sample = static_cast<int>(blockIdx.x) / blocks;
  const int first = static_cast<int>(blockIdx.x) % blocks * kMeanChannels;
  CIEMA_SHARED(float, mean, [kMeanChannels]);
  CIEMA_SHARED(float, var, [kMeanChannels]);
  TileMoments moments = p.moments;
  moments.parts = moments.tiles;
  moments.data += sample * moments.tiles * 2 * p.channels;
  merge_moments(moments, first, p.channels, mean, var);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < kMeanChannels && first + lane < p.channels) {
    p.mean[sample * p.channels + first + lane] = mean[lane];
  }
}

}  // namespace gated_fusion
}  // namespace ciema
