// Coordinate attention (spec.md 2.2) of a slab by the block that then runs cross_spatial on it: the
// same windows of e in shared memory, whatever e's layout, instead of a launch of its own.
//
//   p = means over W and over H          αh, αw = σ(K p + b)
//   mean, rstd of u = e·αw·αh            over the slab's pixels
//
// Reads       e twice, once from device memory, then from the second-level cache.
// Accuracy    float32; moments of a thread's pixels of a window by two passes around their mean,
//             merged by Chan's formula, so that equal values have a variance of exactly 0. Fixed
//             order, no atomics. u is rounded before its mean is subtracted.
#pragma once

#include "cross_spatial_branches.cuh"
#include "moments.cuh"

// Bugs for the tests; none in a build. 1: the sums of a window's last row are left out.
#ifndef PLANT
#define PLANT 0
#endif

namespace ciema::cross_spatial {

// Windows as large as the tile of e, which cover the map without overlap.
__device__ __forceinline__ int window_count(const CrossSpatialParams& p) {
  return parts(p.height, p.rows + 2 * kHaloE) * parts(p.width, p.columns + 2 * kHaloE);
}
__device__ __forceinline__ Window window_of(const CrossSpatialParams& p, int index) {
  const int rows = p.rows + 2 * kHaloE, columns = p.columns + 2 * kHaloE;
  const int across = parts(p.width, columns);
  const int top = index / across * rows, left = index % across * columns;
  return {top, left, min(rows, p.height - top), min(columns, p.width - left)};
}

// Adds `count` pixels of a pack, `step` elements apart, to sums.
template <class T, int kElements>
__device__ __forceinline__ void add_pixels(const T* first, int step, int count,
                                           float (&sums)[kElements]) {
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const auto pack = load_vector<Vector<T>>(first + i * step);
#pragma unroll
    for (int k = 0; k < kElements; ++k) sums[k] += to_float(pack.element[k]);
  }
}

// Adds a window's sums over rows and columns to `pooled` of the slab: columns 0…W − 1, then rows.
template <class N>
__device__ __forceinline__ void pool_window(const CrossSpatialParams& p, const Window& window,
                                            const typename N::T* e_tile, float* pooled) {
  using T = typename N::T;
  constexpr int kElements = Vector<T>::kElements, kPacks = N::kChannels / kElements;
  const int items = (window.columns + window.rows - (PLANT == 1 ? 1 : 0)) * kPacks;
#pragma unroll 1
  for (int item = thread_of_phase(); item < items; item += kThreads) {
    const int channel = item % kPacks * kElements, line = item / kPacks;
    const bool column = line < window.columns;
    const int row = line - window.columns;
    float* out = pooled + channel +
                 (column ? window.left + line : p.width + window.top + row) * N::kChannels;
    float sums[kElements] = {};
    if (column ? window.top > 0 : window.left > 0) {
#pragma unroll
      for (int k = 0; k < kElements; ++k) sums[k] = out[k];
    }
    const T* first = e_tile + channel + (column ? line * N::kPitch : row * p.e_pitch);
    add_pixels(first, column ? p.e_pitch : N::kPitch, column ? window.rows : window.columns, sums);
#pragma unroll
    for (int k = 0; k < kElements; ++k) out[k] = sums[k];
  }
}

// Gates of every position and channel, from the sums.
__device__ __forceinline__ void write_gates(const CrossSpatialParams& p, int64_t slab,
                                            const float* pooled, int channels) {
  const int positions = p.width + p.height, c = p.channels;
  const int64_t first = slab * c;
#pragma unroll 1
  for (int item = thread_of_phase(); item < positions * c; item += kThreads) {
    const int position = item % positions, channel = item / positions;
    const bool column = position < p.width;
    const float* sums = pooled + position * channels;
    const float* weight = p.weight + channel * c;
    float logit = 0.0f;
#pragma unroll 4
    for (int i = 0; i < c; ++i) logit = fmaf(weight[i], sums[i], logit);
    logit = logit / static_cast<float>(column ? p.height : p.width) + p.bias[channel];
    const float gate = 1.0f / (1.0f + expf(-logit));
    if (column) {
      p.own_alpha_w[(first + channel) * p.width + position] = gate;
    } else {
      p.own_alpha_h[(first + channel) * p.height + position - p.width] = gate;
    }
  }
}

