// cross_spatial's backward (spec.md 2.3), first half of the way from w's gradient to that of f: the
// maths is told in cross_spatial_backward.cuh. recompute: f and R again, with the saved statistics,
// and sums per (row, share); vectors: y's gradient as o·gl + m, and what follows for Wc, α and R's
// norm, all from those sums.
//
// Grid        recompute: (rows, shares) as in cross_spatial_sheets.cuh; vectors: one block a group,
//             which takes its samples in order.
// Bytes       recompute: X once (with halos 1.9 times), f and R written once and f read back from
//             the first-level cache; vectors: sums.
// Accuracy    as cross_spatial_backward.cuh.
#pragma once

#include "cross_spatial_training.cuh"

// Bugs for the tests; none in a build. 1: a barrier left out in recompute, attention and features.
#ifndef PLANT
#define PLANT 0
#endif

namespace ciema {

struct CrossSpatialBackwardParams {
  CrossSpatialSizes sizes;
  const void *packed, *transposed;
  const void *grad_w, *w;          // (slabs, H·W)
  CrossSpatialNorm attention, reduce;
  const float *channel_feat, *alpha;
  const float *softmax1, *softmax2;  // (slabs, c)
  bool batch;                        // the statistics are the batch's: gradients go through them
  float count;                       // values that share a set of them
  const void* sheets;                // x1, x2, e
  void* features;                    // f
  void* reduced;                     // R, then its gradient
  void* weighted;                    // A ⊙ f, then the logits' gradient
  void* grad_features;
  void* grad_sheets;                 // gradients of x1, x2
  float* sums;                       // (2·slabs·shares, kGateSums, kChannels)
  float* gradient_vectors;           // (2·slabs, kGradientVectors, kChannels)
  float* reduce_totals;              // (G, 2 branches, T0 and T1, kChannels)
  float* group_partials;             // (G, 2c + c·c + 1)
  float* norm_sums;                  // (2·slabs·shares, 2, 3·kChannels): T0, T1 of a block
  float* attention_totals;           // (sets, 2, 3c)
  int* counters;                     // (sets,), zero
};

namespace cross_spatial {

enum GateSum { kWeightedReduced, kTotalReduced, kWeightedBranch, kTotalBranch, kTotal, kGateSums };
enum GradientVector { kDirect, kOffset, kDirectBranch, kOffsetBranch, kGradientVectors };

template <class T>
__device__ __forceinline__ float logit_gradient(const CrossSpatialBackwardParams& p, int slab,
                                                int pixel) {
  const int64_t at = static_cast<int64_t>(slab) * p.sizes.height * p.sizes.width + pixel;
  const float gate = to_float(static_cast<const T*>(p.w)[at]);
  return to_float(static_cast<const T*>(p.grad_w)[at]) * gate * (1.0f - gate);
}

// gl of a lane's pixels, zero outside the map.
template <class N>
__device__ __forceinline__ void load_logit_gradients(const CrossSpatialBackwardParams& p, int row,
                                                     const Pixels<N>& pixels,
                                                     float (&gl)[N::kRows][2]) {
#pragma unroll
  for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = pixels.at[m][half];
      gl[m][half] =
          pixel >= 0 ? logit_gradient<typename N::T>(p, row % p.sizes.slabs, pixel) : 0.0f;
    }
  }
}

// ---- recompute ---------------------------------------------------------------------------------

// gl of a tile's pixels, for all threads.
template <class N>
__device__ __forceinline__ void load_tile_gradients(const CrossSpatialBackwardParams& p, int slab,
                                                    const Tile& tile, float* gradients) {
  for (int i = static_cast<int>(threadIdx.x); i < kTilePixels; i += kTileThreads<N>) {
    const int y = tile.top + i / kTileWidth, column = tile.left + i % kTileWidth;
    const bool inside = y < p.sizes.height && column < p.sizes.width;
    gradients[i] =
        inside ? logit_gradient<typename N::T>(p, slab, y * p.sizes.width + column) : 0.0f;
  }
}

