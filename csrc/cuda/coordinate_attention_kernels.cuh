// Coordinate attention's kernels (spec.md 2.2), both directions; one block of 256 threads a slab.
//
//   forward   αh, αw = σ(K [mean_W e; mean_H e] + b);  mean, rstd of u = e·αw·αh over H×W
//   backward  g_u = (u − mean)·slope + offset,
//             slope = −grad_rstd·rstd³/(HW), offset = grad_mean/(HW)
//             g_logit = (grad_α + Σ g_u·e·α_other)·α(1−α)   along rows and columns
//             grad_K = Σ g_logit pᵀ, grad_b = Σ g_logit, g_p = Kᵀ g_logit
//             grad_e = g_u·αw·αh + g_p(row)/W + g_p(column)/H
//
// Layouts     as coordinate_attention.cuh; tables of H + W positions lie in shared memory, or in
//             scratch where they are too long for it.
// Grid        slabs, with no second split: a block's passes run at the bandwidth of its
//             multiprocessor, and batches that train fill the GPU with slabs. A single image
//             (32 slabs) leaves multiprocessors idle, but a split over rows or channels would cost
//             another launch, which takes about as long as the passes that it would shorten. Where
//             cross_spatial follows in evaluation its weights are packed there: more blocks of the
//             forward, cross_spatial_pack.cuh, which else would be a launch.
// Bytes       forward reads e (once from device memory, twice more from the second-level cache),
//             writes gates; backward reads e so and writes grad_e, and partials of c·c + c a slab,
//             which parameter_sums adds.
// Accuracy    everything float32; see coordinate_attention.cuh. grad_e rounds to T once.
// Recomputed  pools in the backward.
#pragma once

#include "coordinate_attention.cuh"
#include "cross_spatial_pack.cuh"

