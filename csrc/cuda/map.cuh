// Maps (B, C, H, W) as kernels see them: the H·W pixels are one axis, and either pixels ("rows") or
// channels ("channels_last") are neighbours in memory. A run is a few neighbours, 16 bytes of them
// where the map allows it.
#pragma once

#include "../common/device.cuh"

namespace ciema::product {

enum class Layout { kRows, kChannelsLast };

struct Map {
  void* data;
  int64_t stride_b, stride_c, stride_s;  // in elements; stride_s from pixel to pixel
  int alignment;  // 16, 8, 4 or 2 bytes: every line begins at a multiple of it
};

// Neighbours from (b, channel, pixel) on; `count` of them exist, 0 and less: none.
struct Run {
  int64_t b;
  int channel, pixel, count;
};

template <class T>
__device__ __forceinline__ T* address_of(const Map& map, const Run& run) {
  return static_cast<T*>(map.data) + run.b * map.stride_b + run.channel * map.stride_c +
         run.pixel * map.stride_s;
}

// As floats; 0 past the end. 16 bytes at a time where the whole run is real and the map aligned.
template <class T, int kRun>
__device__ __forceinline__ void load_run(const Map& map, const Run& run, float (&value)[kRun]) {
  constexpr int kElements = Vector<T>::kElements;
  const T* from = address_of<const T>(map, run);
  if constexpr (kRun % kElements == 0) {
    if (map.alignment == 16 && run.count >= kRun) {
#pragma unroll
      for (int part = 0; part < kRun; part += kElements) {
        const auto loaded = load_vector<Vector<T>>(from + part);
#pragma unroll
        for (int e = 0; e < kElements; ++e) value[part + e] = to_float(loaded.element[e]);
      }
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < kRun; ++e) value[e] = e < run.count ? to_float(from[e]) : 0.0f;
}

// Rounds to T, once.
template <class T, int kRun>
__device__ __forceinline__ void store_run(const Map& map, const Run& run,
                                          const float (&value)[kRun]) {
  constexpr int kElements = Vector<T>::kElements;
  T* to = address_of<T>(map, run);
  if constexpr (kRun % kElements == 0) {
    if (map.alignment == 16 && run.count >= kRun) {
#pragma unroll
      for (int part = 0; part < kRun; part += kElements) {
        Vector<T> rounded;
#pragma unroll
        for (int e = 0; e < kElements; ++e) rounded.element[e] = from_float<T>(value[part + e]);
        store_vector(to + part, rounded);
      }
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < kRun; ++e) {
    if (e < run.count) to[e] = from_float<T>(value[e]);
  }
}

}  // namespace ciema::product
