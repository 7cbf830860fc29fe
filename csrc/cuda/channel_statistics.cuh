// Channel statistics: mean and maximum of every (b, c) plane of x (B, C, H, W), both directions.
//
//   mean[b,c] = 1/(HW) sum_s x[b,c,s]   max[b,c] = max_s x[b,c,s]   argmax[b,c] = first s at max
//   grad_x[b,c,s] = grad_mean[b,c]/(HW) + (s == argmax[b,c] ? grad_max[b,c] : 0)
//   s = h*W + w; a NaN counts as the maximum, the first one wins, as in max pooling (spec.md 2.1).
//
// Layouts     rows: a plane is HW neighbouring elements; planes lie anywhere (stride_b, stride_c).
//             channels_last: the channels of a pixel are neighbours, pixels are stride_s apart.
// Grid        rows: 1 or 8 warps to a plane (kWarpsPerPlane), 256 threads: 8 or 1 planes a block.
//             channels_last: blockIdx.x = tile of channels, blockIdx.y = b; in a block the low
//             lanes walk the channels (64 neighbouring bytes a pixel), the others the pixels.
// Bytes       forward reads x once and writes 16 bytes a plane; backward writes grad_x once and
//             reads 16 bytes a plane.
// Accuracy    a short float32 sum of each thread's loads, these added with Kahan's compensation,
//             then a fixed float32 tree over the threads: same bits every run, no atomics.
//             backward is computed in float32 and rounds to T once.
// Recomputed  nothing; backward needs argmax, not x.
#pragma once

#include "../common/device.cuh"

// Bugs for the tests of csrc/emulator; none in a build. 1, 2: a barrier left out, 3: a vector read
// past the end, 4: misaligned vectors, 5: channels written past the last, 6: a tail not written.
#ifndef PLANT
#define PLANT 0
#endif

namespace ciema {

struct ChannelStatisticsParams {
  const void* x;  // forward only
  void* grad_x;   // backward only; dense, in the layout of the kernel
  float* mean;
  float* max;
  int64_t* argmax;
  const float* grad_mean;       // (B, C) contiguous, backward only
  const float* grad_max;        // (B, C) contiguous, backward only
  const int64_t* saved_argmax;  // (B, C) contiguous, backward only
  int64_t batch, channels;
  int64_t plane;                          // H*W, below 2^31 so that positions fit an int
  int64_t stride_b, stride_c, stride_s;   // of x or grad_x, in elements
};

namespace channel_statistics {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;              // vector loads in flight in each thread
constexpr int kNowhere = 0x7fffffff;    // position of a maximum not seen yet

// The maximum so far and the first position that holds it. add() must see rising positions.
struct FirstMax {
  float value;
  int position;

  __device__ __forceinline__ void start(int first_position) {
    value = -INFINITY;
    position = first_position;  // stands if everything is -inf
  }
  __device__ __forceinline__ void add(float other, int at) {
    if (other > value || (isnan(other) && !isnan(value))) {
      value = other;
      position = at;
    }
  }
  __device__ __forceinline__ void merge(float other, int at) {
    const bool tie = other == value || (isnan(other) && isnan(value));
    if (tie ? at < position : other > value || isnan(other)) {
      value = other;
      position = at;
    }
  }
};

// Kahan's compensated sum; at infinity the correction, inf - inf = NaN, is dropped.
struct CompensatedSum {
  float sum;
  float correction;

  __device__ __forceinline__ void start() { sum = correction = 0.0f; }
  __device__ __forceinline__ void add(float term) {
    const float corrected = term - correction;
    const float next = sum + corrected;
    correction = isfinite(next) ? (next - sum) - corrected : 0.0f;
    sum = next;
  }
};

// Tree over the lanes of a warp that differ in the bits [kLowest, kWarp) of their number.
template <int kLowest>
__device__ __forceinline__ void reduce_warp(float& sum, FirstMax& best) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes >= kLowest; lanes /= 2) {
    sum += __shfl_xor_sync(kFullMask, sum, lanes);
    const float value = __shfl_xor_sync(kFullMask, best.value, lanes);
    const int position = __shfl_xor_sync(kFullMask, best.position, lanes);
    best.merge(value, position);
  }
}

