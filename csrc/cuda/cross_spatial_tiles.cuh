// The small network of spec.md 2.3 on tensor cores, for one warp's tile of pixels: what the kernels
// of cross_spatial share, in evaluation and in training. A slab is one sample's group: c channels of
// H×W pixels, c padded with zeros to kChannels, 16, 32 or 64.
//
//   convolve3x3   K3 ∗ e                                  9 products c×c a pixel
//   convolve      f1, f3, f5 = k1∗X, k3∗X, k5∗X           1 + 9 + 25, which share X's fragments
//   logits        Wa ∗ f, one of its three parts          3
//   reduce        acc += Wr (A ⊙ f), one of three parts   1, from registers
//   channel_feat  acc += Wc ∗ X                           1
//
// Maps lie in shared memory as [pixel][channel], kPitch elements from pixel to pixel: 16 bytes times
// an odd number, so that 8 pixels in a row are loaded without bank conflicts. A window is read
// through one address a lane and pixel, of the window's first pixel, with zeros around the map: no
// bound is tested in the loops, whose addresses differ by constants.
//
// Weights are packed once a call, in the order of the multiplications' fragments (Packed, below) and
// read from global memory with 16-byte loads, in the tap loop 0.5 loads a product. They are 57 c×c
// tiles, 114 KB at c = 32 in 16 bits, more than shared memory has beside the maps. Staging them in
// shared memory would halve the room for maps (more halo) and put a barrier into the loop; the warps
// of a block run in step from barrier to barrier, so that all but the first find them in the
// first-level cache, whose 128 bytes a cycle are those of shared memory.
//
// Accuracy      accumulators float32; operands in T, float32 as Precision says; f and A⊙f round to
//               T (to tf32).
// Registers     kRows tiles of 16 pixels a warp: f takes 3·kChannels/2·kRows accumulators.
#pragma once

#include <type_traits>

#include "fragments.cuh"

namespace ciema::cross_spatial {

// Packed tiles, c outputs by c inputs: K3 of e; k1, k3, k5; Wa as [output part][input part]; Wr by
// input part; α·Wc.
constexpr int kConv3x3 = 0;
constexpr int kSpatial1 = 9;
constexpr int kSpatial3 = 10;
constexpr int kSpatial5 = 19;
constexpr int kAttention = 44;
constexpr int kReduce = 53;
constexpr int kChannelFeat = 56;
constexpr int kTiles = 57;

// Packed vectors of kChannels floats, zero past c: affine maps are scale·x + shift.
enum PackedVector {
  kNormWeight,
  kNormBias,
  kConv3x3Bias,
  kAttentionScale,                       // three parts
  kAttentionShift = kAttentionScale + 3,
  kReduceScale = kAttentionShift + 3,
  kReduceShift,
  kVectors
};

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarp; }

// Two roundings more than the exact sigmoid; 0, 1 and NaN where eager has them.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// The packed weights of 16 outputs and one depth step: kLoads × 32 lanes × 16 bytes.
template <class F>
struct PackedUnit {
  using B = typename F::B;
  using Load = Vector<uint32_t>;
  static constexpr int kLoads = static_cast<int>(2 * sizeof(B) / sizeof(Load));

  // As unit number `unit` of `packed`.
  __device__ __forceinline__ static void store(void* packed, const B (&b)[2], int unit) {
    Load* to = static_cast<Load*>(packed) + unit * kLoads * kWarp + lane_of_warp();
    Load values[kLoads];
    memcpy(values, b, sizeof(values));
#pragma unroll
    for (int i = 0; i < kLoads; ++i) store_vector(to + i * kWarp, values[i]);
  }
};

template <class T_, Precision kPrecision, int kChannels_>
struct Network {
  using T = T_;
  using F = Fragments<T, kPrecision>;
  using A = typename F::A;
  using B = typename F::B;

