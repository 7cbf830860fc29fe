// Gradients of cross_spatial's weights: products whose depth are the pixels.
//
//   taps       ∂k[o, i, tap] = Σ_pixels g[pixel, o]·x[pixel + tap, i]
//              network: k5, k3, k1 of X with f's gradients; map: K3 of e with x2's gradient
//   pointwise  ∂W[k·c + o, j·c + i] = Σ_pixels g_k[pixel, o]·f_j[pixel, i]
//              Wa: the logits' gradients with f; Wr: R's gradient with A ⊙ f
//
// Grid        (shares, 16 outputs, 32 inputs) or (shares, output parts): a block walks its share of
//             all rows' tiles and writes one row of partial results (pointwise: one for each
//             quarter or half of the pixels), which parameter_sums adds in a fixed order.
//             taps: a warp has a row of taps (5 + 3 + 1, or 3) for its outputs; all read one window
//             of X. pointwise: a warp has 16 outputs and a share of the tile's pixels.
// Bytes       taps: X (with halos) kChannels/16 times, g once; pointwise: f as often as there are
//             output parts, g once; partials.
// Accuracy    operands in T (float32: split products), accumulators float32.
#pragma once

#include "cross_spatial_sheets.cuh"

namespace ciema {

struct CrossSpatialWeightsParams {
  CrossSpatialSizes sizes;
  const void* inputs;     // sheets of X, of e, of f or of A ⊙ f
  const void* gradients;  // sheets
  int rows;               // rows of the sheets to walk
  int gradient_parts;     // of a pixel of `gradients`
  float* partials;        // taps: (shares, taps, c, c); pointwise: (shares·splits, parts·c·3c)
};

namespace cross_spatial {

constexpr int kOutputs = 16;  // of a warp
constexpr int kInputs = 32;   // of a warp of taps: more accumulators would spill
// Elements from pixel to pixel of 16 outputs; in float32 as wide as 64 channels' windows allow.
template <class T>
constexpr int kGradientPitch = sizeof(T) == 4 ? 20 : 24;

// Roles of the warps: rows of taps. Network: 5 rows of k5, 3 of k3, k1; map: 3 of K3.
template <bool kNetwork>
struct TapRows {
  static constexpr int kWarps = kNetwork ? 9 : 3;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kParts = kNetwork ? 3 : 1;  // of the gradients: f1, f3, f5
  static constexpr int kRadius = kNetwork ? 2 : 1;
  static constexpr int kTaps = kNetwork ? 35 : 9;

  int part, radius, dy, first;  // first: taps before this kernel's in a row of partials

