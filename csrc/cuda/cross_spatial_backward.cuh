// cross_spatial's backward (spec.md 2.3), from w's gradient to that of f. Nothing but e, vectors and
// w was saved. Notation: gl = grad_w·w·(1 − w), the gradient of w's logit, a number a pixel;
// R = Wr∗(A ⊙ f); T0, T1 are Σ g and Σ g·n of a batch norm, n its normalised input. y and its
// gradient o·gl + m are never stored: what depends on whole groups is linear in Σ gl, Σ gl·R, Σ R,
// Σ gl·X and Σ X, and Wc's gradient is of rank two a slab.
//
//   recompute  f and R again, with the saved statistics, and those sums
//   vectors    o, m and α·Wcᵀ of them; T0, T1 of R's norm; gradients of Wc, α and R's norm
//   attention  R's gradient g_R in R's place; A ⊙ f; T0, T1 of A's norm
//   features   gradients of the logits Wa∗f in the place of A ⊙ f, and of f
//
// The gradients of X, e and the weights are in cross_spatial_backward_maps.cuh and …_weights.cuh.
//
// Grid        (rows, shares) as in cross_spatial_sheets.cuh; vectors: one block a group.
// Bytes       scratch in maps of C channels (padded) beside X's: f, A⊙f and f's gradient 6 each
//             (three parts, two branches), R 2; each written once; f is read three times more, R
//             and A⊙f twice.
// Accuracy    operands and scratch in T (float32: split products), accumulators and sums float32.
// Recomputed  all of the forward; A once more in features.
#pragma once

#include "cross_spatial_training.cuh"

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

// Adds Σ over the warp's pixels to sums[8·kCount] in shared memory.
template <class N, int kCount>
__device__ __forceinline__ void add_sums(const Pixels<N>& pixels,
                                         const float (&value)[N::kRows][kCount][4], float* sums) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float sum = sum_over_pixels<N>(pixels, value, n, j, [](float v) { return v; });
      if (lane_of_warp() < 4) sums[8 * n + 2 * lane_of_warp() + j] += sum;
    }
  }
}

// ---- recompute ---------------------------------------------------------------------------------

// Grid (2·slabs, shares).
template <class N>
__global__ void __launch_bounds__(kTileThreads<N>, kBlocks<N>)
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
  float weighted_x = 0.0f, total_x = 0.0f, total = 0.0f;
  for (int t = static_cast<int>(blockIdx.y); t < tiles_of_map(s); t += s.shares) {
    const Tile tile = tile_at(s, t);
    __syncthreads();
    load_window<N, 2>(s, tile, x, window);
    for (int i = thread; i < kTilePixels; i += kTileThreads<N>) {
      const int y = tile.top + i / kTileWidth, column = tile.left + i % kTileWidth;
      const bool inside = y < s.height && column < s.width;
      gradients[i] = inside ? logit_gradient<T>(p, row % s.slabs, y * s.width + column) : 0.0f;
    }
    if (PLANT != 1) __syncthreads();
    for (int i = thread / kChannels; i < kTilePixels; i += kTileThreads<N> / kChannels) {
      const int at = (i / kTileWidth + 2) * (kTileWidth + 4) + i % kTileWidth + 2;
      const float value = to_float(window[at * N::kPitch + thread % kChannels]);
      weighted_x += value * gradients[i];
      total_x += value;
      total += gradients[i];
    }
    const Pixels<N> pixels(s, tile);
    {
      typename N::Addresses first;
      window_addresses<N, 2, 2>(window, first);
      typename N::Result f[3];
      N::convolve(f, first, kWindowPitch<N, 2>, packed);
#pragma unroll
      for (int part = 0; part < 3; ++part) store_result<N>(features, pixels, f[part], part, 3);
    }
    typename N::Result r;
    reduce_features<N>(r, Parts<N>(features, pixels), affine[0], affine[1], packed);
    store_result<N>(reduced, pixels, r);
    float gl[N::kRows][2];
    load_logit_gradients<N>(p, row, pixels, gl);
#pragma unroll
    for (int n = 0; n < N::kColumns; ++n) {
      const float2 mean = N::of_columns(centre, n);
#pragma unroll
      for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) r[m][n][i] -= i % 2 == 0 ? mean.x : mean.y;
      }
    }
    add_sums<N>(pixels, r, own + kChannels);
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
  of_threads[0][thread] = weighted_x;
  of_threads[1][thread] = total_x;
  of_threads[2][thread] = total;
  __syncthreads();
  float* out = p.sums + partial_of_block() * kGateSums * kChannels;
  for (int i = thread; i < kGateSums * kChannels; i += kTileThreads<N>) {
    const int which = i / kChannels, channel = i % kChannels;
    float sum = 0.0f;
    if (which < kWeightedBranch) {
      for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[warp][i];
    } else {
      for (int at = channel; at < kTileThreads<N>; at += kChannels) {
        sum += of_threads[which - kWeightedBranch][at];
      }
    }
    out[i] = sum;
  }
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
      const int at = item * kVectorThreads + thread, output = at / kChannels, input = at % kChannels;
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