__device__ __forceinline__ void write_plane(const ChannelStatisticsParams& p, int64_t plane_index,
                                            float sum, const FirstMax& best) {
  p.mean[plane_index] = sum / static_cast<float>(p.plane);
  p.max[plane_index] = best.value;
  p.argmax[plane_index] = best.position;
}

// Elements before the first address that is a multiple of 16, at most `count`.
template <class T>
__device__ __forceinline__ int elements_to_alignment(const T* address, int count) {
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(address) & 15u);
  const int head = ((16 - misaligned) & 15) / static_cast<int>(sizeof(T));
  return head < count ? head : count;
}

template <class T>
__device__ __forceinline__ float add_vector(const Vector<T>& vector, int at, FirstMax& best) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < Vector<T>::kElements; ++e) {
    const float value = to_float(vector.element[e]);
    sum += value;
    best.add(value, at + e);
  }
  return sum;
}

// ---- rows: planes of neighbouring elements ---------------------------------------------------

// A thread's share of a plane of `count` neighbouring elements: of every kLanes vectors one, and
// single elements before the first aligned vector and after the last.
template <class T, int kLanes>
__device__ __forceinline__ void read_row(const T* x, int count, int lane, CompensatedSum& total,
                                         FirstMax& best) {
  constexpr int kElements = Vector<T>::kElements;
  const int head = PLANT == 4 ? 0 : elements_to_alignment(x, count);
  const int vectors = (count - head + (PLANT == 3 ? kElements - 1 : 0)) / kElements;
  const int tail = head + vectors * kElements;
  total.start();
  best.start(lane < head ? lane : kNowhere);
  if (lane < head) {
    const float value = to_float(x[lane]);
    total.add(value);
    best.add(value, lane);
  }
  if (best.position == kNowhere && lane < vectors) best.position = head + lane * kElements;
  int v = lane;
  for (; v < vectors - (kUnroll - 1) * kLanes; v += kUnroll * kLanes) {
    Vector<T> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      loaded[u] = load_vector<Vector<T>>(x + head + (v + u * kLanes) * kElements);
    }
    float sum = 0.0f;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      sum += add_vector(loaded[u], head + (v + u * kLanes) * kElements, best);
    }
    total.add(sum);
  }
  for (; v < vectors; v += kLanes) {
    const int at = head + v * kElements;
    total.add(add_vector(load_vector<Vector<T>>(x + at), at, best));
  }
  if (lane < count - tail) {
    const float value = to_float(x[tail + lane]);
    if (best.position == kNowhere) best.position = tail + lane;
    total.add(value);
    best.add(value, tail + lane);
  }
}

template <class T, int kWarpsPerPlane>
__global__ void __launch_bounds__(kThreads) forward_rows_kernel(ChannelStatisticsParams p) {
  constexpr int kLanes = kWarpsPerPlane * kWarp;  // threads to a plane
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t plane_index =
      static_cast<int64_t>(blockIdx.x) * (kWarps / kWarpsPerPlane) + warp / kWarpsPerPlane;
  if (plane_index >= p.batch * p.channels) return;  // whole warps, never part of a plane's lanes
  const T* x = static_cast<const T*>(p.x) + (plane_index / p.channels) * p.stride_b +
               (plane_index % p.channels) * p.stride_c;
  CompensatedSum total;
  FirstMax best;
  read_row<T, kLanes>(x, static_cast<int>(p.plane), lane, total, best);
  float sum = total.sum;
  reduce_warp<1>(sum, best);
  if constexpr (kWarpsPerPlane > 1) {
    CIEMA_SHARED(float, sums, [kWarps]);
    CIEMA_SHARED(float, values, [kWarps]);
    CIEMA_SHARED(int, positions, [kWarps]);
    if (lane % kWarp == 0) {
      sums[warp] = sum;
      values[warp] = best.value;
      positions[warp] = best.position;
    }
    if (PLANT != 1) __syncthreads();
    if (lane == 0) {
      for (int other = 1; other < kWarps; ++other) {
        sum += sums[other];
        best.merge(values[other], positions[other]);
      }
    }
  }
  if (lane == 0) write_plane(p, plane_index, sum, best);
}