namespace ciema {

struct CoordinateAttentionParams {
  const void* e;
  void* grad_e;                        // backward; in the layout of e
  const float *weight, *bias;          // K (c, c), b (c)
  float *alpha_h, *alpha_w;            // (B, C, H), (B, C, W): written by the forward
  float *mean, *rstd;                  // (B, C)
  const float *saved_alpha_h, *saved_alpha_w, *saved_mean, *saved_rstd;
  const float *grad_alpha_h, *grad_alpha_w, *grad_mean, *grad_rstd;
  float* partials;                     // (slabs, c·c + c)
  float* tables;                       // scratch for a slab's tables, null: in shared memory
  int64_t stride_b, stride, grad_stride_b, grad_stride;  // stride: Slab::stride, in elements
  int64_t stride_group, grad_stride_group;               // from a group's first channel to the next
  int slabs, groups, channels, height, width;            // channels: of a group
  float eps;
};

namespace coordinate {

constexpr int kThreads = cross_spatial::kPackThreads;
constexpr int kForwardTables = 2, kBackwardTables = 3;
constexpr int kWidestGroup = 64;

// Floats of shared memory beside the tables: staged K, and the moments of every warp.
__host__ __device__ constexpr int workspace_size(int c) {
  return kernel_size(c) + 3 * (kThreads / kWarp) * c;
}

template <class S>
__device__ __forceinline__ float* tables_of_block(const CoordinateAttentionParams& p, const S& slab,
                                                  float* workspace, int count) {
  const int size = table_size(S::kChannelsLast, slab.channels, slab.height + slab.width);
  if (p.tables == nullptr) return workspace + round_up(workspace_size(slab.channels), 4);
  return p.tables + static_cast<int64_t>(blockIdx.x) * count * size;
}

template <class S, class T>
__device__ __forceinline__ S slab_of_block(const CoordinateAttentionParams& p, T* map,
                                           int64_t stride_b, int64_t stride_group, int64_t stride) {
  const int64_t sample = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
  return {map + sample * stride_b + group * stride_group, p.channels, p.height, p.width, stride};
}

template <class T, bool kChannelsLast, int kVector>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(CoordinateAttentionParams p, CrossSpatialPackParams pack) {
  using S = Slab<const T, kChannelsLast, kVector>;
  CIEMA_DYNAMIC_SHARED(float, workspace);
  const int to_pack = static_cast<int>(blockIdx.x) - p.slabs;
  if (to_pack >= 0) {
    cross_spatial::pack_block<T>(pack, to_pack, reinterpret_cast<T*>(workspace));
    return;
  }
  const S slab =
      slab_of_block<S>(p, static_cast<const T*>(p.e), p.stride_b, p.stride_group, p.stride);
  const int c = p.channels;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * c;
  float* data = tables_of_block(p, slab, workspace, kForwardTables);
  const auto pooled = table_of(slab, data);
  const auto gates = table_of(slab, data + table_size(kChannelsLast, c, p.height + p.width));

  stage_kernel(p.weight, c, false, workspace);
  pool(slab, pooled);
  __syncthreads();
  write_gates(slab, pooled, workspace, p.bias, gates, p.alpha_h + first * p.height,
              p.alpha_w + first * p.width);
  if (PLANT != 3) __syncthreads();
  slab_moments(slab, gates, workspace + kernel_size(c), [&](int channel, const Moments& moments) {
    p.mean[first + channel] = moments.mean;
    p.rstd[first + channel] = 1.0f / sqrtf(moments.m2 / moments.count + p.eps);
  });
}

// ---- backward ----------------------------------------------------------------------------------

// The coefficients of g_u for every channel: centre, slope, offset.
using Coefficients = float[3][kWidestGroup];

template <class S>
__device__ __forceinline__ void gradient_of_gated(const S& slab,
                                                  const Table<S::kChannelsLast>& gates,
                                                  const Coefficients& of, int channel, int row,
                                                  int column, const float (&x)[S::kVector],
                                                  float (&grad)[S::kVector]) {
#pragma unroll
  for (int e = 0; e < S::kVector; ++e) grad[e] = x[e];
  gated(slab, gates, channel, row, column, grad);
#pragma unroll
  for (int e = 0; e < S::kVector; ++e) {
    const int own = S::kChannelsLast ? channel + e : channel;
    grad[e] = (grad[e] - of[0][own]) * of[1][own] + of[2][own];
  }
}

template <class S>
__device__ void load_gates(const S& slab, const Table<S::kChannelsLast>& gates,
                           const float* alpha_h, const float* alpha_w) {
  const int positions = slab.height + slab.width;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < slab.channels * positions;
       i += static_cast<int>(blockDim.x)) {
    const int channel = i / positions, position = i % positions;
    *gates.at(channel, position) = position < slab.width
                                       ? alpha_w[channel * slab.width + position]
                                       : alpha_h[channel * slab.height + position - slab.width];
  }
}

// Pools, and the gradients of the logits.
template <class S>
__device__ void logit_gradients(const CoordinateAttentionParams& p, const S& slab,
                                const Table<S::kChannelsLast>& pooled,
                                const Table<S::kChannelsLast>& gates,
                                const Table<S::kChannelsLast>& logits, const Coefficients& of) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.channels;
  const auto finish = [&](int channel, int position, float upstream, float through) {
    const float gate = *gates.at(channel, position);
    *logits.at(channel, position) = (upstream + through) * gate * (1.0f - gate);
  };
  const auto along_row = [&](const float(&x)[S::kVector], int channel, int row, int column,
                             float(&terms)[2][S::kVector]) {
    float grad[S::kVector], other[S::kVector];
    gradient_of_gated(slab, gates, of, channel, row, column, x, grad);
    gates.of_columns(slab, channel, column, other);
#pragma unroll
    for (int e = 0; e < S::kVector; ++e) {
      terms[0][e] = x[e];
      terms[1][e] = grad[e] * x[e] * other[e];
    }
  };
  sum_along_rows<2>(slab, along_row, [&](int channel, int row, const float(&sums)[2]) {
    *pooled.at(channel, p.width + row) = sums[0] / static_cast<float>(p.width);
    const float upstream = p.grad_alpha_h[(first + channel) * p.height + row];
    finish(channel, p.width + row, upstream, sums[1]);
  });
  const auto along_column = [&](const float(&x)[S::kVector], int channel, int row, int column,
                                float(&terms)[2][S::kVector]) {
    float grad[S::kVector], other[S::kVector];
    gradient_of_gated(slab, gates, of, channel, row, column, x, grad);
    gates.of_row(slab, channel, row, other);
#pragma unroll
    for (int e = 0; e < S::kVector; ++e) {
      terms[0][e] = x[e];
      terms[1][e] = grad[e] * x[e] * other[e];
    }
  };
  sum_along_columns<2>(slab, along_column, [&](int channel, int column, const float(&sums)[2]) {
    *pooled.at(channel, column) = sums[0] / static_cast<float>(p.height);
    const float upstream = p.grad_alpha_w[(first + channel) * p.width + column];
    finish(channel, column, upstream, sums[1]);
  });
}

// This slab's Σ g_logit pᵀ (c, c) and Σ g_logit (c).
template <class S>
__device__ void kernel_gradient(const S& slab, const Table<S::kChannelsLast>& pooled,
                                const Table<S::kChannelsLast>& logits, float* partials) {
  const int c = slab.channels, positions = slab.height + slab.width;
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < c * c;
       item += static_cast<int>(blockDim.x)) {
    const int output = item / c, input = item % c;
    float sum = 0.0f;
    int position = 0;
    if constexpr (!S::kChannelsLast) {
#pragma unroll 2
      for (; position + 4 <= positions; position += 4) {
        float g[4], value[4];
        load_floats<4>(logits.at(output, position), g);
        load_floats<4>(pooled.at(input, position), value);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum = fmaf(g[e], value[e], sum);
      }
    }
#pragma unroll 2
    for (; position < positions; ++position) {
      sum = fmaf(*logits.at(output, position), *pooled.at(input, position), sum);
    }
    partials[item] = sum;
  }
