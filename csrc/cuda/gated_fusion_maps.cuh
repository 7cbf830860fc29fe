// What the kernels of gated fusion (spec.md 2.4) share that go through maps element by element:
// which thread takes which elements, norms as scale and shift, sums over a block's channels.
//
// A block takes kChannels neighbouring channels and a run of pixel tiles of kTile pixels; the tiles
// of all samples are numbered, sample · tiles + tile. A thread takes 16 bytes of neighbours at once
// (map.cuh): "rows" pixels of one channel, "channels_last" channels of one pixel.
#pragma once

#include "product_epilogues.cuh"

// Bugs for the tests, none in a build, beside those of product.cuh. 11: sums read before all warps
// wrote theirs, 12: sums stored past the last channel, 13: a barrier of matrix_product.cuh is left
// out.
#ifndef PLANT
#define PLANT 0
#endif

namespace ciema {
namespace gated_fusion {

using product::Layout;
using product::load_run;
using product::Map;
using product::relu;
using product::Run;
using product::sigmoid;
using product::store_run;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// A batch norm, its vectors (C,).
struct Norm : product::Norm {
  __device__ __forceinline__ float rstd(int channel) const { return rsqrtf(var[channel] + eps); }
  __device__ __forceinline__ float scale(int channel) const {
    return weight[channel] * rstd(channel);
  }
  __device__ __forceinline__ float shift(int channel) const {
    return bias[channel] - mean[channel] * scale(channel);
  }
};

// How a launch covers a map: see the head of this file.
struct Cover {
  int batch, channels, pixels;
  int tiles;  // pixel tiles of a sample
  int run;    // tiles that a block goes through
  int runs;   // blocks along the tiles
};

template <class Element, Layout kOfMaps>
struct Lanes {
  using T = Element;
  static constexpr Layout kLayout = kOfMaps;
  static constexpr bool kRows = kLayout == Layout::kRows;
  static constexpr int kRun = Vector<T>::kElements;
  static constexpr int kChannelLanes = 8;
  static constexpr int kPixelLanes = kThreads / kChannelLanes;
  static constexpr int kStep = kRows ? kPixelLanes * kRun : kPixelLanes;  // pixels at once
  static constexpr int kTile = kRows ? 256 : 128;
  // More would not overlap more loads, which follow branches; fewer of 16 bits, and one spills.
  static constexpr int kStepsUnrolled = sizeof(T) == 2 ? 2 : 1;
  static constexpr int kOwn = kRows ? 1 : kRun;  // channels of a thread
  static constexpr int kChannels = kChannelLanes * kOwn;
  static_assert(kTile % kStep == 0 && kChannelLanes == kWarps);

  // The thread's first channel among the block's, and first pixel of a step.
  __device__ __forceinline__ static int channel() {
    const int thread = static_cast<int>(threadIdx.x);
    return kRows ? thread / kWarp : thread % kChannelLanes * kRun;
  }
  __device__ __forceinline__ static int pixel() {
    const int thread = static_cast<int>(threadIdx.x);
    return kRows ? thread % kWarp * kRun : thread / kChannelLanes;
  }
  // Which of the thread's channels element i belongs to.
  __device__ __forceinline__ static constexpr int own(int i) { return kRows ? 0 : i; }

  // Calls body(run) for the thread's elements in the tiles of a block; `channel` is its first.
  template <class Body>
  __device__ __forceinline__ static void for_each(const Cover& cover, int block_run, int channel,
                                                  Body body) {
    const int parts = cover.batch * cover.tiles;
    const int first = block_run * cover.run;
    const int end = first + cover.run < parts ? first + cover.run : parts;
    for (int part = first; part < end; ++part) {
      const int start = part % cover.tiles * kTile + pixel();
#pragma unroll kStepsUnrolled
      for (int step = 0; step < kTile; step += kStep) {
        const int at = start + step;
        const int count = kRows ? cover.pixels - at : cover.channels - channel;
        if (at < cover.pixels) body(Run{part / cover.tiles, channel, at, count});
      }
    }
  }
};

// w (B, G, H·W) at the elements of a run of a map of c channels to a group.
template <class T, Layout kLayout, int kRun>
__device__ __forceinline__ void load_gates(const Map& w, const Run& run, int group_channels,
                                           float (&gate)[kRun]) {
  const int group = run.channel / group_channels;
  if constexpr (kLayout == Layout::kRows) {
    load_run<T>(w, {run.b, group, run.pixel, run.count}, gate);
  } else {
    const T* own = product::address_of<const T>(w, {run.b, group, run.pixel, 0});
    const int left = (group + 1) * group_channels - run.channel;  // channels of the first group
    const float first = to_float(*own);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      gate[i] = first;
      if (i >= left && i < run.count) {
        const int other = (run.channel + i) / group_channels - group;
        gate[i] = to_float(own[other * w.stride_c]);
      }
    }
  }
}

// Sums over the pixels of a block, of kCount quantities: from every thread's part to `total`
// [kCount][kChannels] in shared memory, in a fixed order. All threads call it and may read then.
template <class L, int kCount>
__device__ __forceinline__ void reduce_pixels(float (&part)[kCount][L::kOwn],
                                              float (&total)[kCount][L::kChannels]) {
  CIEMA_SHARED(float, parts, [kCount][kWarps][L::kChannels]);
  constexpr int kLowest = L::kRows ? 1 : L::kChannelLanes;  // lanes below it hold other channels
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int i = 0; i < L::kOwn; ++i) {
      float sum = part[n][i];
#pragma unroll
      for (int lanes = kWarp / 2; lanes >= kLowest; lanes /= 2) {
        sum += __shfl_xor_sync(kFullMask, sum, lanes);
      }
      if constexpr (L::kRows) {
        if (thread % kWarp == 0) total[n][thread / kWarp] = sum;
      } else {
        if (thread % kWarp < kLowest) parts[n][thread / kWarp][L::channel() + i] = sum;
      }
    }
  }
  if (PLANT != 11) __syncthreads();
  if constexpr (!L::kRows) {
    for (int at = thread; at < kCount * L::kChannels; at += kThreads) {
      const int n = at / L::kChannels, channel = at % L::kChannels;
      float sum = parts[n][0][channel];
      for (int warp = 1; warp < kWarps; ++warp) sum += parts[n][warp][channel];
      total[n][channel] = sum;
    }
    __syncthreads();
  }
}

}  // namespace gated_fusion
}  // namespace ciema