template <class T, int kWarpsPerPlane>
__global__ void __launch_bounds__(kThreads) backward_rows_kernel(ChannelStatisticsParams p) {
  constexpr int kLanes = kWarpsPerPlane * kWarp;
  constexpr int kElements = Vector<T>::kElements;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t plane_index =
      static_cast<int64_t>(blockIdx.x) * (kWarps / kWarpsPerPlane) + warp / kWarpsPerPlane;
  if (plane_index >= p.batch * p.channels) return;
  T* grad_x = static_cast<T*>(p.grad_x) + (plane_index / p.channels) * p.stride_b +
              (plane_index % p.channels) * p.stride_c;
  const int count = static_cast<int>(p.plane);
  const int head = elements_to_alignment(grad_x, count);
  const int vectors = (count - head) / kElements;
  const int tail = head + vectors * kElements;

  const float everywhere = p.grad_mean[plane_index] / static_cast<float>(p.plane);
  const T usual = from_float<T>(everywhere);
  const T at_max = from_float<T>(everywhere + p.grad_max[plane_index]);
  const int peak = static_cast<int>(p.saved_argmax[plane_index]);
  if (lane < head) grad_x[lane] = lane == peak ? at_max : usual;
  for (int v = lane; v < vectors; v += kLanes) {
    const int at = head + v * kElements;
    Vector<T> out;
#pragma unroll
    for (int e = 0; e < kElements; ++e) out.element[e] = at + e == peak ? at_max : usual;
    store_vector(grad_x + at, out);
  }
  if (PLANT != 6 && lane < count - tail) {
    grad_x[tail + lane] = tail + lane == peak ? at_max : usual;
  }
}

// ---- channels_last --------------------------------------------------------------------------

// kVector channels to a thread: Vector<T>::kElements if pixels_are_aligned, else 1.
template <class T, int kVector>
struct ChannelTile {
  static constexpr int kChannelLanes = kVector == 1 ? 16 : 4;
  static constexpr int kPixelLanes = kThreads / kChannelLanes;
  static constexpr int kChannels = kChannelLanes * kVector;  // channels to a block
};

template <class T, int kVector>
__device__ __forceinline__ void load_channels(const T* address, T (&value)[kVector]) {
  if constexpr (kVector == 1) {
    value[0] = *address;
  } else {
    const Vector<T> loaded = load_vector<Vector<T>>(address);
#pragma unroll
    for (int e = 0; e < kVector; ++e) value[e] = loaded.element[e];
  }
}