  __device__ __forceinline__ explicit TapRows(int warp) {
    if constexpr (!kNetwork) {
      part = 0, radius = 1, dy = warp - 1, first = 0;
    } else if (warp < 5) {
      part = 2, radius = 2, dy = warp - 2, first = 0;
    } else if (warp < 8) {
      part = 1, radius = 1, dy = warp - 6, first = 25;
    } else {
      part = 0, radius = 0, dy = 0, first = 34;
    }
  }
};

// 16 outputs of all parts of a tile's gradients to shared memory, [part][pixel][16], zero outside.
template <class N, int kParts>
__device__ __forceinline__ void load_gradients(const CrossSpatialSizes& s, const Tile& tile,
                                               const typename N::T* gradients, int output,
                                               typename N::T* to) {
  constexpr int kElements = Vector<typename N::T>::kElements, kPacks = kOutputs / kElements;
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < kTilePixels * kParts * kPacks;
       item += static_cast<int>(blockDim.x)) {
    const int pack = item % kPacks, part = item / kPacks % kParts, pixel = item / kPacks / kParts;
    const int row = tile.top + pixel / kTileWidth, column = tile.left + pixel % kTileWidth;
    const bool inside = row < s.height && column < s.width;
    const int64_t at = inside ? row * s.width + column : 0;
    const int offset = (part * kTilePixels + pixel) * kGradientPitch<typename N::T>;
    ptx::copy_async(to + offset + pack * kElements,
                    gradients + (at * kParts + part) * N::kChannels + output + pack * kElements,
                    inside);
  }
  ptx::copy_async_commit();
}

// acc[tap] += the products of a tile for one row of taps.
template <class N, bool kNetwork>
__device__ __forceinline__ void multiply_taps(const TapRows<kNetwork>& role,
                                              const typename N::T* window,
                                              const typename N::T* gradients,
                                              int input,
                                              float (&acc)[2 * TapRows<kNetwork>::kRadius + 1]
                                                          [kInputs / 8][4]) {
  constexpr int kHalo = TapRows<kNetwork>::kRadius, kPitch = kTileWidth + 2 * kHalo;
  constexpr int kDepth = N::F::kDepth;
  const typename N::T* own = gradients + role.part * kTilePixels * kGradientPitch<typename N::T>;
#pragma unroll 1
  for (int pixel = 0; pixel < kTilePixels; pixel += kDepth) {
    typename N::A a;
    constexpr int kPitchOfOutputs = kGradientPitch<typename N::T>;
    N::F::load_a_columns(a, own + pixel * kPitchOfOutputs, kPitchOfOutputs);
    const int row = pixel / kTileWidth + kHalo + role.dy, column = pixel % kTileWidth + kHalo;
#pragma unroll
    for (int tap = 0; tap < 2 * kHalo + 1; ++tap) {
      const int dx = tap - kHalo;
      if (dx < -role.radius || dx > role.radius) continue;  // the same in all lanes
#pragma unroll
      for (int pair = 0; pair < kInputs / 16; ++pair) {
        typename N::B b[2];
        const int at = (row * kPitch + column + dx) * N::kPitch + input + 16 * pair;
        N::F::load_b_columns(b, window + at, N::kPitch);
        N::F::multiply_add(acc[tap][2 * pair], a, b[0]);
        N::F::multiply_add(acc[tap][2 * pair + 1], a, b[1]);
      }
    }
  }
}

// Grid (shares, kChannels / 16, kChannels / 32).
template <class N, bool kNetwork>
__global__ void __launch_bounds__(TapRows<kNetwork>::kThreads, 1)
    taps_kernel(CrossSpatialWeightsParams p) {
  using T = typename N::T;
  using Rows = TapRows<kNetwork>;
  constexpr int kHalo = Rows::kRadius, kColumns = kInputs / 8;
  CIEMA_DYNAMIC_SHARED(T, window);
  T* gradients = window + window_size<N>(kHalo);
  const CrossSpatialSizes& s = p.sizes;
  const Rows role(warp_of_block());
  const int tiles = tiles_of_map(s), output = static_cast<int>(blockIdx.y) * kOutputs;
  const int input = static_cast<int>(blockIdx.z) * kInputs;
  const int64_t size = static_cast<int64_t>(s.height) * s.width * N::kChannels;
  float acc[2 * kHalo + 1][kColumns][4] = {};
  for (int64_t item = blockIdx.x; item < static_cast<int64_t>(p.rows) * tiles; item += gridDim.x) {
    const Tile tile = tile_at(s, static_cast<int>(item % tiles));
    const int64_t row = item / tiles;
    __syncthreads();  // the last tile is no longer needed
    load_gradients<N, Rows::kParts>(s, tile,
                                    static_cast<const T*>(p.gradients) + row * size * Rows::kParts,
                                    output, gradients);
    load_window<N, kHalo>(s, tile, static_cast<const T*>(p.inputs) + row * size, window);
    __syncthreads();
    multiply_taps<N, kNetwork>(role, window, gradients, input, acc);
  }
  const int c = s.channels, width = 2 * role.radius + 1;
  float* out = p.partials + (static_cast<int64_t>(blockIdx.x) * Rows::kTaps + role.first) * c * c;
#pragma unroll
  for (int tap = 0; tap < 2 * kHalo + 1; ++tap) {
    const int dx = tap - kHalo;
    if (dx < -role.radius || dx > role.radius) continue;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int o = output + lane_of_warp() / 4 + i / 2 * 8;
        const int in = input + 8 * n + lane_of_warp() % 4 * 2 + i % 2;
        if (o >= c || in >= c) continue;
        const int own = (role.dy + role.radius) * width + dx + role.radius;
        out[(own * c + o) * c + in] = acc[tap][n][i];
      }
    }
  }
}

