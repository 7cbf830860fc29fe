// The backbone's kernels for any instruction set. Included inside the anonymous namespace of a file
// that has defined `struct Simd`, kTilePixels and kTileVectors.
//
// Lanes  are channels in both kernels, so channels_last maps are read and written as they lie.
// Sums   float32, one chain over the taps and one over k for each output: its bits depend on
//        nothing but the weights and the pixel's surroundings.
// Cache  kRunPixels outputs share their inputs in registers. The product reads a weight panel
//        (64 KiB at k = 512) from the second-level cache for every kTilePixels rows, which stay in
//        the first: 14x2 vectors take 2 loads and 14 broadcasts for 28 multiply-adds.

constexpr int kTileColumns = kTileVectors * Simd::kLanes;
constexpr int kRunPixels = 4;

template <class T>
inline Simd::Floats load_lanes(const T* x, int lanes) {
  return lanes == Simd::kLanes ? Simd::load(x) : Simd::load(x, lanes);
}

template <class T>
inline void store_lanes(T* out, Simd::Floats a, int lanes) {
  if (lanes == Simd::kLanes) {
    Simd::store(out, a);
  } else {
    Simd::store(out, a, lanes);
  }
}

// Not max(a, 0): the second operand is what a NaN leaves.
inline Simd::Floats positive(Simd::Floats a, bool relu) {
  return relu ? Simd::max(Simd::zero(), a) : a;
}

// --------------------------------------------------------------------------------------- depthwise

// One vector of channels of kRunPixels outputs, all of whose columns lie inside the map.
template <class T, class S, int kStride>
inline void depthwise_inside(const DepthwiseRun& run, const T* const* at, int64_t c, int lanes,
                             S* out) {
  Simd::Floats sum[kRunPixels];
  const Simd::Floats bias = load_lanes(run.bias + c, lanes);
  for (int p = 0; p < kRunPixels; ++p) sum[p] = bias;
  for (int row = 0; row < 3; ++row) {
    if (at[row] == nullptr) continue;
    const T* x = at[row] + c;
    const float* weight = run.weight + row * 3 * run.channels + c;
    const Simd::Floats w[3] = {load_lanes(weight, lanes),
                               load_lanes(weight + run.channels, lanes),
                               load_lanes(weight + 2 * run.channels, lanes)};
#pragma GCC unroll 16
    for (int column = 0; column < (kRunPixels - 1) * kStride + 3; ++column) {
      const Simd::Floats value = load_lanes(x + column * run.pixel, lanes);
#pragma GCC unroll 4
      for (int p = 0; p < kRunPixels; ++p) {
        const int tap = column - p * kStride;
        if (tap >= 0 && tap < 3) sum[p] = Simd::fma(value, w[tap], sum[p]);
      }
    }
  }
  for (int p = 0; p < kRunPixels; ++p) {
    store_lanes(out + p * run.out_pixel + c, positive(sum[p], run.relu), lanes);
  }
}

// One output pixel anywhere.
template <class T, class S>
void depthwise_pixel(const DepthwiseRun& run, int64_t left, S* out) {
  const T* taps[9];
  const float* weights[9];
  int count = 0;
  for (int tap = 0; tap < 9; ++tap) {
    const int64_t column = left + tap % 3;
    const T* row = static_cast<const T*>(run.rows[tap / 3]);
    if (row == nullptr || column < 0 || column >= run.width) continue;
    taps[count] = row + column * run.pixel;
    weights[count++] = run.weight + tap * run.channels;
  }
  for (int64_t c = 0; c < run.channels; c += Simd::kLanes) {
    const int lanes = run.channels - c < Simd::kLanes ? static_cast<int>(run.channels - c)
                                                      : Simd::kLanes;
    Simd::Floats sum = load_lanes(run.bias + c, lanes);
    for (int t = 0; t < count; ++t) {
      sum = Simd::fma(load_lanes(taps[t] + c, lanes), load_lanes(weights[t] + c, lanes), sum);
    }
    store_lanes(out + c, positive(sum, run.relu), lanes);
  }
}

