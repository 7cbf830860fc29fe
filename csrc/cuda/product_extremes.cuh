// Channel statistics of a product's results, from what its tiles leave beside them: they spare the
// next stage a pass over the map.
//
//   mean[b,m] = 1/S Σ_tiles sum    max[b,m] = max_tiles max    argmax[b,m] = its first position
//   A NaN counts as the maximum, the first one wins (channel_statistics.cuh).
//
// Layouts     extremes (parts, {sum, max}, rows) float32, positions (parts, rows) int32, parts in
//             the order of samples, then tiles.
// Grid        blockIdx.x = 32 channels, blockIdx.y = b; warp w joins the tiles w, w + 8, … in
//             order, then the first warp joins the warps in order: the same bits every run.
// Bytes       12 a part and channel; 16 a sample and channel written.
#pragma once

#include "channel_statistics.cuh"

// Bugs for the tests, none in a build. 23: the barrier before the warps are joined left out.
#ifndef PLANT
#define PLANT 0
#endif

namespace ciema::product {

using channel_statistics::FirstMax;
using channel_statistics::kNowhere;

// Sum and first maximum of some of a channel's results.
struct Extremes {
  float sum;
  FirstMax best;

  __device__ __forceinline__ void start() {
    sum = 0.0f;
    best.start(kNowhere);
  }
  __device__ __forceinline__ void add(float value, int position) {
    sum += value;
    best.merge(value, position);
  }
  __device__ __forceinline__ void join(float other_sum, float other_best, int position) {
    sum += other_sum;
    best.merge(other_best, position);
  }
  // Over groups of kLanes neighbouring lanes.
  template <int kLanes>
  __device__ __forceinline__ void join_lanes() {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      const float other = __shfl_xor_sync(kFullMask, sum, lanes);
      const float value = __shfl_xor_sync(kFullMask, best.value, lanes);
      join(other, value, __shfl_xor_sync(kFullMask, best.position, lanes));
    }
  }
  __device__ __forceinline__ void write(float* extremes, int* positions, int64_t part, int rows,
                                        int channel) const {
    extremes[part * 2 * rows + channel] = sum;
    extremes[(part * 2 + 1) * rows + channel] = best.value;
    positions[part * rows + channel] = best.position;
  }
};

struct ExtremesParams {
  const float* extremes;
  const int* positions;
  float *mean, *maximum;
  int64_t* argmax;
  int tiles, rows, pixels;  // of a sample
};

constexpr int kExtremesThreads = 256;

template <int kThreads>
__global__ void __launch_bounds__(kThreads) extremes_kernel(ExtremesParams p) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int channel = static_cast<int>(blockIdx.x) * kWarp + lane;
  const bool inside = channel < p.rows;
  Extremes own;
  own.start();
  for (int tile = warp; inside && tile < p.tiles; tile += kWarps) {
    const int64_t part = static_cast<int64_t>(blockIdx.y) * p.tiles + tile;
    const float* extremes = p.extremes + part * 2 * p.rows + channel;
    own.join(extremes[0], extremes[p.rows], p.positions[part * p.rows + channel]);
  }
  CIEMA_SHARED(float, sums, [kThreads]);
  CIEMA_SHARED(float, values, [kThreads]);
  CIEMA_SHARED(int, places, [kThreads]);
  sums[threadIdx.x] = own.sum;
  values[threadIdx.x] = own.best.value;
  places[threadIdx.x] = own.best.position;
  if (PLANT != 23) __syncthreads();
  if (warp != 0 || !inside) return;
  for (int other = 1; other < kWarps; ++other) {
    const int at = other * kWarp + lane;
    own.join(sums[at], values[at], places[at]);
  }
  const int64_t at = static_cast<int64_t>(blockIdx.y) * p.rows + channel;
  p.mean[at] = own.sum / static_cast<float>(p.pixels);
  p.maximum[at] = own.best.value;
  p.argmax[at] = own.best.position;
}

}  // namespace ciema::product
