// The last launch of cross_spatial's training forward, once both norms' statistics are known:
//
//   mean y = BN(mean R) + α·Wc·mean X        s = softmax_c(mean y)
//   w = σ(Σ_c s1·y2 + Σ_c s2·y1), of R1, R2, X1, X2 with vectors of the slab (spec.md 5.4)
//
// Grid        (slabs, shares of the pixels); every block draws the slab's vectors, which costs two
//             c×c products of vectors, the first also stores softmax1 and softmax2.
// Bytes       R and X of both branches once (4·c values a pixel, from the second-level cache), w.
// Accuracy    float32; w rounds to T.
#pragma once

#include "cross_spatial_training.cuh"

namespace ciema::cross_spatial {

constexpr int kGateThreads = 256;

// Of a slab: softmax vectors, and what R and X of each branch are multiplied with.
template <int kChannels>
struct GateVectors {
  float scale[2][kChannels], shift[2][kChannels];
  float mean_x[2][kChannels], mean_y[2][kChannels];
  float softmax[2][kChannels];
  float of_reduced[2][kChannels], of_branch[2][kChannels];
};

// Softmax over c values, element `i` of it.
__device__ __forceinline__ float softmax_of(const float* values, int c, int i) {
  float largest = -INFINITY, sum = 0.0f;
  // Not fmaxf, which would drop a NaN that the sum has to carry on.
  for (int k = 0; k < c; ++k) largest = values[k] > largest ? values[k] : largest;
  for (int k = 0; k < c; ++k) sum += expf(values[k] - largest);
  return expf(values[i] - largest) / sum;
}

template <int kChannels>
__device__ void draw_vectors(const CrossSpatialTrainingParams& p, int slab,
                             GateVectors<kChannels>& v) {
  const CrossSpatialSizes& s = p.sizes;
  const int c = s.channels, branch = static_cast<int>(threadIdx.x) / kChannels;
  const int i = static_cast<int>(threadIdx.x) % kChannels;
  const bool own = branch < 2;
  const int row = branch * s.slabs + slab;
  const auto pixels = static_cast<float>(s.height * s.width);
  if (own) {
    float sum = 0.0f;
    for (int share = 0; share < s.shares; ++share) {
      sum += p.sums[(static_cast<int64_t>(row) * s.shares + share) * kChannels + i];
    }
    v.mean_x[branch][i] = sum / pixels;
    const int at = set_of(s, row) * c + i;
    const float scale = i < c ? p.reduce.weight[i] / sqrtf(p.reduce.var[at] + p.reduce.eps) : 0.0f;
    v.scale[branch][i] = scale;
    v.shift[branch][i] = i < c ? p.reduce.bias[i] - p.reduce.mean[at] * scale : 0.0f;
  }
  __syncthreads();
  const float alpha = p.alpha[0];
  if (own) {
    const float* rows = p.reduced_moments +
                        static_cast<int64_t>(row) * s.shares * moments_size(kChannels);
    const float mean_reduced =
        merge_rows(rows, moments_size(kChannels), s.shares, kChannels, i).mean;
    float feat = 0.0f;
    for (int k = 0; k < c && i < c; ++k) {
      feat = fmaf(p.channel_feat[i * c + k], v.mean_x[branch][k], feat);
    }
    v.mean_y[branch][i] = mean_reduced * v.scale[branch][i] + v.shift[branch][i] + alpha * feat;
  }
  __syncthreads();
  if (own) v.softmax[branch][i] = i < c ? softmax_of(v.mean_y[branch], c, i) : 0.0f;
  __syncthreads();
  if (own) {
    const float* other = v.softmax[1 - branch];  // softmax 1 weighs y2, and the other way round
    v.of_reduced[branch][i] = v.scale[branch][i] * other[i];
    float back = 0.0f;
    for (int k = 0; k < c && i < c; ++k) back = fmaf(p.channel_feat[k * c + i], other[k], back);
    v.of_branch[branch][i] = alpha * back;
    if (blockIdx.y == 0 && i < c) {
      (branch == 0 ? p.softmax1 : p.softmax2)[static_cast<int64_t>(slab) * c + i] =
          v.softmax[branch][i];
    }
  }
  __syncthreads();
}

// Grid (slabs, shares). Up to four lanes take a pixel, each every fourth pack of channels.
template <class N>
__global__ void __launch_bounds__(kGateThreads) gate_kernel(CrossSpatialTrainingParams p) {
  using T = typename N::T;
  constexpr int kElements = Vector<T>::kElements, kPacks = N::kChannels / kElements;
  constexpr int kLanes = kPacks < 4 ? kPacks : 4;
  CIEMA_SHARED(GateVectors<N::kChannels>, vectors, [1]);
  const GateVectors<N::kChannels>& v = vectors[0];
  const CrossSpatialSizes& s = p.sizes;
  const int slab = static_cast<int>(blockIdx.x), pixels = s.height * s.width;
  draw_vectors<N::kChannels>(p, slab, vectors[0]);
  float constant = 0.0f;
  for (int i = 0; i < s.channels; ++i) {
    constant += v.shift[0][i] * v.softmax[1][i] + v.shift[1][i] * v.softmax[0][i];
  }
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int step = s.shares * (kGateThreads / kLanes);
  for (int first = static_cast<int>(blockIdx.y) * (kGateThreads / kLanes); first < pixels;
       first += step) {
    const int pixel = first + static_cast<int>(threadIdx.x) / kLanes;
    float logit = 0.0f;
    if (pixel < pixels) {
#pragma unroll
      for (int branch = 0; branch < 2; ++branch) {
        const int64_t row = branch * s.slabs + slab;
        const int64_t at = (row * pixels + pixel) * N::kChannels;
        const T* reduced = static_cast<const T*>(p.reduced) + at;
        const T* x = static_cast<const T*>(p.sheets) + at;
#pragma unroll
        for (int pack = 0; pack < kPacks / kLanes; ++pack) {
          const int channel = (pack * kLanes + lane) * kElements;
          const auto r = load_vector<Vector<T>>(reduced + channel);
          const auto value = load_vector<Vector<T>>(x + channel);
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            logit = fmaf(to_float(r.element[e]), v.of_reduced[branch][channel + e], logit);
            logit = fmaf(to_float(value.element[e]), v.of_branch[branch][channel + e], logit);
          }
        }
      }
    }
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      logit += __shfl_xor_sync(kFullMask, logit, distance);
    }
    if (lane == 0 && pixel < pixels) {
      const float gate = 1.0f / (1.0f + expf(-(logit + constant)));
      static_cast<T*>(p.w)[static_cast<int64_t>(slab) * pixels + pixel] = from_float<T>(gate);
    }
  }
}

}  // namespace ciema::cross_spatial