template <class T, class S, int kStride>
void depthwise_run(const DepthwiseRun& run, S* out) {
  constexpr int64_t kColumns = (kRunPixels - 1) * kStride + 3;
  int64_t p = 0;
  while (p < run.count) {
    const int64_t left = (run.first + p) * kStride - 1;
    S* to = out + p * run.out_pixel;
    if (left < 0 || p + kRunPixels > run.count || left + kColumns > run.width) {
      depthwise_pixel<T, S>(run, left, to);
      ++p;
      continue;
    }
    const T* at[3];
    for (int row = 0; row < 3; ++row) {
      const T* from = static_cast<const T*>(run.rows[row]);
      at[row] = from == nullptr ? nullptr : from + left * run.pixel;
    }
    int64_t c = 0;
    for (; c + Simd::kLanes <= run.channels; c += Simd::kLanes) {
      depthwise_inside<T, S, kStride>(run, at, c, Simd::kLanes, to);
    }
    if (c < run.channels) {
      depthwise_inside<T, S, kStride>(run, at, c, static_cast<int>(run.channels - c), to);
    }
    p += kRunPixels;
  }
}

template <class T, class S>
void depthwise(const DepthwiseRun& run, void* out) {
  if (run.stride == 1) {
    depthwise_run<T, S, 1>(run, static_cast<S*>(out));
  } else {
    depthwise_run<T, S, 2>(run, static_cast<S*>(out));
  }
}

// ----------------------------------------------------------------------------------------- product

struct FloatSteps {
  using Element = float;
  using Vector = Simd::Floats;
  static constexpr int kPerStep = 1;
  static Vector load(const Element* w) { return Simd::load(w); }
  static Vector spread(const Element* a) { return Simd::set(*a); }
  static Simd::Floats multiply_add(Vector a, Vector b, Simd::Floats sum) {
    return Simd::fma(a, b, sum);
  }
};

// kTilePixels rows of a with one weight panel; the first `rows` are stored, `columns` of each.
template <class W, class T>
inline void multiply_tile(const PixelProduct& product, const typename W::Element* a,
                          const typename W::Element* weight, const float* bias, int rows,
                          int columns, T* out) {
  Simd::Floats sum[kTilePixels][kTileVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kTileVectors; ++v) {
    const int lanes = columns - v * Simd::kLanes;
    const Simd::Floats start = lanes <= 0 ? Simd::zero()
                               : lanes >= Simd::kLanes
                                   ? Simd::load(bias + v * Simd::kLanes)
                                   : Simd::load(bias + v * Simd::kLanes, lanes);
#pragma GCC unroll 16
    for (int p = 0; p < kTilePixels; ++p) sum[p][v] = start;
  }
  for (int64_t k = 0; k < product.steps; ++k) {
    typename W::Vector w[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) w[v] = W::load(weight + v * Simd::kLanes * W::kPerStep);
#pragma GCC unroll 16
    for (int p = 0; p < kTilePixels; ++p) {
      const typename W::Vector x = W::spread(a + p * product.a_pixel);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[p][v] = W::multiply_add(x, w[v], sum[p][v]);
    }
    a += W::kPerStep;
    weight += kTileColumns * W::kPerStep;
  }
#pragma GCC unroll 16
  for (int p = 0; p < kTilePixels; ++p) {
    if (p >= rows) return;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const int lanes = columns - v * Simd::kLanes;
      if (lanes <= 0) break;
      store_lanes(out + p * product.out_pixel + v * Simd::kLanes,
                  positive(sum[p][v], product.relu),
                  lanes < Simd::kLanes ? lanes : Simd::kLanes);
    }
  }
}

template <class W, class T>
void multiply_pixels(const PixelProduct& product, void* data) {
  using Element = typename W::Element;
  const Element* a = static_cast<const Element*>(product.a);
  const Element* weight = static_cast<const Element*>(product.weight);
  T* out = static_cast<T*>(data);
  for (int64_t n = 0; n < product.columns; n += kTileColumns) {
    const int64_t columns = product.columns - n < kTileColumns ? product.columns - n : kTileColumns;
    for (int64_t p = 0; p < product.pixels; p += kTilePixels) {
      const int64_t rows = product.pixels - p < kTilePixels ? product.pixels - p : kTilePixels;
      multiply_tile<W, T>(product, a + p * product.a_pixel, weight, product.bias + n,
                          static_cast<int>(rows), static_cast<int>(columns),
                          out + p * product.out_pixel + n);
    }
    weight += product.steps * kTileColumns * W::kPerStep;
  }
}

constexpr Separable table_of_floats() {
  return {kTilePixels,
          kTileColumns,
          {{depthwise<float, float>, depthwise<float, BFloat16>},
           {depthwise<BFloat16, float>, depthwise<BFloat16, BFloat16>},
           {depthwise<Half, float>, depthwise<Half, BFloat16>}},
          {{multiply_pixels<FloatSteps, float>, multiply_pixels<FloatSteps, BFloat16>,
            multiply_pixels<FloatSteps, Half>},
           {nullptr, nullptr, nullptr}}};
}