// Adds a channel's share of Σ X gl, Σ X and Σ gl of a tile to a thread's sums.
template <class N>
__device__ __forceinline__ void add_branch_sums(const typename N::T* window,
                                                const float* gradients,
                                                float (&of_threads)[3][kTileThreads<N>]) {
  constexpr int kChannels = N::kChannels;
  const int thread = static_cast<int>(threadIdx.x);
  float weighted_x = 0.0f, total_x = 0.0f, total = 0.0f;
  for (int i = thread / kChannels; i < kTilePixels; i += kTileThreads<N> / kChannels) {
    const int at = (i / kTileWidth + 2) * (kTileWidth + 4) + i % kTileWidth + 2;
    const float value = to_float(window[at * N::kPitch + thread % kChannels]);
    weighted_x += value * gradients[i];
    total_x += value;
    total += gradients[i];
  }
  of_threads[0][thread] += weighted_x;  // in registers they would spill
  of_threads[1][thread] += total_x;
  of_threads[2][thread] += total;
}

// Adds Σ (R - mean) gl and Σ (R - mean) of a tile to a warp's sums; R is written over.
template <class N>
__device__ __forceinline__ void add_reduced_sums(const Pixels<N>& pixels, const float* centre,
                                                 const float (&gl)[N::kRows][2],
                                                 typename N::Result& r, float* own) {
#pragma unroll
  for (int n = 0; n < N::kColumns; ++n) {
    const float2 mean = N::of_columns(centre, n);
#pragma unroll
    for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[m][n][i] -= i % 2 == 0 ? mean.x : mean.y;
    }
  }
  add_sums<N>(pixels, r, own + N::kChannels);
#pragma unroll
  for (int n = 0; n < N::kColumns; ++n) {
#pragma unroll
    for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[m][n][i] *= gl[m][i / 2];
    }
  }
  add_sums<N>(pixels, r, own);
}

// A block's sums of its warps and threads, GateSum by GateSum.
template <class N>
__device__ __forceinline__ void store_gate_sums(
    const float (&of_warps)[kTileThreads<N> / kWarp][2 * N::kChannels],
    const float (&of_threads)[3][kTileThreads<N>], float* out) {
  constexpr int kChannels = N::kChannels;
  for (int i = static_cast<int>(threadIdx.x); i < kGateSums * kChannels; i += kTileThreads<N>) {
    const int which = i / kChannels, channel = i % kChannels;
    float sum = 0.0f;
    if (which < kWeightedBranch) {
      for (int warp = 0; warp < kTileThreads<N> / kWarp; ++warp) sum += of_warps[warp][i];
    } else {
      for (int at = channel; at < kTileThreads<N>; at += kChannels) {
        sum += of_threads[which - kWeightedBranch][at];
      }
    }
    out[i] = sum;
  }
}

