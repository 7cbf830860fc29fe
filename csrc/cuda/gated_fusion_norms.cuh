// Batch statistics of gated fusion in two stages, in a fixed order: a product leaves the moments of
// its pixel tiles, (parts, 2, C) with mean and sum of squared deviations; here they become mean and
// biased variance by Chan's formula. Sums for the norms' backward, (parts, 2, C), are added alike.
// All in float32. Bytes: the moments or sums once.
#pragma once

#include "gated_fusion_maps.cuh"

namespace ciema {
namespace gated_fusion {

// Moments of the pixel tiles of a product's result, or null.
struct TileMoments {
  const float* data;
  int parts, tiles, tile_pixels, pixels;

  __device__ __forceinline__ float count(int part) const {
    const int left = pixels - part % tiles * tile_pixels;
    return static_cast<float>(left < tile_pixels ? left : tile_pixels);
  }
};

// Mean and variance of kChannels channels from `first` on; all threads call it, and may read then.
template <int kChannels>
__device__ __forceinline__ void merge_moments(const TileMoments& moments, int first,
                                              int channels, float (&mean)[kChannels],
                                              float (&var)[kChannels]) {
  constexpr int kRows = kThreads / kChannels;
  CIEMA_SHARED(float, merged, [3][kRows][kChannels]);
  const int channel = static_cast<int>(threadIdx.x) % kChannels;
  const int row = static_cast<int>(threadIdx.x) / kChannels;
  Moments own{};
  if (first + channel < channels) {
    for (int part = row; part < moments.parts; part += kRows) {
      const float* at = moments.data + static_cast<int64_t>(part) * 2 * channels + first + channel;
      own.merge(at[0], at[channels], moments.count(part));
    }
  }
  merged[0][row][channel] = own.mean;
  merged[1][row][channel] = own.m2;
  merged[2][row][channel] = own.count;
  __syncthreads();
  if (row == 0) {
    for (int other = 1; other < kRows; ++other) {
      own.merge(merged[0][other][channel], merged[1][other][channel], merged[2][other][channel]);
    }
    mean[channel] = own.mean;
    var[channel] = own.m2 / own.count;
  }
  __syncthreads();
}

// Adds (parts, kCount, C) over the parts, for kChannels channels from `first` on; as above.
template <int kCount, int kChannels>
__device__ __forceinline__ void merge_sums(const float* sums, int parts, int first,
                                           int channels, float (&total)[kCount][kChannels]) {
  constexpr int kRows = kThreads / kChannels;
  CIEMA_SHARED(float, merged, [kCount][kRows][kChannels]);
  const int channel = static_cast<int>(threadIdx.x) % kChannels;
  const int row = static_cast<int>(threadIdx.x) / kChannels;
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    float sum = 0.0f;
    if (first + channel < channels) {
      for (int part = row; part < parts; part += kRows) {
        sum += sums[(static_cast<int64_t>(part) * kCount + n) * channels + first + channel];
      }
    }
    merged[n][row][channel] = sum;
  }
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < kCount * kChannels; at += kThreads) {
    const int n = at / kChannels, of = at % kChannels;
    float sum = merged[n][0][of];
    for (int other = 1; other < kRows; ++other) sum += merged[n][other][of];
    total[n][of] = sum;
  }
  __syncthreads();
}

// How a batch norm's backward treats one channel: gain · grad + slope · (x − mean) + level, from
// the sums of grad and grad ⊙ n over all `count` values. Frozen norms have the gain alone.
struct Slopes {
  float gain, slope, level;

  __device__ __forceinline__ Slopes() : gain(0.0f), slope(0.0f), level(0.0f) {}
  __device__ __forceinline__ Slopes(const Norm& norm, int channel, float total, float weighted,
                                    float count, bool training) {
    const float rstd = norm.rstd(channel);
    gain = norm.weight[channel] * rstd;
    slope = training ? -gain * rstd * (weighted / count) : 0.0f;
    level = training ? -gain * (total / count) : 0.0f;
  }
};

}  // namespace gated_fusion
}  // namespace ciema
