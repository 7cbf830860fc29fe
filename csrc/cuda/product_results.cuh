// What becomes of a product's tile: from the accumulators through the epilogue into out and sums.
//
// Results     through shared memory, a part of the tile at a time, so that the epilogue gets runs
//             of 16 bytes of the output's layout, and loads and stores as wide.
// Reduction   instead of or beside storing, an epilogue may ask for the tile's sums over pixels, or
//             its means and sums of squared deviations (two passes; tiles are joined by Chan's
//             formula), of the float32 results, for each channel, always in the same order.
#pragma once

#include "moments.cuh"
#include "product_extremes.cuh"
#include "product_loop.cuh"

namespace ciema::product {

// An epilogue, passed to the kernel by value:
//
//   struct Example {
//     using Output = T;                                  // what out holds
//     static constexpr bool kStores = true;              // whether there is an out, if not null
//     static constexpr Reduction kReduction = Reduction::kNone;  // into partials, if not null
//     static constexpr bool kExtremes = true;            // optional: into extremes, if not null
//     static constexpr int kVectors = 2;                 // numbers that belong to a channel
//     // The tile computes them once for each of its channels.
//     __device__ void vectors(int64_t b, int channel, float (&value)[kVectors]) const;
//     // Changes the results of one run, of which run.count are real. (kVectors 0: one, unused.)
//     template <Layout kLayout, int kRun>
//     __device__ void apply(const Run& run, const float (&vectors)[kVectors][kRun],
//                           float (&value)[kRun]) const;
//   };

// A run of floats in shared memory, 16 bytes at a time, kRun 4 or 8. With a `turn` of 1 the second
// half is first, so that lanes 8 floats apart can keep to different banks.
template <int kRun>
__device__ __forceinline__ void read_floats(const float* from, int turn, float (&value)[kRun]) {
  const auto first = load_vector<Vector<float>>(from + turn * 4);
  if constexpr (kRun == 4) {
#pragma unroll
    for (int e = 0; e < 4; ++e) value[e] = first.element[e];
  } else {
    const auto second = load_vector<Vector<float>>(from + (turn ^ 1) * 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      value[e] = turn == 0 ? first.element[e] : second.element[e];
      value[4 + e] = turn == 0 ? second.element[e] : first.element[e];
    }
  }
}

template <int kRun>
__device__ __forceinline__ void write_floats(float* to, int turn, const float (&value)[kRun]) {
  Vector<float> first, second;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    first.element[e] = turn == 0 ? value[e] : value[kRun - 4 + e];
    second.element[e] = turn == 0 ? value[kRun - 4 + e] : value[e];
  }
  store_vector(to + turn * 4, first);
  if constexpr (kRun == 8) store_vector(to + (turn ^ 1) * 4, second);
}

// A part of the tile in shared memory, [line][length]: for rows kSpan channels of every row of warps
// and all pixels, for channels_last kSpan pixels of every column of warps and all channels. kSpan is
// what fits where the loop's stages were: every part is code of its own, as accumulators are
// registers, which have no index.
template <class T, Precision kPrecision, Layout kLayout, class Shape, class Loading, class Epilogue>
struct Results {
  using Main = Tiles<T, kPrecision, kLayout, Shape, Loading>;
  using Output = typename Epilogue::Output;
  static constexpr bool kRows = kLayout == Layout::kRows;
  static constexpr int kRun = Vector<Output>::kElements;
  static constexpr int kLength = kRows ? Shape::kN : Shape::kM;
  static constexpr int kPitch = kLength + (kRows ? 8 : 4);  // pairs and single floats, in turn
  static constexpr int kWarpLines = kRows ? Shape::kWarpM : Shape::kWarpN;
  static constexpr int kWarpCount = kRows ? Shape::kWarpsM : Shape::kWarpsN;
  __host__ __device__ static constexpr int bytes_of(int span) {
    return span * kWarpCount * kPitch * static_cast<int>(sizeof(float));
  }
  static constexpr bool kTwice =
      kWarpLines % 32 == 0 &&
      bytes_of(32) <= kStages * Main::kStageElements * static_cast<int>(sizeof(T));
  static constexpr int kSpan = kTwice ? 32 : 16;
  static constexpr int kLines = kSpan * kWarpCount, kParts = kWarpLines / kSpan;
  static constexpr int kBytes = bytes_of(kSpan);
  static constexpr int kRunsPerLine = kLength / kRun;
  static constexpr Reduction kReduction = Epilogue::kReduction;
  static constexpr bool kExtremes = requires { Epilogue::kExtremes; };
  static constexpr int kVectors = Epilogue::kVectors > 0 ? Epilogue::kVectors : 1;
  static_assert(kLines * kRunsPerLine % Shape::kThreads == 0 && kRunsPerLine <= kWarp);
  static_assert(Shape::kM <= Shape::kThreads);