// ---- attention ---------------------------------------------------------------------------------

// What the two kernels below need of A's norm, for three parts of channels, zero past c.
template <int kChannels>
struct AttentionNorm {
  float scale[3 * kChannels], shift[3 * kChannels], mean[3 * kChannels], rstd[3 * kChannels];
};

template <int kChannels>
__device__ __forceinline__ void load_norm(const CrossSpatialNorm& norm, int c, int set,
                                          AttentionNorm<kChannels>& out) {
  fold_norm<kChannels>(norm, c, set, 3, out.scale, out.shift);
  for (int i = static_cast<int>(threadIdx.x); i < 3 * kChannels;
       i += static_cast<int>(blockDim.x)) {
    const int at = set * 3 * c + i / kChannels * c + i % kChannels;
    const bool real = i % kChannels < c;
    out.mean[i] = real ? norm.mean[at] : 0.0f;
    out.rstd[i] = real ? 1.0f / sqrtf(norm.var[at] + norm.eps) : 0.0f;
  }
}

// R's gradient is q0·gl + q1 + q2·(R − μ): q0, q1, q2, μ.
template <int kChannels>
__device__ __forceinline__ void load_slopes(const CrossSpatialBackwardParams& p, int row, int set,
                                            float (&slopes)[4][kChannels]) {
  const CrossSpatialSizes& s = p.sizes;
  const int c = s.channels;
  for (int i = static_cast<int>(threadIdx.x); i < kChannels; i += static_cast<int>(blockDim.x)) {
    const bool real = i < c;
    const float rstd = real ? 1.0f / sqrtf(p.reduce.var[set * c + i] + p.reduce.eps) : 0.0f;
    const float scale = real ? p.reduce.weight[i] * rstd : 0.0f;
    const float* vector =
        p.gradient_vectors + static_cast<int64_t>(row) * kGradientVectors * kChannels + i;
    float offset = vector[kOffset * kChannels], slope = 0.0f;
    if (p.batch) {
      const int first = s.per_group ? set : 0, rows = s.per_group ? 1 : 2 * s.groups;
      float sum0 = 0.0f, sum1 = 0.0f;
      for (int other = first; other < first + rows; ++other) {
        sum0 += p.reduce_totals[other * 2 * kChannels + i];
        sum1 += p.reduce_totals[(other * 2 + 1) * kChannels + i];
      }
      offset -= sum0 / p.count;
      slope = -scale * rstd * sum1 / p.count;
    }
    slopes[0][i] = scale * vector[kDirect * kChannels];
    slopes[1][i] = scale * offset;
    slopes[2][i] = slope;
    slopes[3][i] = real ? p.reduce.mean[set * c + i] : 0.0f;
  }
}

// For column tiles first… of part k: A's logits, and the gradient of A ⊙ f.
template <class N, int kCount>
__device__ __forceinline__ void attention_products(const Parts<N>& features,
                                                   const typename N::Result& grad_r, int k,
                                                   int first, const typename N::Packed& packed,
                                                   const typename N::Packed& transposed,
                                                   float (&logits)[N::kRows][kCount][4],
                                                   float (&grad_weighted)[N::kRows][kCount][4]) {
  N::clear(logits);
  features.multiply(logits, k, packed, kAttention, first);
  N::clear(grad_weighted);
#pragma unroll(kReread<N> ? 1 : N::kSteps)
  for (int step = 0; step < N::kSteps; ++step) {
    typename N::A a[N::kRows];
    operands<N>(a, grad_r, step);
    N::multiply(grad_weighted, a, transposed, kReduce + k, step, first);
  }
}

// Calls term(m, n, i, channel of part k, A, n's value, f, A ⊙ f's gradient) for a lane's values.
template <class N, int kCount, class Term>
__device__ __forceinline__ void each_value(const Parts<N>& features,
                                           const AttentionNorm<N::kChannels>& norm, int k,
                                           int first, const float (&logits)[N::kRows][kCount][4],
                                           const float (&grad_weighted)[N::kRows][kCount][4],
                                           Term term) {
#pragma unroll
  for (int own = 0; own < kCount / N::kChain; ++own) {
#pragma unroll
    for (int m = 0; m < N::kRows; ++m) {
      const auto f = features.values(k, m, first / N::kChain + own);
#pragma unroll
      for (int t = 0; t < N::kChain; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = own * N::kChain + t;
          const int channel =
              k * N::kChannels + 8 * (first + n) + lane_of_warp() % 4 * 2 + i % 2;
          const float logit = logits[m][n][i];
          const float attention = sigmoid(fmaf(logit, norm.scale[channel], norm.shift[channel]));
          const float normalised = (logit - norm.mean[channel]) * norm.rstd[channel];
          term(m, n, i, channel, attention, normalised, f.d[t][i], grad_weighted[m][n][i]);
        }
      }
    }
  }
}

