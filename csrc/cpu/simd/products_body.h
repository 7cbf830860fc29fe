// Products for any instruction set: packing and the register kernel. Included inside the anonymous
// namespace of a file that has defined `struct Simd`, kPanelRows and kPanelVectors.
//
// Sums   float32, one chain of fused multiply-adds over k for each output: its bits depend on
//        nothing but the weight and the pixel.
// Cache  a panel of 1024 channels (192 KiB with AVX-512) stays in the second-level cache and is
//        read once for every kPanelRows rows; a weight panel streams past it. Neither limits the
//        multiply-adds: 8x3 vectors take 3 + 8/16 vectors of memory for 24 of them.

constexpr int kPanelPixels = kPanelVectors * Simd::kLanes;
static_assert(kBlockRows % kPanelRows == 0 && kBlockRows % Simd::kLanes == 0);

inline int smaller(int a, int64_t b) { return a < b ? a : static_cast<int>(b); }

// ----------------------------------------------------------------------- blocks of kLanes x kLanes

// Rows v[channel] of neighbouring pixels, wherever the map's elements lie; lanes past `pixels` and
// rows past `channels` are zero or not read.
template <class T>
inline void load_block(const T* x, int64_t stride_c, int64_t stride_s, int channels, int pixels,
                       Simd::Floats* v) {
  if (stride_s == 1) {
    if (pixels == Simd::kLanes) {
      for (int c = 0; c < channels; ++c) v[c] = Simd::load(x + c * stride_c);
    } else {
      for (int c = 0; c < channels; ++c) v[c] = Simd::load(x + c * stride_c, pixels);
    }
    return;
  }
  for (int p = 0; p < Simd::kLanes; ++p) v[p] = Simd::zero();
  if (channels == Simd::kLanes) {
    for (int p = 0; p < pixels; ++p) v[p] = Simd::load(x + p * stride_s);
  } else {
    for (int p = 0; p < pixels; ++p) v[p] = Simd::load(x + p * stride_s, channels);
  }
  Simd::transpose(v);
}

template <class T>
inline void store_block(T* out, int64_t stride_c, int64_t stride_s, int channels, int pixels,
                        Simd::Floats* v) {
  if (stride_s == 1) {
    if (pixels == Simd::kLanes) {
      for (int c = 0; c < channels; ++c) Simd::store(out + c * stride_c, v[c]);
    } else {
      for (int c = 0; c < channels; ++c) Simd::store(out + c * stride_c, v[c], pixels);
    }
    return;
  }
  for (int c = channels; c < Simd::kLanes; ++c) v[c] = Simd::zero();
  Simd::transpose(v);
  if (channels == Simd::kLanes) {
    for (int p = 0; p < pixels; ++p) Simd::store(out + p * stride_s, v[p]);
  } else {
    for (int p = 0; p < pixels; ++p) Simd::store(out + p * stride_s, v[p], channels);
  }
}

// ----------------------------------------------------------------------------------------- words

// A step is one k: words are floats.
struct Floats {
  using Vector = Simd::Floats;
  static constexpr int kPerStep = 1;
  static Vector load(const float* word) { return Simd::load(word); }
  static Vector spread(const float* word) { return Simd::set(*word); }
  static Simd::Floats multiply_add(Vector a, Vector b, Simd::Floats sum) {
    return Simd::fma(a, b, sum);
  }
  // Rows v of a block into words; `panel` is its first word.
  static void write(const Simd::Floats* v, int channels, float* panel) {
    for (int c = 0; c < channels; ++c) Simd::store(panel + c * kPanelPixels, v[c]);
  }
};

// ----------------------------------------------------------------------------------------- packing

// Rows v of `channels` channels, the first of them `first`, at `pixel` of the tile.
inline void transform_block(const Transform& transform, int64_t first, int channels, int64_t pixel,
                            Simd::Floats* v) {
  if (transform.scale != nullptr) {
    for (int i = 0; i < channels; ++i) {
      v[i] = Simd::mul(v[i], Simd::set(transform.scale[first + i]));
      if (transform.shift != nullptr) v[i] = Simd::add(v[i], Simd::set(transform.shift[first + i]));
      if (transform.relu) v[i] = Simd::max(Simd::zero(), v[i]);
    }
  }
  if (transform.gate != nullptr) {
    for (int i = 0; i < channels; ++i) {
      const int64_t group = (first + i) / transform.group_channels;
      v[i] = Simd::mul(v[i], Simd::load(transform.gate + group * transform.gate_stride + pixel));
    }
  }
}

template <class W, class T>
void pack(const MapView& map, int64_t channels, int count, const Transform& transform,
          void* panel) {
  const T* x = static_cast<const T*>(map.data);
  for (int64_t c = 0; c < channels; c += Simd::kLanes) {
    const int block = smaller(Simd::kLanes, channels - c);
    for (int p = 0; p < count; p += Simd::kLanes) {
      Simd::Floats v[Simd::kLanes];
      const T* from = x + c * map.stride_c + p * map.stride_s;
      load_block(from, map.stride_c, map.stride_s, block, smaller(Simd::kLanes, count - p), v);
      transform_block(transform, c, block, p, v);
      W::write(v, block, static_cast<float*>(panel) + c / W::kPerStep * kPanelPixels + p);
    }
  }
}