// Grid (2·slabs, shares).
template <class N>
__global__ void __launch_bounds__(kTileThreads<N>, 1)
    recompute_kernel(CrossSpatialBackwardParams p) {
  using T = typename N::T;
  constexpr int kChannels = N::kChannels, kWarps = kTileThreads<N> / kWarp;
  CIEMA_DYNAMIC_SHARED(T, window);
  CIEMA_SHARED(float, affine, [2][3 * kChannels]);
  CIEMA_SHARED(float, centre, [kChannels]);
  CIEMA_SHARED(float, gradients, [kTilePixels]);
  CIEMA_SHARED(float, of_warps, [kWarps][2 * kChannels]);
  CIEMA_SHARED(float, of_threads, [3][kTileThreads<N>]);
  const CrossSpatialSizes& s = p.sizes;
  const int row = static_cast<int>(blockIdx.x), set = set_of(s, row);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t size = static_cast<int64_t>(s.height) * s.width * kChannels;
  const T* x = static_cast<const T*>(p.sheets) + row * size;
  T* features = static_cast<T*>(p.features) + 3 * row * size;
  T* reduced = static_cast<T*>(p.reduced) + row * size;
  const typename N::Packed packed(p.packed);
  fold_norm<kChannels>(p.attention, s.channels, set, 3, affine[0], affine[1]);
  for (int i = thread; i < kChannels; i += kTileThreads<N>) {
    centre[i] = i < s.channels ? p.reduce.mean[set * s.channels + i] : 0.0f;
  }
  float* own = of_warps[warp_of_block()];
  for (int i = lane_of_warp(); i < 2 * kChannels; i += kWarp) own[i] = 0.0f;
  for (int which = 0; which < 3; ++which) of_threads[which][thread] = 0.0f;
  for (int t = static_cast<int>(blockIdx.y); t < tiles_of_map(s); t += s.shares) {
    const Tile tile = tile_at(s, t);
    __syncthreads();
    load_window<N, 2>(s, tile, x, window);
    load_tile_gradients<N>(p, row % s.slabs, tile, gradients);
    if (PLANT != 1) __syncthreads();
    add_branch_sums<N>(window, gradients, of_threads);
    {
      typename N::Addresses first;
      window_addresses<N, 2, 2>(window, first);
      typename N::Result f[3];
      N::convolve(f, first, kWindowPitch<N, 2>, packed);
      __syncwarp();  // addresses drawn before it would spill
      const Pixels<N> own_pixels(s, tile);
#pragma unroll
      for (int part = 0; part < 3; ++part) store_result<N>(features, own_pixels, f[part], part, 3);
    }
    const Pixels<N> pixels(s, tile);
    typename N::Result r;
    reduce_features<N>(r, Parts<N>{features, pixels}, affine[0], affine[1], packed);
    store_result<N>(reduced, pixels, r);
    float gl[N::kRows][2];
    load_logit_gradients<N>(p, row, pixels, gl);
    add_reduced_sums<N>(pixels, centre, gl, r, own);
  }
  __syncthreads();
  store_gate_sums<N>(of_warps, of_threads,
                     p.sums + partial_of_block() * kGateSums * kChannels);
}

// ---- vectors -----------------------------------------------------------------------------------

constexpr int kVectorThreads = 256;

// What a group's block holds of one sample, of both branches.
template <int kChannels>
struct SampleVectors {
  float sums[2][kGateSums][kChannels];
  float softmax[2][kChannels];
  float feat_weighted[2][kChannels], feat_total[2][kChannels];  // Wc Σ gl·X, Wc Σ X
  float grad_softmax[2][kChannels];
  float direct[2][kChannels], offset[2][kChannels];
};

// Steps of one sample for a thread's (branch, channel); the block meets at each barrier.
template <int kChannels>
__device__ void sample_vectors(const CrossSpatialBackwardParams& p, int slab, int branch, int i,
                               float rstd, SampleVectors<kChannels>& v) {
  const CrossSpatialSizes& s = p.sizes;
  const int c = s.channels, row = branch * s.slabs + slab;
  const bool own = branch < 2, real = own && i < c;
  const auto pixels = static_cast<float>(s.height * s.width);
  __syncthreads();  // the last sample's vectors are no longer needed
  if (own) {
    for (int which = 0; which < kGateSums; ++which) {
      float sum = 0.0f;
      for (int share = 0; share < s.shares; ++share) {
        const int64_t partial = static_cast<int64_t>(row) * s.shares + share;
        sum += p.sums[(partial * kGateSums + which) * kChannels + i];
      }
      v.sums[branch][which][i] = sum;
    }
    const float* softmax = branch == 0 ? p.softmax1 : p.softmax2;
    v.softmax[branch][i] = real ? softmax[static_cast<int64_t>(slab) * c + i] : 0.0f;
  }
  __syncthreads();
  if (own) {
    float weighted = 0.0f, total = 0.0f;
    for (int k = 0; k < c && real; ++k) {
      const float feat = p.channel_feat[i * c + k];
      weighted = fmaf(feat, v.sums[branch][kWeightedBranch][k], weighted);
      total = fmaf(feat, v.sums[branch][kTotalBranch][k], total);
    }
    v.feat_weighted[branch][i] = weighted;
    v.feat_total[branch][i] = total;
    // Σ gl·y of this branch is the gradient of the other's softmax.
    const float gamma = real ? p.reduce.weight[i] : 0.0f, beta = real ? p.reduce.bias[i] : 0.0f;
    v.grad_softmax[1 - branch][i] = gamma * rstd * v.sums[branch][kWeightedReduced][i] +
                                    beta * v.sums[branch][kTotal][i] + p.alpha[0] * weighted;
  }
  __syncthreads();
  if (own) {
    float inner = 0.0f;
    for (int k = 0; k < c; ++k) inner += v.softmax[branch][k] * v.grad_softmax[branch][k];
    v.direct[branch][i] = v.softmax[1 - branch][i];
    v.offset[branch][i] = v.softmax[branch][i] * (v.grad_softmax[branch][i] - inner) / pixels;
  }
  __syncthreads();
  if (own) {
    float direct = 0.0f, offset = 0.0f;
    for (int k = 0; k < c && real; ++k) {
      const float feat = p.channel_feat[k * c + i];
      direct = fmaf(feat, v.direct[branch][k], direct);
      offset = fmaf(feat, v.offset[branch][k], offset);
    }
    float* out = p.gradient_vectors + static_cast<int64_t>(row) * kGradientVectors * kChannels + i;
    out[kDirect * kChannels] = v.direct[branch][i];
    out[kOffset * kChannels] = v.offset[branch][i];
    out[kDirectBranch * kChannels] = p.alpha[0] * direct;
    out[kOffsetBranch * kChannels] = p.alpha[0] * offset;
  }
}