#pragma unroll 1
  for (int output = static_cast<int>(threadIdx.x); output < c;
       output += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int position = 0; position < positions; ++position) sum += *logits.at(output, position);
    partials[c * c + output] = sum;
  }
}

template <class S, class D, class T>
__device__ void map_gradient(const S& slab, const D& target, const Table<S::kChannelsLast>& gates,
                             const Table<S::kChannelsLast>& grad_pooled, const Coefficients& of,
                             T) {
  const int of_row = S::kChannelsLast ? slab.channel_packs() : slab.column_packs();
  const int items = slab.channel_packs() * slab.height * slab.column_packs();
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < items;
       item += static_cast<int>(blockDim.x)) {
    const int inner = item % of_row, outer = item / of_row;
    const int channel = S::kChannelsLast ? inner * S::kChannels : outer / slab.height;
    const int row = S::kChannelsLast ? outer / slab.width : outer % slab.height;
    const int column = S::kChannelsLast ? outer % slab.width : inner * S::kColumns;
    float x[S::kVector], grad[S::kVector], along[S::kVector], across[S::kVector];
    slab.load(channel, row, column, x);
    gradient_of_gated(slab, gates, of, channel, row, column, x, grad);
    gates.of_columns(slab, channel, column, across);
    gates.of_row(slab, channel, row, along);
#pragma unroll
    for (int e = 0; e < S::kVector; ++e) grad[e] *= across[e] * along[e];
    grad_pooled.of_columns(slab, channel, column, across);
    grad_pooled.of_row(slab, channel, row, along);
    T out[S::kVector];
#pragma unroll
    for (int e = 0; e < S::kVector; ++e) {
      out[e] = from_float<T>(grad[e] + across[e] + along[e]);
    }
    if constexpr (S::kVector == 1) {
      *target.pack(channel, row, column) = out[0];
    } else {
      Vector<T> vector;
#pragma unroll
      for (int e = 0; e < S::kVector; ++e) vector.element[e] = out[e];
      store_vector(target.pack(channel, row, column), vector);
    }
  }
}

template <class T, bool kChannelsLast, int kVector>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(CoordinateAttentionParams p) {
  using S = Slab<const T, kChannelsLast, kVector>;
  CIEMA_DYNAMIC_SHARED(float, workspace);
  CIEMA_SHARED(float, coefficients, [3][kWidestGroup]);
  const S slab =
      slab_of_block<S>(p, static_cast<const T*>(p.e), p.stride_b, p.stride_group, p.stride);
  const int c = p.channels, positions = p.height + p.width;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * c;
  const auto pixels = static_cast<float>(p.height * p.width);
  const int size = table_size(kChannelsLast, c, positions);
  float* data = tables_of_block(p, slab, workspace, kBackwardTables);
  const auto pooled = table_of(slab, data), gates = table_of(slab, data + size);
  const auto logits = table_of(slab, data + 2 * size);

  stage_kernel(p.weight, c, true, workspace);
  load_gates(slab, gates, p.saved_alpha_h + first * p.height, p.saved_alpha_w + first * p.width);
  for (int channel = static_cast<int>(threadIdx.x); channel < c; channel += kThreads) {
    const float rstd = p.saved_rstd[first + channel];
    coefficients[0][channel] = p.saved_mean[first + channel];
    coefficients[1][channel] = -p.grad_rstd[first + channel] * rstd * rstd * rstd / pixels;
    coefficients[2][channel] = p.grad_mean[first + channel] / pixels;
  }
  __syncthreads();
  logit_gradients(p, slab, pooled, gates, logits, coefficients);
  __syncthreads();
  kernel_gradient(slab, pooled, logits,
                  p.partials + static_cast<int64_t>(blockIdx.x) * c * (c + 1));
  __syncthreads();  // the pools give way to their gradients
  apply_kernel(slab, logits, workspace, [&](int channel, int position, float grad) {
    const int count = position < p.width ? p.height : p.width;
    *pooled.at(channel, position) = grad / static_cast<float>(count);
  });
  __syncthreads();
  const auto target = slab_of_block<Slab<T, kChannelsLast, kVector>>(
      p, static_cast<T*>(p.grad_e), p.grad_stride_b, p.grad_stride_group, p.grad_stride);
  map_gradient(slab, target, gates, pooled, coefficients, T{});
}

}  // namespace coordinate
}  // namespace ciema