// Stores column tiles first… of part k.
template <class N, int kCount>
__device__ __forceinline__ void store_columns(typename N::T* sheet, const Pixels<N>& pixels,
                                              const float (&value)[N::kRows][kCount][4], int k,
                                              int first) {
#pragma unroll
  for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (pixels.at[m][half] < 0) continue;
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        store_two(two_of<N>(sheet, pixels.at[m][half], k, 3, first + n), value[m][n][2 * half],
                  value[m][n][2 * half + 1]);
      }
    }
  }
}

// Grid (2·slabs, shares).
template <class N>
__global__ void __launch_bounds__(kTileThreads<N>, 1)
    attention_backward_kernel(CrossSpatialBackwardParams p) {
  using T = typename N::T;
  constexpr int kChannels = N::kChannels, kWarps = kTileThreads<N> / kWarp, kCount = kLogits<N>;
  CIEMA_SHARED(AttentionNorm<kChannels>, norms, [1]);
  CIEMA_SHARED(float, slopes, [4][kChannels]);
  CIEMA_SHARED(float, of_warps, [kWarps][6 * kChannels]);
  const CrossSpatialSizes& s = p.sizes;
  const int row = static_cast<int>(blockIdx.x), set = set_of(s, row);
  const int64_t size = static_cast<int64_t>(s.height) * s.width * kChannels;
  const T* features_of_row = static_cast<const T*>(p.features) + 3 * row * size;
  T* weighted = static_cast<T*>(p.weighted) + 3 * row * size;
  T* reduced = static_cast<T*>(p.reduced) + row * size;
  const typename N::Packed packed(p.packed), transposed(p.transposed);
  load_norm<kChannels>(p.attention, s.channels, set, norms[0]);
  load_slopes<kChannels>(p, row, set, slopes);
  float* sums = of_warps[warp_of_block()];
  for (int i = lane_of_warp(); i < 6 * kChannels; i += kWarp) sums[i] = 0.0f;
  if (PLANT != 2) __syncthreads();
  for (int t = static_cast<int>(blockIdx.y); t < tiles_of_map(s); t += s.shares) {
    const Pixels<N> pixels(s, tile_at(s, t));
    typename N::Result grad_r;
    load_result<N>(reduced, pixels, grad_r);
    float gl[N::kRows][2];
    load_logit_gradients<N>(p, row, pixels, gl);
#pragma unroll
    for (int n = 0; n < N::kColumns; ++n) {
      const float2 direct = N::of_columns(slopes[0], n), offset = N::of_columns(slopes[1], n);
      const float2 slope = N::of_columns(slopes[2], n), mean = N::of_columns(slopes[3], n);
#pragma unroll
      for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool even = i % 2 == 0;
          const float centred = grad_r[m][n][i] - (even ? mean.x : mean.y);
          const float grad = gl[m][i / 2] * (even ? direct.x : direct.y) +
                             (even ? offset.x : offset.y) + centred * (even ? slope.x : slope.y);
          grad_r[m][n][i] = pixels.at[m][i / 2] >= 0 ? grad : 0.0f;
        }
      }
    }
    store_result<N>(reduced, pixels, grad_r);
    const Parts<N> features(features_of_row, pixels);