// ---- pointwise ---------------------------------------------------------------------------------

constexpr int kPointThreads = 256;
constexpr int kPoints = 64;  // pixels of a step

template <class N>
struct PointShape {
  static constexpr int kOutputTiles = N::kChannels / kOutputs;
  static constexpr int kSplits = kPointThreads / kWarp / kOutputTiles;  // of the pixels
  static constexpr int kOfSplit = kPoints / kSplits;
  static constexpr int kInputPitch =
      3 * N::kChannels + 16 / static_cast<int>(sizeof(typename N::T));
  static constexpr int kElements = kPoints * (N::kPitch + kInputPitch);
};

// Pixels first… of a sheet's row to shared memory, `channels` of each from a stride; zero past the
// last.
template <class T>
__device__ __forceinline__ void load_points(const T* sheet, int64_t stride, int channels,
                                            int64_t first, int64_t pixels, T* to, int pitch) {
  constexpr int kElements = Vector<T>::kElements;
  const int packs = channels / kElements;
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < kPoints * packs; item += kPointThreads) {
    const int pack = item % packs, point = item / packs;
    const bool inside = first + point < pixels;
    ptx::copy_async(to + point * pitch + pack * kElements,
                    sheet + (inside ? first + point : 0) * stride + pack * kElements, inside);
  }
  ptx::copy_async_commit();
}

// Grid (shares, output parts). Sheets' rows follow each other: pixels of all rows are one axis.
template <class N>
__global__ void __launch_bounds__(kPointThreads, 1) pointwise_kernel(CrossSpatialWeightsParams p) {
  using T = typename N::T;
  using Shape = PointShape<N>;
  constexpr int kColumns = 3 * N::kColumns, kDepth = N::F::kDepth;
  CIEMA_DYNAMIC_SHARED(T, gradients);
  T* inputs = gradients + kPoints * N::kPitch;
  const CrossSpatialSizes& s = p.sizes;
  const int tile = warp_of_block() % Shape::kOutputTiles;
  const int split = warp_of_block() / Shape::kOutputTiles, part = static_cast<int>(blockIdx.y);
  const int64_t pixels = static_cast<int64_t>(p.rows) * s.height * s.width;
  float acc[kColumns][4] = {};
  for (int64_t first = blockIdx.x * static_cast<int64_t>(kPoints); first < pixels;
       first += gridDim.x * static_cast<int64_t>(kPoints)) {
    __syncthreads();  // the last pixels are no longer needed
    load_points(static_cast<const T*>(p.gradients) + part * N::kChannels,
                static_cast<int64_t>(p.gradient_parts) * N::kChannels, N::kChannels, first, pixels,
                gradients, N::kPitch);
    load_points(static_cast<const T*>(p.inputs), 3 * N::kChannels, 3 * N::kChannels, first, pixels,
                inputs, Shape::kInputPitch);
    ptx::copy_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int point = split * Shape::kOfSplit; point < (split + 1) * Shape::kOfSplit;
         point += kDepth) {
      typename N::A a;
      N::F::load_a_columns(a, gradients + point * N::kPitch + tile * kOutputs, N::kPitch);
#pragma unroll
      for (int pair = 0; pair < kColumns / 2; ++pair) {
        typename N::B b[2];
        N::F::load_b_columns(b, inputs + point * Shape::kInputPitch + 16 * pair,
                             Shape::kInputPitch);
        N::F::multiply_add(acc[2 * pair], a, b[0]);
        N::F::multiply_add(acc[2 * pair + 1], a, b[1]);
      }
    }
  }
  const int c = s.channels;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Shape::kSplits + split;
  float* out = p.partials + (row * gridDim.y + part) * c * 3 * c;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int o = tile * kOutputs + lane_of_warp() / 4 + i / 2 * 8;
      const int column = 8 * n + lane_of_warp() % 4 * 2 + i % 2;
      const int in = column % N::kChannels;
      if (o >= c || in >= c) continue;
      out[o * 3 * c + column / N::kChannels * c + in] = acc[n][i];
    }
  }
}

}  // namespace cross_spatial
}  // namespace ciema
