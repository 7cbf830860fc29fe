// Batch statistics from the moments that the tiles of a product leave (Reduction::kMoments).
//
//   mean[m] and biased var[m] over all samples and pixels, from each tile's mean and M2, by Chan's
//   formula
//
// Layouts     partials (parts, {mean, M2}, rows), parts in the order of samples, then tiles.
// Grid        one block for 32 channels; warp w joins the parts w, w + 32, … in order, then the
//             first warp joins the warps in order: the same bits every run.
// Bytes       8 a part and channel.
#pragma once

#include "moments.cuh"

// Bugs for the tests, none in a build. 21: the barrier before the warps are joined left out, 22:
// the last channels' tail not cut.
#ifndef PLANT
#define PLANT 0
#endif

namespace ciema::product {

struct MomentsParams {
  const float* partials;
  float *mean, *var;
  int parts, rows;
  int pixels, tile_pixels;  // of a sample, of a tile
};

constexpr int kMomentsThreads = 1024;

__global__ void __launch_bounds__(kMomentsThreads) moments_kernel(MomentsParams p) {
  constexpr int kWarps = kMomentsThreads / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int channel = static_cast<int>(blockIdx.x) * kWarp + lane;
  const bool inside = channel < p.rows || PLANT == 22;
  const int tiles = (p.pixels + p.tile_pixels - 1) / p.tile_pixels;
  Moments own{};
  for (int part = warp; inside && part < p.parts; part += kWarps) {
    const int left = p.pixels - part % tiles * p.tile_pixels;
    const float* moments = p.partials + static_cast<int64_t>(part) * 2 * p.rows + channel;
    own.merge(moments[0], moments[p.rows],
              static_cast<float>(left < p.tile_pixels ? left : p.tile_pixels));
  }
  CIEMA_SHARED(float, counts, [kWarps * kWarp]);
  CIEMA_SHARED(float, means, [kWarps * kWarp]);
  CIEMA_SHARED(float, m2s, [kWarps * kWarp]);
  counts[threadIdx.x] = own.count;
  means[threadIdx.x] = own.mean;
  m2s[threadIdx.x] = own.m2;
  if (PLANT != 21) __syncthreads();
  if (warp != 0 || !inside) return;
  for (int other = 1; other < kWarps; ++other) {
    const int at = other * kWarp + lane;
    own.merge(means[at], m2s[at], counts[at]);
  }
  p.mean[channel] = own.mean;
  p.var[channel] = own.m2 / own.count;
}

}  // namespace ciema::product