// Blocks of a map with pixels as rows: v[pixel] holds channels.
template <class T>
inline void load_pixels(const T* x, const MapView& map, int channels, int pixels,
                        const Transform& transform, int64_t first, int64_t pixel,
                        Simd::Floats* v) {
  load_block(x, map.stride_c, map.stride_s, channels, pixels, v);
  transform_block(transform, first, channels, pixel, v);
  for (int c = channels; c < Simd::kLanes; ++c) v[c] = Simd::zero();
  Simd::transpose(v);
}

template <class W, class T>
void pack_pixels(const MapView& map, int count, int64_t pixels, const Transform& transform,
                 int64_t first_channel, void* panel) {
  const T* x = static_cast<const T*>(map.data);
  for (int c = 0; c < count; c += Simd::kLanes) {
    const int channels = smaller(Simd::kLanes, count - c);
    for (int64_t p = 0; p < pixels; p += Simd::kLanes) {
      Simd::Floats v[Simd::kLanes];
      const int block = smaller(Simd::kLanes, pixels - p);
      load_pixels(x + c * map.stride_c + p * map.stride_s, map, channels, block, transform,
                  first_channel + c, p, v);
      W::write(v, block, static_cast<float*>(panel) + p / W::kPerStep * kPanelPixels + c);
    }
  }
}

template <class W, class T>
void pack_rows(const MapView& map, int channels, int64_t pixels, void* panels) {
  static_assert(Simd::kLanes == 2 * kPanelRows);
  const T* x = static_cast<const T*>(map.data);
  const int64_t panel_floats = (pixels + W::kPerStep - 1) / W::kPerStep * kPanelRows;
  const Transform none{};
  for (int c = 0; c < channels; c += Simd::kLanes) {
    const int rows = smaller(Simd::kLanes, channels - c);
    float* low = static_cast<float*>(panels) + c / kPanelRows * panel_floats;
    for (int64_t p = 0; p < pixels; p += Simd::kLanes) {
      Simd::Floats v[Simd::kLanes];
      float words[Simd::kLanes * kPanelPixels];
      const int block = smaller(Simd::kLanes, pixels - p);
      load_pixels(x + c * map.stride_c + p * map.stride_s, map, rows, block, none, 0, 0, v);
      W::write(v, block, words);
      const int steps = (block + W::kPerStep - 1) / W::kPerStep;
      float* to = low + p / W::kPerStep * kPanelRows;
      for (int s = 0; s < steps; ++s) {
        const float* from = words + s * kPanelPixels;
        memcpy(to + s * kPanelRows, from, sizeof(float) * kPanelRows);
        if (rows > kPanelRows) {
          memcpy(to + panel_floats + s * kPanelRows, from + kPanelRows, sizeof(float) * kPanelRows);
        }
      }
    }
  }
}

// ----------------------------------------------------------------------------- the register kernel

template <class W, int kVectors>
inline void multiply_panel(const float* weight, const float* panel, int64_t steps, bool accumulate,
                           float* acc) {
  Simd::Floats sum[kPanelRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = accumulate ? Simd::load(acc + r * kPanelPixels + v * Simd::kLanes) : Simd::zero();
    }
  }
  for (int64_t k = 0; k < steps; ++k) {
    typename W::Vector x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = W::load(panel + v * Simd::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kPanelRows; ++r) {
      const typename W::Vector w = W::spread(weight + r);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = W::multiply_add(w, x[v], sum[r][v]);
    }
    panel += kPanelPixels;
    weight += kPanelRows;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Simd::store(acc + r * kPanelPixels + v * Simd::kLanes, sum[r][v]);
    }
  }
}

template <class W, int kVectors>
void multiply_vectors(const float* weight, int64_t panels, const float* panel, int64_t steps,
                      bool accumulate, float* acc) {
  for (int64_t i = 0; i < panels; ++i) {
    multiply_panel<W, kVectors>(weight + i * steps * kPanelRows, panel, steps, accumulate,
                                acc + i * kPanelRows * kPanelPixels);
  }
}

template <class W>
void multiply(const void* weight, int64_t panels, const void* panel, int64_t steps, int count,
              bool accumulate, float* acc) {
  static_assert(kPanelVectors <= 3);
  const float* w = static_cast<const float*>(weight);
  const float* x = static_cast<const float*>(panel);
  const int vectors = (count + Simd::kLanes - 1) / Simd::kLanes;
  if (vectors == 1) {
    multiply_vectors<W, 1>(w, panels, x, steps, accumulate, acc);
  } else if (kPanelVectors == 3 && vectors == 2) {
    multiply_vectors<W, 2>(w, panels, x, steps, accumulate, acc);
  } else {
    multiply_vectors<W, kPanelVectors>(w, panels, x, steps, accumulate, acc);
  }
}