// The pixels of kVector channels at x that are this thread's: pixel_lane, + kPixelLanes, …
template <class T, int kVector>
__device__ __forceinline__ void read_pixels(const T* x, int64_t stride_s, int count, int pixel_lane,
                                            CompensatedSum (&total)[kVector],
                                            FirstMax (&best)[kVector]) {
  constexpr int kStep = ChannelTile<T, kVector>::kPixelLanes;
  int64_t s = pixel_lane;  // 64 bits, so that the step past the end can't overflow
  for (; s < count - (kUnroll - 1) * kStep; s += kUnroll * kStep) {
    T loaded[kUnroll][kVector];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      load_channels<T, kVector>(x + (s + u * kStep) * stride_s, loaded[u]);
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      float sum = 0.0f;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const float value = to_float(loaded[u][e]);
        sum += value;
        best[e].add(value, static_cast<int>(s) + u * kStep);
      }
      total[e].add(sum);
    }
  }
  for (; s < count; s += kStep) {
    T loaded[kVector];
    load_channels<T, kVector>(x + s * stride_s, loaded);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const float value = to_float(loaded[e]);
      total[e].add(value);
      best[e].add(value, static_cast<int>(s));
    }
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads, 3)  // 3 blocks an SM: 80 registers, no spills
    forward_channels_last_kernel(ChannelStatisticsParams p) {
  using Tile = ChannelTile<T, kVector>;
  const int channel_lane = static_cast<int>(threadIdx.x) % Tile::kChannelLanes;
  const int pixel_lane = static_cast<int>(threadIdx.x) / Tile::kChannelLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x) * Tile::kChannels;
  const int64_t channel = first_channel + channel_lane * kVector;
  const int64_t b = blockIdx.y;
  const int count = static_cast<int>(p.plane);

  CompensatedSum total[kVector];
  FirstMax best[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    total[e].start();
    best[e].start(pixel_lane < count ? pixel_lane : kNowhere);
  }
  if (channel < p.channels) {  // C is a multiple of kVector
    const T* x = static_cast<const T*>(p.x) + b * p.stride_b + channel;
    read_pixels<T, kVector>(x, p.stride_s, count, pixel_lane, total, best);
  }

  CIEMA_SHARED(float, sums, [kWarps][Tile::kChannels]);
  CIEMA_SHARED(float, values, [kWarps][Tile::kChannels]);
  CIEMA_SHARED(int, positions, [kWarps][Tile::kChannels]);
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    float sum = total[e].sum;
    reduce_warp<Tile::kChannelLanes>(sum, best[e]);
    if (static_cast<int>(threadIdx.x) % kWarp < Tile::kChannelLanes) {
      sums[warp][channel_lane * kVector + e] = sum;
      values[warp][channel_lane * kVector + e] = best[e].value;
      positions[warp][channel_lane * kVector + e] = best[e].position;
    }
  }
  if (PLANT != 2) __syncthreads();
  const int mine = static_cast<int>(threadIdx.x);
  if (mine < Tile::kChannels && (PLANT == 5 || first_channel + mine < p.channels)) {
    float sum = sums[0][mine];
    FirstMax first;
    first.value = values[0][mine];
    first.position = positions[0][mine];
    for (int other = 1; other < kWarps; ++other) {
      sum += sums[other][mine];
      first.merge(values[other][mine], positions[other][mine]);
    }
    write_plane(p, b * p.channels + first_channel + mine, sum, first);
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    backward_channels_last_kernel(ChannelStatisticsParams p) {
  using Tile = ChannelTile<T, kVector>;
  const int channel_lane = static_cast<int>(threadIdx.x) % Tile::kChannelLanes;
  const int pixel_lane = static_cast<int>(threadIdx.x) / Tile::kChannelLanes;
  const int64_t channel =
      static_cast<int64_t>(blockIdx.x) * Tile::kChannels + channel_lane * kVector;
  if (channel >= p.channels) return;
  const int64_t b = blockIdx.y;
  const int64_t first_plane = b * p.channels + channel;

  T usual[kVector];
  T at_max[kVector];
  int peak[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    const float everywhere = p.grad_mean[first_plane + e] / static_cast<float>(p.plane);
    usual[e] = from_float<T>(everywhere);
    at_max[e] = from_float<T>(everywhere + p.grad_max[first_plane + e]);
    peak[e] = static_cast<int>(p.saved_argmax[first_plane + e]);
  }
  T* grad_x = static_cast<T*>(p.grad_x) + b * p.stride_b + channel;
  for (int64_t s = pixel_lane; s < p.plane; s += Tile::kPixelLanes) {
    if constexpr (kVector == 1) {
      grad_x[s * p.stride_s] = s == peak[0] ? at_max[0] : usual[0];
    } else {
      Vector<T> out;
#pragma unroll
      for (int e = 0; e < kVector; ++e) out.element[e] = s == peak[e] ? at_max[e] : usual[e];
      store_vector(grad_x + s * p.stride_s, out);
    }
  }
}

}  // namespace channel_statistics
}  // namespace ciema
