// A slab's maps in a core's cache: pixel-major, channels padded to whole vectors, framed with zeros
// so that no tile or tap asks where the map ends. Interiors are overwritten by each slab, frames
// and padding stay zero.
// Included inside the namespace of an instruction-set file, after winograd_body.h.

constexpr int64_t kBorder = 2;         // pixels before the map: half of a 5x5 kernel
constexpr int64_t kOutputs5 = 4;       // outputs along a tile of the 5x5 (and 3x3) convolution
constexpr int64_t kOutputs3 = 6;       // outputs along a tile of a 3x3 convolution alone

struct Frame {
  int64_t c, cp, height, width;      // of the map; cp: padded channels
  int64_t tiles_y, tiles_x;          // of 4x4 outputs
  int64_t large_y, large_x;          // of 6x6 outputs
  int64_t frame_height, frame_width;

  static int64_t reach(int64_t tiles, int64_t large) {
    const int64_t small = tiles * kOutputs5 + 2, wide = large * kOutputs3 + 1;
    return kBorder + (small > wide ? small : wide);
  }
  Frame(int64_t channels, int64_t h, int64_t w)
      : c(channels),
        cp(padded(channels)),
        height(h),
        width(w),
        tiles_y((h + kOutputs5 - 1) / kOutputs5),
        tiles_x((w + kOutputs5 - 1) / kOutputs5),
        large_y((h + kOutputs3 - 1) / kOutputs3),
        large_x((w + kOutputs3 - 1) / kOutputs3),
        frame_height(reach(tiles_y, large_y)),
        frame_width(reach(tiles_x, large_x)) {}

  int64_t size() const { return frame_height * frame_width * cp; }
  int64_t row() const { return frame_width * cp; }
  // Offset of pixel (y, x) of the map; -2 <= y, x.
  int64_t at(int64_t y, int64_t x) const { return (y + kBorder) * row() + (x + kBorder) * cp; }
};

// Planes of neighbouring pixels: blocks of lanes x lanes are transposed.
template <class T>
inline void pack_planes(const T* e, int64_t stride_c, int64_t stride_h, const Frame& f,
                        float* out) {
  for (int64_t y = 0; y < f.height; ++y) {
    for (int64_t x = 0; x < f.width; x += kLanes) {
      const int pixels = static_cast<int>(f.width - x < kLanes ? f.width - x : kLanes);
      float* to = out + f.at(y, x);
      for (int64_t c = 0; c < f.c; c += kLanes) {
        Floats values[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const T* from = e + (c + i) * stride_c + y * stride_h + x;
          values[i] = c + i >= f.c        ? Simd::zero()
                      : pixels == kLanes ? Simd::load(from)
                                         : Simd::load(from, pixels);
        }
        Simd::transpose(values);
        for (int i = 0; i < pixels; ++i) Simd::store(to + i * f.cp + c, values[i]);
      }
    }
  }
}

// Pixels of neighbouring channels.
template <class T>
inline void pack_pixels(const T* e, int64_t stride_h, int64_t stride_w, const Frame& f,
                        float* out) {
  for (int64_t y = 0; y < f.height; ++y) {
    for (int64_t x = 0; x < f.width; ++x) {
      const T* from = e + y * stride_h + x * stride_w;
      float* to = out + f.at(y, x);
      int64_t c = 0;
      for (; c + kLanes <= f.c; c += kLanes) Simd::store(to + c, Simd::load(from + c));
      if (c < f.c) Simd::store(to + c, Simd::load(from + c, static_cast<int>(f.c - c)));
    }
  }
}

template <class T>
inline void pack_map(const SlabMap& slab, const Frame& f, float* out) {
  const T* e = static_cast<const T*>(slab.e);
  if (slab.stride_w == 1) {
    pack_planes(e, slab.stride_c, slab.stride_h, f, out);
  } else {
    pack_pixels(e, slab.stride_h, slab.stride_w, f, out);
  }
}

template <class T>
inline void unpack_planes(const float* map, const Frame& f, int64_t stride_c, int64_t stride_h,
                          T* out) {
  for (int64_t y = 0; y < f.height; ++y) {
    for (int64_t x = 0; x < f.width; x += kLanes) {
      const int pixels = static_cast<int>(f.width - x < kLanes ? f.width - x : kLanes);
      const float* from = map + f.at(y, x);
      for (int64_t c = 0; c < f.c; c += kLanes) {
        Floats values[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          values[i] = i < pixels ? Simd::load(from + i * f.cp + c) : Simd::zero();
        }
        Simd::transpose(values);
        for (int i = 0; i < kLanes && c + i < f.c; ++i) {
          Simd::store(out + (c + i) * stride_c + y * stride_h + x, values[i], pixels);
        }
      }
    }
  }
}

template <class T>
inline void unpack_pixels(const float* map, const Frame& f, int64_t stride_h, int64_t stride_w,
                          T* out) {
  for (int64_t y = 0; y < f.height; ++y) {
    for (int64_t x = 0; x < f.width; ++x) {
      const float* from = map + f.at(y, x);
      T* to = out + y * stride_h + x * stride_w;
      int64_t c = 0;
      for (; c + kLanes <= f.c; c += kLanes) Simd::store(to + c, Simd::load(from + c));
      if (c < f.c) Simd::store(to + c, Simd::load(from + c), static_cast<int>(f.c - c));
    }
  }
}

// A framed map to where slab.e points.
template <class T>
inline void unpack_map(const float* map, const Frame& f, const SlabMap& slab) {
  T* out = static_cast<T*>(const_cast<void*>(slab.e));
  if (slab.stride_w == 1) {
    unpack_planes(map, f, slab.stride_c, slab.stride_h, out);
  } else {
    unpack_pixels(map, f, slab.stride_h, slab.stride_w, out);
  }
}

inline void unpack_map(const float* map, const Frame& f, const SlabMap& slab) {
  switch (slab.element) {
    case Element::kFloat:
      unpack_map<float>(map, f, slab);
      break;
    case Element::kBFloat16:
      unpack_map<BFloat16>(map, f, slab);
      break;
    case Element::kHalf:
      unpack_map<Half>(map, f, slab);
      break;
  }
}

inline void pack_map(const SlabMap& slab, const Frame& f, float* out) {
  switch (slab.element) {
    case Element::kFloat:
      pack_map<float>(slab, f, out);
      break;
    case Element::kBFloat16:
      pack_map<BFloat16>(slab, f, out);
      break;
    case Element::kHalf:
      pack_map<Half>(slab, f, out);
      break;
  }
}