  static constexpr int kChannels = kChannels_;
  static constexpr int kPitch = kChannels + 16 / static_cast<int>(sizeof(T));
  static constexpr int kSteps = kChannels / F::kDepth;  // depth steps of a product
  static constexpr int kColumns = kChannels / 8;        // column tiles of the results
  static constexpr int kRows = sizeof(T) == 2 && kChannels <= 32 ? 2 : 1;  // row tiles of a warp
  static constexpr int kPixels = 16 * kRows;
  static constexpr int kChain = F::kDepth / 8;  // result tiles in one operand
  // What is unrolled: more, and the compiler would prepare so many products at once that it spills.
  static constexpr bool kRoomy = sizeof(T) == 2 && kChannels <= 32;
  static constexpr int kTapsUnrolled = kRoomy ? 5 : 1;   // of a window's row
  static constexpr int kStepsUnrolled = kRoomy ? kSteps : 1;
  // float32 in two terms makes operands of the features for every product; these are in loops, and
  // the features in an array with an index, that is in local memory: 12 bytes a channel and pixel,
  // which the first-level cache holds.
  static constexpr bool kSplits = sizeof(T) == 4 && kPrecision == Precision::kSplit;
  static constexpr int kFeaturesUnrolled = kSplits ? 1 : 3 * kSteps;
  static constexpr int kLogits = kSplits && kChannels == 64 ? 2 : kColumns;  // tiles at a time

  // A warp's results: lane 4g + q has pixels 16m + g (i = 0, 1) and 16m + g + 8 (i = 2, 3), channels
  // 8n + 2q and 8n + 2q + 1.
  using Result = float[kRows][kColumns][4];

  // ---- weights -------------------------------------------------------------------------------

  // Where a lane finds its fragments: a tile is [step][outputs / 16] units.
  struct Packed {
    using Load = typename PackedUnit<F>::Load;
    static constexpr int kLoads = PackedUnit<F>::kLoads;
    static constexpr int kUnit = kLoads * kWarp;  // in Loads
    static constexpr int kTile = kSteps * (kChannels / 16) * kUnit;
    static constexpr int64_t kBytes = int64_t{kTiles} * kTile * sizeof(Load);

    const Load* lane;  // that of this lane in the first unit

