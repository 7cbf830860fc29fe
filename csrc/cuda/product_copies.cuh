// From device memory into the shared product's tiles (product_loop.cuh).
#pragma once

#include "map.cuh"
#include "ptx.cuh"

namespace ciema::product {

// A kLines × kLength tile of T in shared memory, copied by kThreads threads in runs of 16 bytes.
template <class T, int kLines, int kLength, int kPitch, int kThreads>
struct Copies {
  static constexpr int kRun = Vector<T>::kElements;
  static constexpr int kRuns = kLength / kRun;  // to a line
  static constexpr int kOwn = kLines * kRuns / kThreads;
  static_assert(kLines * kRuns % kThreads == 0 && kLines % 8 == 0);

  // Line and first element of a thread's n-th run. Lines of 64 bytes lie 80 bytes apart: 8 lanes
  // then take 32 bytes of every other line, which keeps to different banks and whole sectors.
  __device__ __forceinline__ static void place(int n, int& line, int& at) {
    const int i = static_cast<int>(threadIdx.x) + n * kThreads;
    if constexpr (kRuns == 4) {
      line = i / 32 * 8 + i / 2 % 4 * 2 + i / 8 % 2;
      at = (i % 2 + i / 16 % 2 * 2) * kRun;
    } else {
      line = i / kRuns;
      at = i % kRuns * kRun;
    }
  }

  // From `from`, whose lines are `stride` apart and begin at multiples of `alignment` bytes; zeros
  // past `lines` and `length`.
  __device__ __forceinline__ static void start(T* tile, const T* from, int64_t stride, int lines,
                                               int length, int alignment) {
    if (alignment == 16 && lines >= kLines && length >= kLength) {
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        int line, at;
        place(n, line, at);
        ptx::copy_async(tile + line * kPitch + at, from + line * stride + at);
      }
      return;
    }
#pragma unroll 1
    for (int n = 0; n < kOwn; ++n) {
      int line, at;
      place(n, line, at);
      T* to = tile + line * kPitch + at;
      const int count = line < lines && at < length ? length - at : 0;
      const T* run = count > 0 ? from + line * stride + at : from;
      if (alignment == 16) {
        start_parts<16>(to, run, count);
      } else if (alignment == 8) {
        start_parts<8>(to, run, count);
      } else if (alignment == 4) {
        start_parts<4>(to, run, count);
      } else {  // odd lines of 16-bit values
        Vector<T> values;
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
          values.element[e] = e < count ? run[e] : from_float<T>(0.0f);
        }
        store_vector(to, values);
      }
    }
  }

  // The same from float32, rounded.
  __device__ __forceinline__ static void convert(T* tile, const float* from, int64_t stride,
                                                 int lines, int length, int alignment) {
    constexpr int kFloats = Vector<float>::kElements;
#pragma unroll 1
    for (int n = 0; n < kOwn; ++n) {
      int line, at;
      place(n, line, at);
      const float* run = from + line * stride + at;
      const int count = line < lines ? length - at : 0;
      Vector<T> values;
      if (alignment == 16 && count >= kRun) {
#pragma unroll
        for (int part = 0; part < kRun / kFloats; ++part) {
          const auto loaded = load_vector<Vector<float>>(run + part * kFloats);
#pragma unroll
          for (int e = 0; e < kFloats; ++e) {
            values.element[part * kFloats + e] = from_float<T>(loaded.element[e]);
          }
        }
      } else {
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
          values.element[e] = from_float<T>(e < count ? run[e] : 0.0f);
        }
      }
      store_vector(tile + line * kPitch + at, values);
    }
  }

 private:
  // One run of which `count` elements are real, in copies of kBytes.
  template <int kBytes>
  __device__ __forceinline__ static void start_parts(T* to, const T* run, int count) {
    constexpr int kSize = static_cast<int>(sizeof(T)), kPart = kBytes / kSize;
#pragma unroll
    for (int part = 0; part < kRun; part += kPart) {
      const int left = count - part;
      const int valid = left <= 0 ? 0 : left < kPart ? left : kPart;
      ptx::copy_async_part<kBytes>(to + part, valid > 0 ? run + part : run, valid * kSize);
    }
  }
};

// The group of a channel, with inverse = 1 / width: a division in four instructions, exact for all
// channels below 2²².
__device__ __forceinline__ int group_of(int channel, float inverse) {
  return static_cast<int>((static_cast<float>(channel) + 0.5f) * inverse);
}

// w (B, G, S) beside a thread's copies of X, in which a run belongs to one group of channels.
template <class T, Layout kLayout, class Values>
struct Scales;

// rows: as many pixels of w as of X.
template <class T, class Values>
struct Scales<T, Layout::kRows, Values> {
  Vector<T> own[Values::kOwn];

  __device__ __forceinline__ static bool fits(const Map& w, int, int pixels_left) {
    return w.alignment == 16 && w.stride_s == 1 && pixels_left >= Values::kRun * Values::kRuns;
  }
  // `inverse`: of a group's width; `left`: channels from `channel` on; `pixels_left`: pixels of the
  // tile's.
  __device__ __forceinline__ void load(const Map& w, float inverse, const T* from, int channel,
                                       int left, int) {
#pragma unroll
    for (int n = 0; n < Values::kOwn; ++n) {
      int line, at;
      Values::place(n, line, at);
      own[n] = Vector<T>{};
      if (line < left) {
        own[n] =
            load_vector<Vector<T>>(from + group_of(channel + line, inverse) * w.stride_c + at);
      }
    }
  }
  __device__ __forceinline__ float operator()(int n, int e) const {
    return to_float(own[n].element[e]);
  }
};

// channels_last: one value for a run of channels, which a group's width must be a multiple of.
template <class T, class Values>
struct Scales<T, Layout::kChannelsLast, Values> {
  T own[Values::kOwn];

  __device__ __forceinline__ static bool fits(const Map&, int width, int pixels_left) {
    return width % Values::kRun == 0 && pixels_left > 0;
  }
  __device__ __forceinline__ void load(const Map& w, float inverse, const T* from, int channel,
                                       int left, int pixels_left) {
#pragma unroll
    for (int n = 0; n < Values::kOwn; ++n) {
      int line, at;
      Values::place(n, line, at);
      own[n] = from_float<T>(0.0f);
      if (at < left && line < pixels_left) {
        own[n] = from[group_of(channel + at, inverse) * w.stride_c + line * w.stride_s];
      }
    }
  }
  __device__ __forceinline__ float operator()(int n, int) const { return to_float(own[n]); }
};

}  // namespace ciema::product
