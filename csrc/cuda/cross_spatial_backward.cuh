// cross_spatial's backward (spec.md 2.3), from w's gradient to that of f. Nothing but e, vectors
// and w was saved. Notation: gl = grad_w·w·(1 − w), the gradient of w's logit, a number a pixel;
// R = Wr∗(A ⊙ f); T0, T1 are Σ g and Σ g·n of a batch norm, n its normalised input. y and its
// gradient o·gl + m are never stored: what depends on whole groups is linear in Σ gl, Σ gl·R, Σ R,
// Σ gl·X and Σ X, and Wc's gradient is of rank two a slab.
//
//   recompute  f and R again, with the saved statistics, and those sums
//   vectors    o, m and α·Wcᵀ of them; T0, T1 of R's norm; gradients of Wc, α and R's norm; both in
//              cross_spatial_recompute.cuh
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

#include "cross_spatial_recompute.cuh"

namespace ciema::cross_spatial {

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
#pragma unroll
  for (int step = 0; step < N::kSteps; ++step) {
    // Keeps weights of later steps from filling all registers.
    if constexpr (sizeof(typename N::T) == 4) __syncwarp();
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

// R of a lane's pixels becomes its gradient, zero outside the map.
template <class N>
__device__ __forceinline__ void reduced_gradient(const Pixels<N>& pixels,
                                                 const float (&slopes)[4][N::kChannels],
                                                 const float (&gl)[N::kRows][2],
                                                 typename N::Result& r) {
#pragma unroll
  for (int n = 0; n < N::kColumns; ++n) {
    const float2 direct = N::of_columns(slopes[0], n), offset = N::of_columns(slopes[1], n);
    const float2 slope = N::of_columns(slopes[2], n), mean = N::of_columns(slopes[3], n);
#pragma unroll
    for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool even = i % 2 == 0;
        const float centred = r[m][n][i] - (even ? mean.x : mean.y);
        const float grad = gl[m][i / 2] * (even ? direct.x : direct.y) +
                           (even ? offset.x : offset.y) + centred * (even ? slope.x : slope.y);
        r[m][n][i] = pixels.at[m][i / 2] >= 0 ? grad : 0.0f;
      }
    }
  }
}

// T0 and T1 of a block from its warps'; the last block of a set adds the blocks' up.
template <class N>
__device__ __forceinline__ void total_norm_sums(
    const CrossSpatialBackwardParams& p, int set,
    const float (&of_warps)[kTileThreads<N> / kWarp][6 * N::kChannels]) {
  constexpr int kChannels = N::kChannels;
  const CrossSpatialSizes& s = p.sizes;
  float* own = p.norm_sums + partial_of_block() * 6 * kChannels;
  for (int i = static_cast<int>(threadIdx.x); i < 6 * kChannels; i += kTileThreads<N>) {
    float sum = 0.0f;
    for (int warp = 0; warp < kTileThreads<N> / kWarp; ++warp) sum += of_warps[warp][i];
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

// Grid (2·slabs, shares).
template <class N>
__global__ void __launch_bounds__(kTileThreads<N>, 1)
    attention_backward_kernel(CrossSpatialBackwardParams p) {
  using T = typename N::T;
  constexpr int kChannels = N::kChannels, kWarps = kTileThreads<N> / kWarp;
  constexpr int kCount = kColumnsAtOnce<N>;
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
  if (PLANT != 1) __syncthreads();
  for (int t = static_cast<int>(blockIdx.y); t < tiles_of_map(s); t += s.shares) {
    const Pixels<N> pixels(s, tile_at(s, t));
    typename N::Result grad_r;
    load_result<N>(reduced, pixels, grad_r);
    float gl[N::kRows][2];
    load_logit_gradients<N>(p, row, pixels, gl);
    reduced_gradient<N>(pixels, slopes, gl, grad_r);
    store_result<N>(reduced, pixels, grad_r);
    const Parts<N> features{features_of_row, pixels};
#pragma unroll 1
    for (int k = 0; k < 3; ++k) {
#pragma unroll 1
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
  total_norm_sums<N>(p, set, of_warps);
}

// ---- features ----------------------------------------------------------------------------------

// Grid (2·slabs, shares).
template <class N>
__global__ void __launch_bounds__(kTileThreads<N>, 1)
    features_backward_kernel(CrossSpatialBackwardParams p) {
  using T = typename N::T;
  constexpr int kChannels = N::kChannels, kCount = kColumnsAtOnce<N>;
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
  if (PLANT != 1) __syncthreads();
  for (int t = static_cast<int>(blockIdx.y); t < tiles_of_map(s); t += s.shares) {
    const Pixels<N> pixels(s, tile_at(s, t));
    {
      typename N::Result grad_r;
      load_result<N>(reduced, pixels, grad_r);
      const Parts<N> features{features_of_row, pixels};
#pragma unroll 1
      for (int k = 0; k < 3; ++k) {
#pragma unroll 1
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
    const Parts<N> grads{grad_logits, pixels};  // this thread's own values
#pragma unroll 1
    for (int k = 0; k < 3; ++k) {
      typename N::Result grad;
      load_result<N>(grad_features, pixels, grad, k, 3);
      grads.multiply(grad, k, transposed, kAttention, 0);
      store_result<N>(grad_features, pixels, grad, k, 3);
    }
  }
}

}  // namespace ciema::cross_spatial
