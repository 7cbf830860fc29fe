// Multi-scale feature fusion (spec.md 1, by identity 5.1): an epilogue of the shared product.
//
//   z = W_t ∗ f_t + Σ_i resize(W_i ∗ f_i)        out = relu((z − mean) / sqrt(var + eps) γ + β)
//
// f_t is the map of the target size, multiplied in the loop (no step if there is none); the other
// products P_i = W_i ∗ f_i are made before at their maps' own sizes, float32, in the layout of out.
// resize is bilinear, align_corners=False: pixel p of T lies at (2p + 1) size / (2 T) − 1/2, at
// least 0. Numerators over 2 T are integers, so that the neighbours are exact.
//
// Training    launched twice: first for the moments of z alone (product.cuh), then for out, with z
//             computed again: fewer bytes than writing it, and z is never rounded.
// Bytes       f_t and out once, P_i once from the second-level cache; rows: a lane walks along its
//             run, two new values for every new neighbour; channels_last: four runs a pixel.
// Accuracy    all float32; out rounded once.
#pragma once

#include "product_epilogues.cuh"

// Bugs for the tests, none in a build. 31: the last column's second neighbour not kept inside.
#ifndef PLANT
#define PLANT 0
#endif

namespace ciema::msff {

using namespace product;

constexpr int kMostProducts = 6;

// P_i (B, C_out, h, w) of float32, in the layout of out.
struct NativeProduct {
  Map map;
  int height, width;
};

// What a launch makes: P = W ∗ f in float32, the moments of z, or out.
enum class Make { kProduct, kMoments, kOut };

// Where a pixel of an axis of `target` lies between those of an axis of `size`.
struct Position {
  int size, first;
  int64_t rest, target;  // the pixel is first + rest / (2 target); below 0 counts as 0
  float inverse;

  __device__ __forceinline__ Position(int position, int size_, int target_)
      : size(size_), first(0), target(target_), inverse(0.5f / static_cast<float>(target_)) {
    rest = (2 * static_cast<int64_t>(position) + 1) * size - target;
    if (rest <= 0) return;
    if (target_ < 32768) {  // numerator and divisor fit 32 bits
      first = static_cast<int>(rest) / (2 * target_);
    } else {
      first = static_cast<int>(rest / (2 * target));
    }
    rest -= 2 * target * first;
  }
  // On to the next pixel; size <= target, so that first grows by at most one.
  __device__ __forceinline__ void step() {
    rest += 2 * size;
    if (rest >= 2 * target) {
      rest -= 2 * target;
      ++first;
    }
  }
  __device__ __forceinline__ void restart() {
    first = 0;
    rest = size - target;
  }
  __device__ __forceinline__ int second() const {
    return first + 1 < size || PLANT == 31 ? first + 1 : first;
  }
  __device__ __forceinline__ float weight() const {
    return rest > 0 ? static_cast<float>(rest) * inverse : 0.0f;
  }
};

template <class T>
struct Fuse {
  using Output = T;
  static constexpr bool kStores = false;  // not by the kernel: P is float32
  static constexpr Reduction kReduction = Reduction::kMoments;
  static constexpr bool kExtremes = true;  // of out, rounded
  static constexpr int kVectors = 2;
  Make make;
  Map out;  // of P or out
  NativeProduct native[kMostProducts];
  int count;
  int height, width;  // of out
  Norm norm;

  __device__ __forceinline__ void vectors(int64_t, int channel, float (&value)[2]) const {
    if (make == Make::kOut) norm.vectors(channel, value[0], value[1]);
  }

  template <Layout kLayout, int kRun>
  __device__ __forceinline__ void apply(const Run& run, const float (&vectors)[2][kRun],
                                        float (&value)[kRun]) const {
    if (make == Make::kProduct) return store_run<float>(out, run, value);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const NativeProduct& p = native[i];
      if (p.height == height && p.width == width) {
        add(p.map, run, 1.0f, value);
      } else if constexpr (kLayout == Layout::kRows) {
        add_along_pixels(p, run, value);
      } else {
        add_pixel(p, run, value);
      }
    }
    if (make == Make::kMoments) return;
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      value[e] = to_float(from_float<T>(relu(value[e] * vectors[0][e] + vectors[1][e])));
    }
    store_run<T>(out, run, value);
  }

 private:
  template <int kRun>
  __device__ __forceinline__ static void add(const Map& map, const Run& run, float share,
                                             float (&value)[kRun]) {
    float own[kRun];
    load_run<float>(map, run, own);
#pragma unroll
    for (int e = 0; e < kRun; ++e) value[e] += own[e] * share;
  }

  // rows: neighbouring pixels of one channel, which may go on in the next line.
  template <int kRun>
  __device__ __forceinline__ void add_along_pixels(const NativeProduct& p, const Run& run,
                                                   float (&value)[kRun]) const {
    const int line = run.pixel / width;
    int column = run.pixel - line * width;
    Position down(line, p.height, height), across(column, p.width, width);
    const float* plane = address_of<const float>(p.map, {run.b, run.channel, 0, 0});
    // Between the two lines, at column x.
    const auto between = [&](int x) {
      const float share = down.weight();
      return plane[static_cast<int64_t>(down.first) * p.width + x] * (1.0f - share) +
             plane[static_cast<int64_t>(down.second()) * p.width + x] * share;
    };
    int known = -2;
    float left = 0.0f, right = 0.0f;
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      if (e >= run.count) break;
      if (column == width) {
        column = 0;
        down.step();
        across.restart();
        known = -2;
      }
      if (across.first != known) {
        left = across.first == known + 1 ? right : between(across.first);
        right = between(across.second());
        known = across.first;
      }
      value[e] += left * (1.0f - across.weight()) + right * across.weight();
      across.step();
      ++column;
    }
  }

  // channels_last: neighbouring channels of one pixel.
  template <int kRun>
  __device__ __forceinline__ void add_pixel(const NativeProduct& p, const Run& run,
                                            float (&value)[kRun]) const {
    const int line = run.pixel / width;
    const Position down(line, p.height, height);
    const Position across(run.pixel - line * width, p.width, width);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int y = corner < 2 ? down.first : down.second();
      const int x = corner % 2 == 0 ? across.first : across.second();
      float share = corner < 2 ? 1.0f - down.weight() : down.weight();
      share *= corner % 2 == 0 ? 1.0f - across.weight() : across.weight();
      add(p.map, {run.b, run.channel, y * p.width + x, run.count}, share, value);
    }
  }
};

}  // namespace ciema::msff