    __device__ __forceinline__ explicit Packed(const void* packed)
        : lane(static_cast<const Load*>(packed) + lane_of_warp()) {}
    __device__ __forceinline__ void load(B (&b)[2], int tile, int step, int pair) const {
      const Load* unit = lane + tile * kTile + (step * (kChannels / 16) + pair) * kUnit;
      Load loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) loaded[i] = load_vector<Load>(unit + i * kWarp);
      memcpy(b, loaded, sizeof(loaded));
    }
  };

  template <int kCount>
  __device__ __forceinline__ static void clear(float (&result)[kRows][kCount][4]) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) result[m][n][i] = 0.0f;
      }
    }
  }

  // acc += a·(a tile's weights of one depth step); acc begins with column tile `first`.
  template <int kCount>
  __device__ __forceinline__ static void multiply(float (&acc)[kRows][kCount][4],
                                                  const A (&a)[kRows], const Packed& packed,
                                                  int tile, int step, int first = 0) {
#pragma unroll
    for (int pair = 0; pair < kCount / 2; ++pair) {
      B b[2];
      packed.load(b, tile, step, first / 2 + pair);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        F::multiply_add(acc[m][2 * pair], a[m], b[0]);
        F::multiply_add(acc[m][2 * pair + 1], a[m], b[1]);
      }
    }
  }

  // ---- convolutions --------------------------------------------------------------------------

  // The lane's pixels in shared memory: of each row tile, pixel lane % 16.
  using Addresses = const T* [kRows];

  __device__ __forceinline__ static void load_pixels(A (&a)[kRows], const Addresses& pixel,
                                                     int offset, int step) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) F::load_a_row(a[m], pixel[m] + offset + step * F::kDepth);
  }

  // acc += the 3×3 convolution whose first tap is at `first`; `pitch` from row to row, in elements.
  __device__ __forceinline__ static void convolve3x3(Result& acc, const Addresses& first, int pitch,
                                                     const Packed& packed, int tile) {
#pragma unroll 1
    for (int dy = 0; dy < 3; ++dy) {
#pragma unroll kTapsUnrolled
      for (int dx = 0; dx < 3; ++dx) {
#pragma unroll kStepsUnrolled
        for (int step = 0; step < kSteps; ++step) {
          A a[kRows];
          load_pixels(a, first, dy * pitch + dx * kPitch, step);
          multiply(acc, a, packed, tile + 3 * dy + dx, step);
        }
      }
    }
  }

  // One row of a 5×5 window, and what of it is the 3×3 window's row.
  template <bool kInner>
  __device__ __forceinline__ static void convolve_row(Result& f3, Result& f5,
                                                      const Addresses& first, int offset,
                                                      const Packed& packed, int tile3, int tile5) {
#pragma unroll kTapsUnrolled
    for (int dx = 0; dx < 5; ++dx) {
#pragma unroll kStepsUnrolled
      for (int step = 0; step < kSteps; ++step) {
        A a[kRows];
        load_pixels(a, first, offset + dx * kPitch, step);
        multiply(f5, a, packed, tile5 + dx, step);
        if (kInner && dx >= 1 && dx <= 3) multiply(f3, a, packed, tile3 + dx - 1, step);
      }
    }
  }

  // acc += the 1×1 convolution of a tile.
  __device__ __forceinline__ static void convolve1x1(Result& acc, const Addresses& pixel,
                                                     int offset, const Packed& packed, int tile) {
#pragma unroll kStepsUnrolled
    for (int step = 0; step < kSteps; ++step) {
      A a[kRows];
      load_pixels(a, pixel, offset, step);
      multiply(acc, a, packed, tile, step);
    }
  }

  // f1, f3, f5 of the 5×5 windows that begin at `first`.
  __device__ __forceinline__ static void convolve(Result (&f)[3], const Addresses& first, int pitch,
                                                  const Packed& packed) {
#pragma unroll
    for (int part = 0; part < 3; ++part) clear(f[part]);
    convolve1x1(f[0], first, 2 * pitch + 2 * kPitch, packed, kSpatial1);
    convolve_row<false>(f[1], f[2], first, 0, packed, kSpatial3, kSpatial5);
#pragma unroll 1
    for (int dy = 1; dy < 4; ++dy) {
      convolve_row<true>(f[1], f[2], first, dy * pitch, packed, kSpatial3 + 3 * (dy - 1),
                         kSpatial5 + 5 * dy);
    }
    convolve_row<false>(f[1], f[2], first, 4 * pitch, packed, kSpatial3, kSpatial5 + 20);
  }

  // ---- features, attention, reduction --------------------------------------------------------

  // Features of one row tile and depth step, as kept between products: an operand, but where that
  // has two terms, the values.
  struct Values {
    float d[kChain][4];
  };
  using Kept = std::conditional_t<kSplits, Values, A>;
  struct Features {
    Kept kept[3][kRows][kSteps];
  };

  __device__ __forceinline__ static void keep(Features& features, const Result (&f)[3]) {
#pragma unroll
    for (int part = 0; part < 3; ++part) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          Values values;
#pragma unroll
          for (int t = 0; t < kChain; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) values.d[t][i] = f[part][m][step * kChain + t][i];
          }
          if constexpr (kSplits) {
            features.kept[part][m][step] = values;
          } else {
            F::chain(features.kept[part][m][step], values.d);
          }
        }
      }
    }
  }

  __device__ __forceinline__ static void operand(A& a, const Kept& kept) {
    if constexpr (kSplits) {
      F::chain(a, kept.d);
    } else {
      a = kept;
    }
  }
  // The inverse of chain.
  __device__ __forceinline__ static float value(const Kept& kept, int t, int i) {
    if constexpr (sizeof(T) == 2) {
      T pair[2];
      memcpy(pair, &kept.bits[2 * t + i / 2], sizeof(pair));
      return to_float(pair[i % 2]);
    } else if constexpr (kSplits) {
      return kept.d[t][i];
    } else {
      return __uint_as_float(kept.bits[0][i % 2 * 2 + i / 2]);
    }
  }

  // A feature of part k, which is not known when compiling. Registers have no index: it is selected.
  __device__ __forceinline__ static float feature(const Features& features, int k, int m, int step,
                                                  int t, int i) {
    if constexpr (kSplits) return value(features.kept[k][m][step], t, i);
    const float own = value(features.kept[0][m][step], t, i);
    const float next = value(features.kept[1][m][step], t, i);
    return k == 0 ? own : k == 1 ? next : value(features.kept[2][m][step], t, i);
  }

  // Part k of Wa ∗ f, column tiles first….
  template <int kCount>
  __device__ __forceinline__ static void logits(float (&result)[kRows][kCount][4],
                                                const Features& features, int k,
                                                const Packed& packed, int first = 0) {
    clear(result);
#pragma unroll kFeaturesUnrolled
    for (int part = 0; part < 3; ++part) {
      if constexpr (!kSplits) __syncwarp();  // keeps loads of weights from filling all registers
#pragma unroll kFeaturesUnrolled
      for (int step = 0; step < kSteps; ++step) {
        if constexpr (kChannels == 64) __syncwarp();
        A a[kRows];
#pragma unroll
        for (int m = 0; m < kRows; ++m) operand(a[m], features.kept[part][m][step]);
        multiply(result, a, packed, kAttention + 3 * k + part, step, first);
      }
    }
  }

  // The values of a packed vector for the lane's two channels of column tile n.
  __device__ __forceinline__ static float2 of_columns(const float* vector, int n) {
    return *reinterpret_cast<const float2*>(vector + 8 * n + lane_of_warp() % 4 * 2);
  }

  // acc += part k of Wr (σ(scale·logits + shift) ⊙ f), of the inputs that the logits are for.
  template <int kCount>
  __device__ __forceinline__ static void reduce(Result& acc,
                                                const float (&logits)[kRows][kCount][4],
                                                const Features& features, int k,
                                                const float* scale, const float* shift,
                                                const Packed& packed, int first = 0) {
#pragma unroll
    for (int own = 0; own < kCount / kChain; ++own) {
      if constexpr (!kSplits) __syncwarp();
      A a[kRows];
      float weighted[kRows][kChain][4];
#pragma unroll
      for (int t = 0; t < kChain; ++t) {
        const int n = own * kChain + t;
        const float2 by = of_columns(scale, first + n), plus = of_columns(shift, first + n);
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float logit =
                fmaf(logits[m][n][i], i % 2 == 0 ? by.x : by.y, i % 2 == 0 ? plus.x : plus.y);
            weighted[m][t][i] =
                sigmoid(logit) * feature(features, k, m, first / kChain + own, t, i);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) F::chain(a[m], weighted[m]);
      multiply(acc, a, packed, kReduce + k, first / kChain + own);
    }
  }

  // y = BN(Wr (A ⊙ f)) + α·Wc∗X with running statistics; `first` as in convolve.
  __device__ __forceinline__ static void run(Result& y, const Addresses& first, int pitch,
                                             const Packed& packed, const float* vectors) {
    Features features;
    {
      Result f[3];
      convolve(f, first, pitch, packed);
      keep(features, f);
    }
    __syncwarp();
    clear(y);
#pragma unroll 1
    for (int column = 0; column < 3 * kColumns; column += kLogits) {
      const int k = column / kColumns, first = column % kColumns;
      float part[kRows][kLogits][4];
      logits(part, features, k, packed, first);
      reduce(y, part, features, k, vectors + (kAttentionScale + k) * kChannels,
             vectors + (kAttentionShift + k) * kChannels, packed, first);
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float2 by = of_columns(vectors + kReduceScale * kChannels, n);
      const float2 plus = of_columns(vectors + kReduceShift * kChannels, n);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          y[m][n][i] = fmaf(y[m][n][i], i % 2 == 0 ? by.x : by.y, i % 2 == 0 ? plus.x : plus.y);
        }
      }
    }
    __syncwarp();
    convolve1x1(y, first, 2 * pitch + 2 * kPitch, packed, kChannelFeat);
  }
};

}  // namespace ciema::cross_spatial
