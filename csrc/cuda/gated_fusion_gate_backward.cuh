// Gated fusion (spec.md 2.4), backward through out, φ and the third norm, map by map; g is out's
// gradient:
//
//   t = g ⊙ e ⊙ (1 − w) ⊙ φ (1 − φ)      gradient of BN3's result
//   z = BN3ᵀ(t)                          of the logits, BNᵀ(t) = gain·t + slope·(x − mean) + level
//   s = e ⊙ w      r = relu(BN1(hidden))  side by side in one map, for the weights' gradients
//   BN1ᵀ(h)                              h, the gradient of BN1's result, comes from a product
//
// Three kernels: `gate_sums` (sums of t and t ⊙ n; further blocks write r and its sums),
// `grad_logits` (z and s; further blocks add up Σr), `norm_backward` (BN1ᵀ(h), from the sums that
// the product left). Grid: (channel block) × (run of pixel tiles), see gated_fusion_maps.cuh; every
// block of the last two first adds up the sums of its channels, and those of run 0 store what
// belongs to a channel.
// Bytes, in passes over e: gate_sums 3.5, with hidden and r; grad_logits 5; norm_backward 0.75; w
// twice. Everything in float32; z, s, r and BN1ᵀ(h) are rounded to the map's dtype.
#pragma once

#include "gated_fusion_norms.cuh"

namespace ciema {
namespace gated_fusion {

struct GateMaps {
  Map grad_out, e, w, logits;
  int group_channels;
};

// A thread's values of t and of the logits, at one place.
template <class L>
struct GateGradient {
  float t[L::kRun], logit[L::kRun], e[L::kRun], gate[L::kRun];

  __device__ __forceinline__ GateGradient(const GateMaps& maps,
                                          const float (&scale)[L::kOwn],
                                          const float (&shift)[L::kOwn], const Run& run) {
    load_run<typename L::T>(maps.grad_out, run, t);
    load_run<typename L::T>(maps.logits, run, logit);
    load_run<typename L::T>(maps.e, run, e);
    load_gates<typename L::T, L::kLayout>(maps.w, run, maps.group_channels, gate);
#pragma unroll
    for (int i = 0; i < L::kRun; ++i) {
      const float phi = sigmoid(logit[i] * scale[L::own(i)] + shift[L::own(i)]);
      t[i] *= e[i] * (1.0f - gate[i]) * phi * (1.0f - phi);
    }
  }
};

template <class L>
__device__ __forceinline__ void load_norm(const Norm& norm, int channel, int channels,
                                          float (&scale)[L::kOwn], float (&shift)[L::kOwn],
                                          float (&mean)[L::kOwn]) {
#pragma unroll
  for (int i = 0; i < L::kOwn; ++i) {
    const bool known = channel + i < channels;
    scale[i] = known ? norm.scale(channel + i) : 0.0f;
    shift[i] = known ? norm.shift(channel + i) : 0.0f;
    mean[i] = known ? norm.mean[channel + i] : 0.0f;
  }
}

struct GateSumsParams {
  GateMaps maps;
  Map hidden;
  Map r;
  Norm norm1, norm3;
  float* sums;    // (runs, 2, C): of t and t ⊙ n
  float* sums_r;  // (runs, 1, C/4)
  Cover cover, cover_r;
};

// r, and the sums of a run.
template <class L>
__device__ __forceinline__ void write_relu(const GateSumsParams& p,
                                           int block) {
  const Cover& cover = p.cover_r;
  const int first = block / cover.runs * L::kChannels;
  const int block_run = block % cover.runs;
  const int channel = first + L::channel();
  float scale[L::kOwn], shift[L::kOwn], mean[L::kOwn];
  load_norm<L>(p.norm1, channel, cover.channels, scale, shift, mean);
  float sum[1][L::kOwn] = {};
  if (channel < cover.channels) {
    L::for_each(cover, block_run, channel, [&](const Run& run) {
      float value[L::kRun];
      load_run<typename L::T>(p.hidden, run, value);
#pragma unroll
      for (int i = 0; i < L::kRun; ++i) {
        value[i] = relu(value[i] * scale[L::own(i)] + shift[L::own(i)]);
        // As stored: the products see it so.
        value[i] = to_float(from_float<typename L::T>(value[i]));
        if (i < run.count) sum[0][L::own(i)] += value[i];
      }
      store_run<typename L::T>(p.r, run, value);
    });
  }
  CIEMA_SHARED(float, total, [1][L::kChannels]);
  reduce_pixels<L, 1>(sum, total);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < L::kChannels && first + lane < cover.channels) {
    p.sums_r[block_run * cover.channels + first + lane] = total[0][lane];
  }
}

// A block's sums of a gradient and of it times (x − mean), as those with 1 and n.
template <class L>
__device__ __forceinline__ void store_sums(float (&sum)[2][L::kOwn], const Norm& norm, float* sums,
                                           int block_run, int first, int channels) {
  CIEMA_SHARED(float, total, [2][L::kChannels]);
  reduce_pixels<L, 2>(sum, total);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < L::kChannels && (PLANT == 12 || first + lane < channels)) {
    float* at = sums + static_cast<int64_t>(block_run) * 2 * channels + first + lane;
    at[0] = total[0][lane];
    at[channels] = total[1][lane] * norm.rstd(PLANT == 12 ? 0 : first + lane);
  }
}

