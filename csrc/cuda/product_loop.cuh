// The loop of the shared product (product.cuh): tiles of W and X into shared memory, and their
// product into the accumulators of a block's warps.
#pragma once

#include "fragments.cuh"
#include "product_copies.cuh"

// Bugs for the tests, none in a build. 1: the barrier that publishes a step left out, 2: copies not
// waited for, 3: results stored past the last (product_results.cuh).
#ifndef PLANT
#define PLANT 0
#endif

namespace ciema::product {

constexpr int kStages = 3;

// Results of a block, and its warps along both axes.
template <int kChannels, int kPixels, int kWarpRows, int kWarpColumns>
struct Tile {
  static constexpr int kM = kChannels, kN = kPixels;
  static constexpr int kWarpsM = kWarpRows, kWarpsN = kWarpColumns;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
};
using WideTile = Tile<128, 128, 2, 4>;
using MediumTile = Tile<64, 64, 2, 2>;
using NarrowTile = Tile<32, 32, 2, 2>;

// How X is made: of one or two operands, the first scaled by w or not.
template <int kCount, bool kScale>
struct Loader {
  static constexpr int kOperands = kCount;
  static constexpr bool kScaled = kScale;
};
using PlainLoader = Loader<1, false>;
using ScaledLoader = Loader<1, true>;
using ScaledThenPlainLoader = Loader<2, true>;

// kMomentsOrProducts: an epilogue has `Map partner` and `const float* partner_mean` (rows,), and
// where the map has data the sums of the results and of results · (partner − mean) take the
// moments' place.
enum class Reduction { kNone, kSums, kMoments, kMomentsOrProducts };

struct Operand {
  Map x;
  const void* weight;     // its columns of W
  int64_t weight_stride;  // from row to row
  int weight_alignment;
  int channels;
};

struct ProductParams {
  Operand operand[2];
  Map scale;  // w
  int scale_width;
  bool weight_is_float;
  Map out;
  float* partials;  // kSums: (parts, rows), others: (parts, {mean, M2}, rows); parts = B·tiles
  float* extremes;  // (parts, {sum, max}, rows), and int positions (parts, rows)
  int* positions;
  int rows, pixels;
  int row_tiles, pixel_tiles;
};

// Where a block's tile begins.
struct Corner {
  int64_t b;
  int channel, pixel, part;
};

__device__ __forceinline__ Corner corner_of(const ProductParams& p, int tile_rows,
                                            int tile_pixels) {
  const unsigned part = blockIdx.x / static_cast<unsigned>(p.row_tiles);
  const unsigned row_tile = blockIdx.x % static_cast<unsigned>(p.row_tiles);
  const unsigned tiles = static_cast<unsigned>(p.pixel_tiles);
  return {part / tiles, static_cast<int>(row_tile) * tile_rows,
          static_cast<int>(part % tiles) * tile_pixels, static_cast<int>(part)};
}

template <class T, Precision kPrecision, Layout kLayout, class Shape, class Loading>
struct Tiles {
  using F = Fragments<T, kPrecision>;
  static constexpr bool kRows = kLayout == Layout::kRows;
  static constexpr int kStep = 64 / static_cast<int>(sizeof(T));  // depth
  static constexpr int kPad = 16 / static_cast<int>(sizeof(T));
  static constexpr int kWeightPitch = kStep + kPad;
  static constexpr int kPitch = kRows ? Shape::kN + 8 : kStep + kPad;
  using Weights = Copies<T, Shape::kM, kStep, kWeightPitch, Shape::kThreads>;
  using Values = Copies<T, kRows ? kStep : Shape::kN, kRows ? Shape::kN : kStep, kPitch,
                        Shape::kThreads>;
  static constexpr int kWeightElements = Shape::kM * kWeightPitch;
  static constexpr int kStageElements =
      kWeightElements + (kRows ? kStep : Shape::kN) * kPitch;
  static constexpr int kFragmentsM = Shape::kWarpM / 16, kFragmentsN = Shape::kWarpN / 8;
  using Accumulators = float[kFragmentsM][kFragmentsN][4];
  using OwnScales = Scales<T, kLayout, Values>;

  __device__ __forceinline__ static int steps_of(const Operand& operand) {
    return (operand.channels + kStep - 1) / kStep;
  }
  __device__ __forceinline__ static int steps(const ProductParams& p) {
    return steps_of(p.operand[0]) + (Loading::kOperands == 2 ? steps_of(p.operand[1]) : 0);
  }

  // Multiplies this thread's copies, which it alone can see yet, by w.
  __device__ __forceinline__ static void scale(T* stage, const OwnScales& scales) {
#pragma unroll
    for (int n = 0; n < Values::kOwn; ++n) {
      int line, at;
      Values::place(n, line, at);
      T* own = stage + kWeightElements + line * kPitch + at;
      Vector<T> values = load_vector<Vector<T>>(own);
#pragma unroll
      for (int e = 0; e < Values::kRun; ++e) {
        values.element[e] = from_float<T>(to_float(values.element[e]) * scales(n, e));
      }
      store_vector(own, values);
    }
  }

