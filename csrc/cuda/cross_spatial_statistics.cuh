// Sums and moments over the pixels of cross_spatial's sheets: of a warp's results, of a block, and
// of all blocks of a set of statistics. Float32, variance by Chan's formula, fixed order, no
// atomics.
#pragma once

#include "cross_spatial_sheets.cuh"
#include "moments.cuh"

namespace ciema::cross_spatial {

// f(pixel of the map, its value) summed over the warp's pixels for the channels 8n + 2q + j; every
// lane with the same q gets the sum.
template <class N, int kCount, class Term>
__device__ __forceinline__ float sum_over_pixels(const Pixels<N>& pixels,
                                                 const float (&value)[N::kRows][kCount][4], int n,
                                                 int j, Term term) {
  float sum = 0.0f;
#pragma unroll
  for (int m = 0; m < N::kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (pixels.at[m][half] >= 0) sum += term(value[m][n][2 * half + j]);
    }
  }
#pragma unroll
  for (int distance = 4; distance < kWarp; distance *= 2) {
    sum += __shfl_xor_sync(kFullMask, sum, distance);
  }
  return sum;
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

// Adds a result's pixels to a warp's moments in shared memory, mean[8·kCount] and m2[8·kCount] of
// `before` values each.
template <class N, int kCount>
__device__ __forceinline__ void add_moments(const Pixels<N>& pixels,
                                            const float (&value)[N::kRows][kCount][4], float* mean,
                                            float* m2, int before, int count) {
  if (count == 0) return;
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float own = sum_over_pixels<N>(pixels, value, n, j, [](float v) { return v; }) /
                        static_cast<float>(count);
      const float squares = sum_over_pixels<N>(pixels, value, n, j, [own](float v) {
        return (v - own) * (v - own);
      });
      if (lane_of_warp() >= 4) continue;
      const int channel = 8 * n + 2 * lane_of_warp() + j;
      Moments moments;
      moments.mean = mean[channel];
      moments.m2 = m2[channel];
      moments.count = static_cast<float>(before);
      moments.merge(own, squares, static_cast<float>(count));
      mean[channel] = moments.mean;
      m2[channel] = moments.m2;
    }
  }
}

// A block's moments of `count` channels: mean[count], m2[count] and how many values, in a row of
// moments_size(count) floats.
__host__ __device__ constexpr int moments_size(int count) { return 2 * count + 1; }

__device__ __forceinline__ Moments moments_of(const float* row, int count, int channel) {
  Moments moments;
  moments.mean = row[channel];
  moments.m2 = row[count + channel];
  moments.count = row[2 * count];
  return moments;
}

// Merges `rows` rows in order; to be called by all threads that have a channel.
__device__ __forceinline__ Moments merge_rows(const float* first, int64_t step, int rows, int count,
                                              int channel) {
  Moments whole;
#pragma unroll 4
  for (int row = 0; row < rows; ++row) {
    const Moments other = moments_of(first + row * step, count, channel);
    whole.merge(other.mean, other.m2, other.count);
  }
  return whole;
}

// Of a block's warps, `warps` rows in shared memory, to the block's own row in scratch.
__device__ __forceinline__ void store_moments(const float* of_warps, int warps, int count,
                                              float* moments) {
  float* own = moments + partial_of_block() * moments_size(count);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const Moments whole = merge_rows(of_warps, moments_size(count), warps, count, i);
    own[i] = whole.mean;
    own[count + i] = whole.m2;
    if (i == 0) own[2 * count] = whole.count;
  }
}

// The last block of a set: mean and biased variance of `parts`·c channels from all its rows.
template <int kChannels>
__device__ void finish_set(const CrossSpatialSizes& s, int set, int parts, const float* moments,
                           float* of_warps, float* mean, float* var) {
  const int count = parts * kChannels, size = moments_size(count);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const SetRows rows(s, set);
  const int total = rows.count * s.shares, own = (total + warps - 1) / warps;
  const int begin = warp_of_block() * own, end = min(begin + own, total);
  for (int channel = lane_of_warp(); channel < count; channel += kWarp) {
    Moments whole;
#pragma unroll 4
    for (int i = begin; i < end; ++i) {
      const int64_t row = rows.first + static_cast<int64_t>(i / s.shares) * rows.step;
      const float* partial = moments + (row * s.shares + i % s.shares) * size;
      const Moments other = moments_of(partial, count, channel);
      whole.merge(other.mean, other.m2, other.count);
    }
    of_warps[warp_of_block() * size + channel] = whole.mean;
    of_warps[warp_of_block() * size + count + channel] = whole.m2;
    if (channel == 0) of_warps[warp_of_block() * size + 2 * count] = whole.count;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < parts * s.channels;
       i += static_cast<int>(blockDim.x)) {
    const int channel = i / s.channels * kChannels + i % s.channels;
    const Moments whole = merge_rows(of_warps, size, warps, count, channel);
    mean[set * parts * s.channels + i] = whole.mean;
    var[set * parts * s.channels + i] = whole.m2 / whole.count;
  }
}

}  // namespace ciema::cross_spatial