template <class L>
__global__ void __launch_bounds__(kThreads)
    gate_sums_kernel(GateSumsParams p) {
  const int channels = p.cover.channels;
  const int block = static_cast<int>(blockIdx.x);
  const int own_blocks = p.cover.runs * ((channels + L::kChannels - 1) / L::kChannels);
  if (block >= own_blocks) {
    write_relu<L>(p, block - own_blocks);
    return;
  }
  const int first = block / p.cover.runs * L::kChannels;
  const int block_run = block % p.cover.runs;
  const int channel = first + L::channel();
  float sum[2][L::kOwn] = {};
  if (channel < channels) {
    float scale[L::kOwn], shift[L::kOwn], mean[L::kOwn];
    load_norm<L>(p.norm3, channel, channels, scale, shift, mean);
    L::for_each(p.cover, block_run, channel, [&](const Run& run) {
      const GateGradient<L> at(p.maps, scale, shift, run);
#pragma unroll
      for (int i = 0; i < L::kRun; ++i) {
        sum[0][L::own(i)] += at.t[i];
        sum[1][L::own(i)] += at.t[i] * (at.logit[i] - mean[L::own(i)]);
      }
    });
  }
  store_sums<L>(sum, p.norm3, p.sums, block_run, first, channels);
}

struct GradLogitsParams {
  GateMaps maps;
  Map grad_logits, s;
  Norm norm3;
  const float* sums;  // (parts, 2, C)
  int parts;
  float* affine;  // (2, C): norm 3's scale and shift, for `input`
  const float* sums_r;  // (runs, C/4)
  float* sum_r;         // (C/4,)
  int runs_r, squeezed;
  float* grad_weight;
  float* grad_bias;
  float count;  // values of a channel
  bool training;
  Cover cover;
};

// Σr of a block's channels.
template <class L>
__device__ __forceinline__ void add_up_r(const GradLogitsParams& p, int first) {
  CIEMA_SHARED(float, total, [1][L::kChannels]);
  merge_sums(p.sums_r, p.runs_r, first, p.squeezed, total);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < L::kChannels && first + lane < p.squeezed) p.sum_r[first + lane] = total[0][lane];
}