  // The same for any w, value by value.
  __device__ __forceinline__ static void scale_slowly(const ProductParams& p, const Corner& corner,
                                                      int first, T* stage) {
#pragma unroll 1
    for (int n = 0; n < Values::kOwn; ++n) {
      int line, at;
      Values::place(n, line, at);
      T* own = stage + kWeightElements + line * kPitch + at;
      for (int e = 0; e < Values::kRun; ++e) {
        const int channel = first + (kRows ? line : at + e);
        const int pixel = corner.pixel + (kRows ? at + e : line);
        if (channel >= p.operand[0].channels || pixel >= p.pixels) continue;
        const T* w = address_of<const T>(p.scale, {corner.b, channel / p.scale_width, pixel, 0});
        own[e] = from_float<T>(to_float(own[e]) * to_float(*w));
      }
    }
  }

  __device__ __forceinline__ static void multiply(const T* stage, Accumulators& acc) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const T* weights = stage + warp / Shape::kWarpsN * Shape::kWarpM * kWeightPitch;
    const int column = warp % Shape::kWarpsN * Shape::kWarpN;
    const T* values = stage + kWeightElements + (kRows ? column : column * kPitch);
#pragma unroll
    for (int k = 0; k < kStep; k += F::kDepth) {
      typename F::A a[kFragmentsM];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
        F::load_a(a[i], weights + i * 16 * kWeightPitch + k, kWeightPitch);
      }
#pragma unroll
      for (int j = 0; j < kFragmentsN; j += 2) {
        typename F::B b[2];
        if constexpr (kRows) {
          F::load_b_columns(b, values + k * kPitch + j * 8, kPitch);
        } else {
          F::load_b(b, values + j * 8 * kPitch + k, kPitch);
        }
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
          F::multiply_add(acc[i][j], a[i], b[0]);
          F::multiply_add(acc[i][j + 1], a[i], b[1]);
        }
      }
    }
  }

  // All steps of a tile. Afterwards the shared memory is free for any use.
  __device__ __forceinline__ static void accumulate(const ProductParams& p, const Corner& corner,
                                                    T* stages, Accumulators& acc) {
    const int count = steps(p);
    // Without w there is nothing to scale by, whatever the loader.
    const int scaled =
        Loading::kScaled && p.scale.data != nullptr ? steps_of(p.operand[0]) : 0;
    OwnScales scales{};
    const bool fits =
        Loading::kScaled && OwnScales::fits(p.scale, p.scale_width, p.pixels - corner.pixel);
    if (fits && scaled > 0) load_scales(p, corner, 0, scales);
    // The first turns only start copies: one place that does so keeps the code small.
#pragma unroll 1
    for (int step = 1 - kStages; step < count; ++step) {
      T* stage = stages + (step + kStages) % kStages * kStageElements;
      if (step >= 0) {
        if (PLANT != 2) ptx::copy_async_wait<kStages - 2>();
        if (step < scaled) {
          if (fits) {
            scale(stage, scales);
          } else {
            scale_slowly(p, corner, step * kStep, stage);
          }
        }
        if (PLANT != 1) __syncthreads();  // the step is whole, and the stage before it is free
      }
      const int next = step + kStages - 1;
      if (next < count) load(p, corner, next, stages + next % kStages * kStageElements);
      ptx::copy_async_commit();
      if (step < 0) continue;
      if (fits && step + 1 < scaled) load_scales(p, corner, step + 1, scales);
      multiply(stage, acc);
    }
    ptx::copy_async_wait<0>();
    __syncthreads();
  }

 private:
  // w for this thread's copies of one step of the first operand.
  __device__ __forceinline__ static void load_scales(const ProductParams& p, const Corner& corner,
                                                     int step, OwnScales& scales) {
    const T* from = address_of<const T>(p.scale, {corner.b, 0, corner.pixel, 0});
    const float inverse = 1.0f / static_cast<float>(p.scale_width);
    scales.load(p.scale, inverse, from, step * kStep, p.operand[0].channels - step * kStep,
                p.pixels - corner.pixel);
  }

  // Starts the copies of one step.
  __device__ __forceinline__ static void load(const ProductParams& p, const Corner& corner,
                                              int step, T* stage) {
    Operand operand = p.operand[0];
    int channel = step * kStep;
    if constexpr (Loading::kOperands == 2) {
      const int first_steps = steps_of(p.operand[0]);
      if (step >= first_steps) {
        operand = p.operand[1];
        channel -= first_steps * kStep;
      }
    }
    const int rows = p.rows - corner.channel, depth = operand.channels - channel;
    const int64_t weight = corner.channel * operand.weight_stride + channel;
    bool converted = false;
    if constexpr (sizeof(T) != sizeof(float)) {
      converted = p.weight_is_float;
      if (converted) {
        Weights::convert(stage, static_cast<const float*>(operand.weight) + weight,
                         operand.weight_stride, rows, depth, operand.weight_alignment);
      }
    }
    if (!converted) {
      Weights::start(stage, static_cast<const T*>(operand.weight) + weight, operand.weight_stride,
                     rows, depth, operand.weight_alignment);
    }
    const T* x = address_of<const T>(operand.x, {corner.b, channel, corner.pixel, 0});
    const int pixels = p.pixels - corner.pixel;
    if constexpr (kRows) {
      Values::start(stage + kWeightElements, x, operand.x.stride_c, depth, pixels,
                    operand.x.alignment);
    } else {
      Values::start(stage + kWeightElements, x, operand.x.stride_s, pixels, depth,
                    operand.x.alignment);
    }
  }
};

}  // namespace ciema::product