// Adds the moments of u in a window to those of this warp; merged: (kWarps, 3, kChannels) in shared
// memory. A thread has every kStep-th pixel of a pack of channels.
template <class N>
__device__ __forceinline__ void add_window_moments(const CrossSpatialParams& p, int64_t slab,
                                                   const Window& window,
                                                   const typename N::T* e_tile, float* merged) {
  using T = typename N::T;
  constexpr int kElements = Vector<T>::kElements, kPacks = N::kChannels / kElements;
  constexpr int kStep = kThreads / kPacks;
  const int thread = thread_of_phase(), channel = thread % kPacks * kElements;
  const int pixels = window.rows * window.columns, own = thread / kPacks;
  const int64_t first = slab * p.channels + channel;
  const auto gated = [&](int pixel, float(&u)[kElements]) {
    const int i = pixel / window.columns, j = pixel % window.columns;
    const auto pack = load_vector<Vector<T>>(e_tile + i * p.e_pitch + j * N::kPitch + channel);
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      u[k] = 0.0f;
      if (channel + k >= p.channels) continue;
      const float gate_w = p.alpha_w[(first + k) * p.width + window.left + j];
      const float gate_h = p.alpha_h[(first + k) * p.height + window.top + i];
      u[k] = rounded_product(rounded_product(to_float(pack.element[k]), gate_w), gate_h);
    }
  };
  Moments moments[kElements];
  if (own < pixels) {
    const float count = static_cast<float>((pixels - own - 1) / kStep + 1);
    float origin[kElements], mean[kElements] = {}, squares[kElements] = {};
    gated(own, origin);
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
      for (int pixel = own; pixel < pixels; pixel += kStep) {
        float u[kElements];
        gated(pixel, u);
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
          const float centred = u[k] - origin[k];
          (pass == 0 ? mean[k] : squares[k]) += pass == 0 ? centred : centred * centred;
        }
      }
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        if (pass == 0) origin[k] += mean[k] / count;
      }
    }
#pragma unroll
    for (int k = 0; k < kElements; ++k) moments[k].merge(origin[k], squares[k], count);
  }
  float* of_warp = merged + thread / kWarp * 3 * N::kChannels + channel;
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    moments[k].merge_lanes(kPacks, kWarp);
    if (thread % kWarp >= kPacks) continue;
    Moments whole;
    if (window.top + window.left > 0) {
      whole = {of_warp[k], of_warp[N::kChannels + k], of_warp[2 * N::kChannels + k]};
    }
    whole.merge(moments[k].mean, moments[k].m2, moments[k].count);
    of_warp[k] = whole.mean;
    of_warp[N::kChannels + k] = whole.m2;
    of_warp[2 * N::kChannels + k] = whole.count;
  }
}

// Mean and rstd of u from the warps' moments.
__device__ __forceinline__ void write_moments(const CrossSpatialParams& p, int64_t slab,
                                              const float* merged, int channels) {
  const int own = thread_of_phase();
  if (own >= p.channels) return;
  Moments whole;
#pragma unroll 1
  for (int warp = 0; warp < kWarps; ++warp) {
    const float* other = merged + warp * 3 * channels + own;
    whole.merge(other[0], other[channels], other[2 * channels]);
  }
  p.own_mean[slab * p.channels + own] = whole.mean;
  p.own_rstd[slab * p.channels + own] = 1.0f / sqrtf(whole.m2 / whole.count + p.eps);
}

}  // namespace ciema::cross_spatial