template <class L>
__global__ void __launch_bounds__(kThreads)
    grad_logits_kernel(GradLogitsParams p) {
  const int channels = p.cover.channels;
  const int block = static_cast<int>(blockIdx.x);
  const int own_blocks = p.cover.runs * ((channels + L::kChannels - 1) / L::kChannels);
  if (block >= own_blocks) {
    add_up_r<L>(p, (block - own_blocks) * L::kChannels);
    return;
  }
  const int first = block / p.cover.runs * L::kChannels;
  const int block_run = block % p.cover.runs;
  const int channel = first + L::channel();
  CIEMA_SHARED(float, total, [2][L::kChannels]);
  merge_sums(p.sums, p.parts, first, channels, total);
  const int lane = static_cast<int>(threadIdx.x);
  if (block_run == 0 && lane < L::kChannels && first + lane < channels) {
    p.grad_bias[first + lane] = total[0][lane];
    p.grad_weight[first + lane] = total[1][lane];
    p.affine[first + lane] = p.norm3.scale(first + lane);
    p.affine[channels + first + lane] = p.norm3.shift(first + lane);
  }
  if (channel >= channels) return;
  float scale[L::kOwn], shift[L::kOwn], mean[L::kOwn];
  load_norm<L>(p.norm3, channel, channels, scale, shift, mean);
  Slopes slopes[L::kOwn];
#pragma unroll
  for (int i = 0; i < L::kOwn; ++i) {
    const int own = L::channel() + i;
    if (channel + i < channels) {
      slopes[i] =
          Slopes(p.norm3, channel + i, total[0][own], total[1][own], p.count, p.training);
    }
  }
  L::for_each(p.cover, block_run, channel, [&](const Run& run) {
    GateGradient<L> at(p.maps, scale, shift, run);
#pragma unroll
    for (int i = 0; i < L::kRun; ++i) {
      const Slopes& own = slopes[L::own(i)];
      at.t[i] *= own.gain;
      if (p.training) at.t[i] += own.slope * (at.logit[i] - mean[L::own(i)]) + own.level;
      at.e[i] *= at.gate[i];
    }
    store_run<typename L::T>(p.grad_logits, run, at.t);
    store_run<typename L::T>(p.s, run, at.e);
  });
}

struct NormBackwardParams {
  Map value;     // what the norm normalised
  Map grad;      // of its result
  Map grad_value;
  Norm norm;
  const float* sums;  // (parts, 2, C): of grad and grad ⊙ (value − mean)
  int parts;
  float* grad_weight;
  float* grad_bias;
  float count;
  bool training;
  Cover cover;
};

template <class L>
__global__ void __launch_bounds__(kThreads)
    norm_backward_kernel(NormBackwardParams p) {
  const int channels = p.cover.channels;
  const int first = static_cast<int>(blockIdx.x) / p.cover.runs * L::kChannels;
  const int block_run = static_cast<int>(blockIdx.x) % p.cover.runs;
  const int channel = first + L::channel();
  CIEMA_SHARED(float, total, [2][L::kChannels]);
  merge_sums(p.sums, p.parts, first, channels, total);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < L::kChannels && first + lane < channels) total[1][lane] *= p.norm.rstd(first + lane);
  __syncthreads();
  if (block_run == 0 && lane < L::kChannels && first + lane < channels) {
    p.grad_bias[first + lane] = total[0][lane];
    p.grad_weight[first + lane] = total[1][lane];
  }
  if (channel >= channels) return;
  Slopes slopes[L::kOwn];
  float mean[L::kOwn] = {};
#pragma unroll
  for (int i = 0; i < L::kOwn; ++i) {
    const int own = L::channel() + i;
    if (channel + i < channels) {
      slopes[i] = Slopes(p.norm, channel + i, total[0][own], total[1][own], p.count, p.training);
      mean[i] = p.norm.mean[channel + i];
    }
  }
  L::for_each(p.cover, block_run, channel, [&](const Run& run) {
    float grad[L::kRun], value[L::kRun];
    load_run<typename L::T>(p.grad, run, grad);
    if (p.training) load_run<typename L::T>(p.value, run, value);
#pragma unroll
    for (int i = 0; i < L::kRun; ++i) {
      const Slopes& own = slopes[L::own(i)];
      grad[i] *= own.gain;
      if (p.training) grad[i] += own.slope * (value[i] - mean[L::own(i)]) + own.level;
    }
    store_run<typename L::T>(p.grad_value, run, grad);
  });
}

}  // namespace gated_fusion
}  // namespace ciema