  __device__ __forceinline__ static void store(const ProductParams& p, const Corner& corner,
                                               const Epilogue& epilogue,
                                               const typename Main::Accumulators& acc,
                                               float* part) {
    CIEMA_SHARED(float, vectors, [kVectors * Shape::kM]);
    fill_vectors(p, corner, epilogue, vectors);
    Moments sums{};  // channels_last: of channel threadIdx.x, as extremes
    Extremes extremes;
    extremes.start();
#pragma unroll
    for (int index = 0; index < kParts; ++index) {
      if (index > 0) __syncthreads();
      write(acc, index, part);
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kLines * kRunsPerLine;
           i += Shape::kThreads) {
        finish(p, corner, epilogue, index, i / kRunsPerLine, i % kRunsPerLine * kRun,
               vectors, part);
      }
      if constexpr (!kRows && kExtremes) {
        if (p.extremes != nullptr) {
          __syncthreads();
          find_extremes(p, corner, index, part, extremes);
        }
      }
      if constexpr (!kRows && kReduction != Reduction::kNone) {
        if (p.partials == nullptr) continue;
        __syncthreads();
        reduce_pixels(p, corner, epilogue, index, part, sums);
      }
    }
    if constexpr (!kRows && kExtremes) {
      const int channel = corner.channel + static_cast<int>(threadIdx.x);
      if (p.extremes != nullptr && static_cast<int>(threadIdx.x) < Shape::kM && channel < p.rows) {
        extremes.write(p.extremes, p.positions, corner.part, p.rows, channel);
      }
    }
    if constexpr (!kRows && kReduction != Reduction::kNone) {
      const int channel = corner.channel + static_cast<int>(threadIdx.x);
      if (p.partials != nullptr && static_cast<int>(threadIdx.x) < Shape::kM && channel < p.rows) {
        write_reduction(p, corner, channel, sums.mean, sums.m2);
      }
    }
  }

 private:
  // The epilogue's numbers for every channel of the tile, [number][channel].
  __device__ __forceinline__ static void fill_vectors(const ProductParams& p, const Corner& corner,
                                                      const Epilogue& epilogue, float* vectors) {
    if constexpr (Epilogue::kVectors > 0) {
      const int own = static_cast<int>(threadIdx.x);
      if (own >= Shape::kM) return;
      float value[kVectors] = {};
      if (corner.channel + own < p.rows) epilogue.vectors(corner.b, corner.channel + own, value);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) vectors[v * Shape::kM + own] = value[v];
    }
  }

  // This warp's accumulators of one part.
  __device__ __forceinline__ static void write(const typename Main::Accumulators& acc, int index,
                                               float* part) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int g = static_cast<int>(threadIdx.x) % kWarp / 4, q = static_cast<int>(threadIdx.x) % 4;
    const int warp_m = warp / Shape::kWarpsN, warp_n = warp % Shape::kWarpsN;
    if constexpr (kRows) {
      float* row = part + (warp_m * kSpan + g) * kPitch + warp_n * Shape::kWarpN + 2 * q;
#pragma unroll
      for (int i = 0; i < kSpan / 16; ++i) {
#pragma unroll
        for (int j = 0; j < Main::kFragmentsN; ++j) {
          const float(&d)[4] = acc[index * (kSpan / 16) + i][j];
          store_pair(row + i * 16 * kPitch + j * 8, d[0], d[1]);
          store_pair(row + (i * 16 + 8) * kPitch + j * 8, d[2], d[3]);
        }
      }
    } else {
      float* row = part + (warp_n * kSpan + 2 * q) * kPitch + warp_m * Shape::kWarpM + g;
#pragma unroll
      for (int j = 0; j < kSpan / 8; ++j) {
#pragma unroll
        for (int i = 0; i < Main::kFragmentsM; ++i) {
          const float(&d)[4] = acc[i][index * (kSpan / 8) + j];
          float* to = row + j * 8 * kPitch + i * 16;
          to[0] = d[0];
          to[kPitch] = d[1];
          to[8] = d[2];
          to[kPitch + 8] = d[3];
        }
      }
    }
  }

  __device__ __forceinline__ static void store_pair(float* to, float low, float high) {
    const float values[2] = {low, high};
    uint64_t bits;
    memcpy(&bits, values, sizeof(bits));
    *reinterpret_cast<uint64_t*>(to) = bits;
  }

  // Channel (rows) or pixel (channels_last) of a part's line.
  __device__ __forceinline__ static int position(int index, int line) {
    return line / kSpan * kWarpLines + index * kSpan + line % kSpan;
  }

  // One run: out of shared memory, through the epilogue, into out.
  __device__ __forceinline__ static void finish(const ProductParams& p, const Corner& corner,
                                                const Epilogue& epilogue, int index, int line,
                                                int at, const float* vectors, float* part) {
    const int across = position(index, line);
    Run run{corner.b, corner.channel + (kRows ? across : at),
            corner.pixel + (kRows ? at : across), 0};
    if (kRows ? run.channel < p.rows : run.pixel < p.pixels) {
      run.count = kRows ? p.pixels - run.pixel : p.rows - run.channel;
      if (PLANT == 3 && run.count > 0) run.count += 1;
    }
    float* own = part + line * kPitch + at;
    const int turn = (at / 32 + (kLength == 32 && kRows ? line : 0)) % (kRun / 4);
    float value[kRun];
    read_floats(own, turn, value);
    if (run.count > 0) {
      float numbers[kVectors][kRun];
#pragma unroll
      for (int v = 0; v < Epilogue::kVectors; ++v) {
        if constexpr (kRows) {
          const float number = vectors[v * Shape::kM + across];
#pragma unroll
          for (int e = 0; e < kRun; ++e) numbers[v][e] = number;
        } else {
          read_floats(vectors + v * Shape::kM + at, at / 32 % (kRun / 4), numbers[v]);
        }
      }
      epilogue.template apply<kLayout>(run, numbers, value);
      if (Epilogue::kStores && p.out.data != nullptr) store_run<Output>(p.out, run, value);
    }
    if constexpr (kExtremes) {
      if (p.extremes != nullptr) {
        if constexpr (kRows) {
          find_run_extremes(p, corner, run, value);
        } else {
          write_floats(own, turn, value);
        }
      }
    }
    if constexpr (kReduction != Reduction::kNone) {
      if (p.partials == nullptr) return;  // no lane of the launch reduces
      if constexpr (kRows) {
        reduce_run(p, corner, epilogue, run, value);
      } else {
        write_floats(own, turn, value);
      }
    }
  }

  // rows: the lanes of one channel add up their runs, which are all its pixels of the tile.
  __device__ __forceinline__ static void reduce_run(const ProductParams& p, const Corner& corner,
                                                    const Epilogue& epilogue, const Run& run,
                                                    const float (&value)[kRun]) {
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < kRun; ++e) sum += e < run.count ? value[e] : 0.0f;
    sum = add_lanes(sum);
    float mean = sum, m2 = 0.0f;
    if (takes_products(epilogue)) {
      m2 = add_lanes(products(epilogue, run, value));
    } else if constexpr (kReduction != Reduction::kSums) {
      const int pixels = p.pixels - corner.pixel;
      mean = sum / static_cast<float>(pixels < Shape::kN ? pixels : Shape::kN);
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        const float deviation = e < run.count ? value[e] - mean : 0.0f;
        m2 += deviation * deviation;
      }
      m2 = add_lanes(m2);
    }
    if (run.pixel == corner.pixel && run.channel < p.rows) {
      write_reduction(p, corner, run.channel, mean, m2);
    }
  }

  __device__ __forceinline__ static bool takes_products(const Epilogue& epilogue) {
    if constexpr (kReduction == Reduction::kMomentsOrProducts) {
      return epilogue.partner.data != nullptr;
    }
    return false;
  }

  // Σ value · (partner − mean) of a run.
  __device__ __forceinline__ static float products(const Epilogue& epilogue, const Run& run,
                                                   const float (&value)[kRun]) {
    float sum = 0.0f;
    if constexpr (kReduction == Reduction::kMomentsOrProducts) {
      if (run.count <= 0) return sum;
      float partner[kRun];
      load_run<Output>(epilogue.partner, run, partner);
      const float mean = epilogue.partner_mean[run.channel];
#pragma unroll
      for (int e = 0; e < kRun; ++e) sum += e < run.count ? value[e] * (partner[e] - mean) : 0.0f;
    }
    return sum;
  }

  __device__ __forceinline__ static float add_lanes(float value) {
#pragma unroll
    for (int lanes = kRunsPerLine / 2; lanes > 0; lanes /= 2) {
      value += __shfl_xor_sync(kFullMask, value, lanes);
    }
    return value;
  }

  // channels_last: thread m adds up channel m over the part's pixels.
  __device__ __forceinline__ static void reduce_pixels(const ProductParams& p,
                                                       const Corner& corner,
                                                       const Epilogue& epilogue, int index,
                                                       const float* part, Moments& sums) {
    if (static_cast<int>(threadIdx.x) >= Shape::kM) return;
    if (takes_products(epilogue)) {
      add_products(p, corner, epilogue, index, part, sums);
      return;
    }
    const float* own = part + threadIdx.x;
    float sum = 0.0f, count = 0.0f;
    for (int line = 0; line < kLines; ++line) {
      if (corner.pixel + position(index, line) >= p.pixels) continue;
      sum += own[line * kPitch];
      count += 1.0f;
    }
    if constexpr (kReduction == Reduction::kSums) {
      sums.mean += sum;
    } else if (count > 0.0f) {
      const float mean = sum / count;
      float m2 = 0.0f;
      for (int line = 0; line < kLines; ++line) {
        if (corner.pixel + position(index, line) >= p.pixels) continue;
        const float deviation = own[line * kPitch] - mean;
        m2 += deviation * deviation;
      }
      sums.merge(mean, m2, count);
    }
  }

  // The same for products: `mean` holds the sum, `m2` that of the products.
  __device__ __forceinline__ static void add_products(const ProductParams& p, const Corner& corner,
                                                      const Epilogue& epilogue, int index,
                                                      const float* part, Moments& sums) {
    if constexpr (kReduction == Reduction::kMomentsOrProducts) {
      const int channel = corner.channel + static_cast<int>(threadIdx.x);
      if (channel >= p.rows) return;
      const float mean = epilogue.partner_mean[channel];
      for (int line = 0; line < kLines; ++line) {
        const int pixel = corner.pixel + position(index, line);
        if (pixel >= p.pixels) continue;
        const float value = part[line * kPitch + threadIdx.x];
        const Run run{corner.b, channel, pixel, 1};
        sums.mean += value;
        sums.m2 += value * (to_float(*address_of<Output>(epilogue.partner, run)) - mean);
      }
    }
  }

  // rows: as reduce_run, sum and first maximum.
  __device__ __forceinline__ static void find_run_extremes(const ProductParams& p,
                                                           const Corner& corner, const Run& run,
                                                           const float (&value)[kRun]) {
    Extremes own;
    own.start();
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      if (e < run.count) own.add(value[e], run.pixel + e);
    }
    own.template join_lanes<kRunsPerLine>();
    if (run.pixel == corner.pixel && run.channel < p.rows) {
      own.write(p.extremes, p.positions, corner.part, p.rows, run.channel);
    }
  }

  // channels_last: as reduce_pixels.
  __device__ __forceinline__ static void find_extremes(const ProductParams& p,
                                                       const Corner& corner, int index,
                                                       const float* part, Extremes& extremes) {
    if (static_cast<int>(threadIdx.x) >= Shape::kM) return;
    for (int line = 0; line < kLines; ++line) {
      const int pixel = corner.pixel + position(index, line);
      if (pixel < p.pixels) extremes.add(part[line * kPitch + threadIdx.x], pixel);
    }
  }

  __device__ __forceinline__ static void write_reduction(const ProductParams& p,
                                                         const Corner& corner, int channel,
                                                         float first, float m2) {
    const int64_t rows = p.rows;
    if constexpr (kReduction == Reduction::kSums) {
      p.partials[corner.part * rows + channel] = first;
    } else {
      p.partials[corner.part * 2 * rows + channel] = first;
      p.partials[(corner.part * 2 + 1) * rows + channel] = m2;
    }
  }
};

}  // namespace ciema::product