#pragma unroll 1
    for (int k = 0; k < 3; ++k) {
#pragma unroll(kReread<N> ? 1 : N::kColumns / kCount)
      for (int first = 0; first < N::kColumns; first += kCount) {
        float grad[N::kRows][kCount][4], grad_weighted[N::kRows][kCount][4];
        attention_products<N>(features, grad_r, k, first, packed, transposed, grad, grad_weighted);
        float product[N::kRows][kCount][4];
        each_value<N>(features, norms[0], k, first, grad, grad_weighted,
                      [&](int m, int n, int i, int, float attention, float normalised, float f,
                          float grad_value) {
                        const float of_norm = grad_value * f * attention * (1.0f - attention);
                        grad[m][n][i] = of_norm;
                        grad_weighted[m][n][i] = of_norm * normalised;
                        product[m][n][i] = attention * f;
                      });
        store_columns<N>(weighted, pixels, product, k, first);
        add_sums<N>(pixels, grad, sums + k * kChannels + 8 * first);
        add_sums<N>(pixels, grad_weighted, sums + (3 + k) * kChannels + 8 * first);
      }
    }
  }
  __syncthreads();
  float* own = p.norm_sums + partial_of_block() * 6 * kChannels;
  for (int i = static_cast<int>(threadIdx.x); i < 6 * kChannels; i += kTileThreads<N>) {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[warp][i];
    own[i] = sum;
  }
  const SetRows rows(s, set);
  if (!arrive_last(p.counters + set, rows.count * s.shares)) return;
  const int c = s.channels;
  for (int i = static_cast<int>(threadIdx.x); i < 6 * c; i += kTileThreads<N>) {
    const float* of_channel = p.norm_sums + i / c * kChannels + i % c;
    float sum = 0.0f;
    for (int other = 0; other < rows.count; ++other) {
      const int64_t first = (rows.first + static_cast<int64_t>(other) * rows.step) * s.shares;
#pragma unroll 4
      for (int share = 0; share < s.shares; ++share) {
        sum += of_channel[(first + share) * 6 * kChannels];
      }
    }
    p.attention_totals[set * 6 * c + i] = sum;
  }
}

// ---- features ----------------------------------------------------------------------------------

// Grid (2·slabs, shares).
template <class N>
__global__ void __launch_bounds__(kTileThreads<N>, 1)
    features_backward_kernel(CrossSpatialBackwardParams p) {
  using T = typename N::T;
  constexpr int kChannels = N::kChannels, kCount = kLogits<N>;
  CIEMA_SHARED(AttentionNorm<kChannels>, norms, [1]);
  CIEMA_SHARED(float, means, [2][3 * kChannels]);  // T0 and T1 over the values of a set
  const CrossSpatialSizes& s = p.sizes;
  const int row = static_cast<int>(blockIdx.x), set = set_of(s, row), c = s.channels;
  const int64_t size = static_cast<int64_t>(s.height) * s.width * kChannels;
  const T* features_of_row = static_cast<const T*>(p.features) + 3 * row * size;
  T* grad_logits = static_cast<T*>(p.weighted) + 3 * row * size;
  T* grad_features = static_cast<T*>(p.grad_features) + 3 * row * size;
  const T* reduced = static_cast<const T*>(p.reduced) + row * size;
  const typename N::Packed packed(p.packed), transposed(p.transposed);
  load_norm<kChannels>(p.attention, c, set, norms[0]);
  for (int i = static_cast<int>(threadIdx.x); i < 6 * kChannels; i += kTileThreads<N>) {
    const int channel = i % kChannels;
    const bool real = p.batch && channel < c;
    means[i / (3 * kChannels)][i % (3 * kChannels)] =
        real ? p.attention_totals[set * 6 * c + i / kChannels * c + channel] / p.count : 0.0f;
  }
  __syncthreads();
  for (int t = static_cast<int>(blockIdx.y); t < tiles_of_map(s); t += s.shares) {
    const Pixels<N> pixels(s, tile_at(s, t));
    {
      typename N::Result grad_r;
      load_result<N>(reduced, pixels, grad_r);
      const Parts<N> features(features_of_row, pixels);
#pragma unroll 1
      for (int k = 0; k < 3; ++k) {
#pragma unroll(kReread<N> ? 1 : N::kColumns / kCount)
        for (int first = 0; first < N::kColumns; first += kCount) {
          float grad[N::kRows][kCount][4], through[N::kRows][kCount][4];
          attention_products<N>(features, grad_r, k, first, packed, transposed, grad, through);
          each_value<N>(features, norms[0], k, first, grad, through,
                        [&](int m, int n, int i, int channel, float attention, float normalised,
                            float f, float grad_value) {
                          const float of_norm = grad_value * f * attention * (1.0f - attention);
                          grad[m][n][i] =
                              (of_norm - means[0][channel] - normalised * means[1][channel]) *
                              norms[0].scale[channel];
                          through[m][n][i] = grad_value * attention;
                        });
          store_columns<N>(grad_logits, pixels, grad, k, first);
          store_columns<N>(grad_features, pixels, through, k, first);
        }
      }
    }
    const Parts<N> grads(grad_logits, pixels);  // this thread's own values
#pragma unroll 1
    for (int k = 0; k < 3; ++k) {
      typename N::Result grad;
      load_result<N>(grad_features, pixels, grad, k, 3);
      grads.multiply(grad, k, transposed, kAttention, 0);
      store_result<N>(grad_features, pixels, grad, k, 3);
    }
  }
}

}  // namespace cross_spatial
}  // namespace ciema