// Grid G.
template <int kChannels>
__global__ void __launch_bounds__(kVectorThreads) vectors_kernel(CrossSpatialBackwardParams p) {
  constexpr int kItems = kChannels * kChannels / kVectorThreads;
  CIEMA_SHARED(SampleVectors<kChannels>, sample, [1]);
  CIEMA_SHARED(float, totals, [3][kVectorThreads]);
  SampleVectors<kChannels>& v = sample[0];
  const CrossSpatialSizes& s = p.sizes;
  const int group = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int branch = thread / kChannels, i = thread % kChannels, c = s.channels;
  const int set = s.per_group ? 2 * group + branch : 0;
  const bool own = branch < 2, real = own && i < c;
  const float rstd = real ? 1.0f / sqrtf(p.reduce.var[set * c + i] + p.reduce.eps) : 0.0f;
  const auto pixels = static_cast<float>(s.height * s.width);
  float sum0 = 0.0f, sum1 = 0.0f, grad_alpha = 0.0f, grad_feat[kItems] = {};
  for (int slab = group; slab < s.slabs; slab += s.groups) {
    sample_vectors<kChannels>(p, slab, branch, i, rstd, v);
    if (own) {
      const float direct = v.direct[branch][i], offset = v.offset[branch][i];
      sum0 += direct * v.sums[branch][kTotal][i] + offset * pixels;
      sum1 += rstd * (direct * v.sums[branch][kWeightedReduced][i] +
                      offset * v.sums[branch][kTotalReduced][i]);
      grad_alpha += direct * v.feat_weighted[branch][i] + offset * v.feat_total[branch][i];
    }
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int at = item * kVectorThreads + thread;
      const int output = at / kChannels, input = at % kChannels;
      for (int of = 0; of < 2; ++of) {
        grad_feat[item] += v.sums[of][kWeightedBranch][input] * v.direct[of][output] +
                           v.sums[of][kTotalBranch][input] * v.offset[of][output];
      }
    }
  }
  totals[0][thread] = sum0;
  totals[1][thread] = sum1;
  totals[2][thread] = grad_alpha;
  __syncthreads();
  if (own) {
    float* out = p.reduce_totals + ((2 * group + branch) * 2) * kChannels + i;
    out[0] = sum0;
    out[kChannels] = sum1;
  }
  float* out = p.group_partials + static_cast<int64_t>(group) * (2 * c + c * c + 1);
  if (branch == 0 && real) {
    out[i] = totals[1][i] + totals[1][kChannels + i];
    out[c + i] = totals[0][i] + totals[0][kChannels + i];
  }
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int at = item * kVectorThreads + thread, output = at / kChannels, input = at % kChannels;
    if (output < c && input < c) out[2 * c + output * c + input] = grad_feat[item] * p.alpha[0];
  }
  if (thread == 0) {
    float sum = 0.0f;
    for (int other = 0; other < 2 * kChannels; ++other) sum += totals[2][other];
    out[2 * c + c * c] = sum;
  }
}

}  // namespace cross_spatial
}  // namespace ciema
