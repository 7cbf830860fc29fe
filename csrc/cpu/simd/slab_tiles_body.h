// Convolutions of a slab's maps that are done by tiles of 8x8 pixels (winograd_body.h).
// Included inside the namespace of an instruction-set file, after slab_frame_body.h.

constexpr int64_t kChunkTiles = 12;  // what is between two transforms stays in the L2 cache
constexpr int64_t kTilePixels = kOutputs5 * kOutputs5;
constexpr int64_t kChunkPixels = kChunkTiles * kTilePixels;

// Scratch for a chunk of tiles: (64, kChunkTiles, floats a tile) in and out of the products, with
// an odd number of cache lines from position to position.
struct Tiles {
  int64_t stride_in, stride_out;
  float *in, *out;

  Tiles(int64_t floats_in, int64_t floats_out)
      : stride_in(kChunkTiles * floats_in + 16),
        stride_out(kChunkTiles * floats_out + 16),
        in(nullptr),
        out(nullptr) {}
  int64_t size_in() const { return kPositions * stride_in; }
  int64_t size_out() const { return kPositions * stride_out; }
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How a map is cut: tiles of step x step outputs whose inputs begin `border` pixels before them.
struct Cut {
  int64_t across, count, step, border;
};

inline Cut cut5(const Frame& f) { return {f.tiles_x, f.tiles_y * f.tiles_x, kOutputs5, kBorder}; }
inline Cut cut3(const Frame& f) { return {f.large_x, f.large_y * f.large_x, kOutputs3, 1}; }

// Transforms tiles [first, first + count) of a framed map into tiles.in.
inline void transform_tiles(const Frame& f, const Tiles& tiles, const float* map, const Cut& cut,
                            int64_t first, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t y = (first + t) / cut.across * cut.step;
    const int64_t x = (first + t) % cut.across * cut.step;
    const float* from = map + f.at(y - cut.border, x - cut.border);
    for (int64_t c = 0; c < f.cp; c += kLanes) {
      input_transform(from + c, f.row(), f.cp, tiles.in + t * f.cp + c, tiles.stride_in);
    }
  }
}

// tiles.out = tiles.in * weights at every position; stride: floats of a tile in tiles.in.
inline void multiply_tiles(const Tiles& tiles, int64_t stride, const Taps& taps, int64_t depth,
                           int64_t count, const float* weights, int64_t vectors) {
  for (int64_t p = 0; p < kPositions; ++p) {
    product({tiles.in + p * tiles.stride_in, stride, taps, depth}, count,
            weights + p * taps.packed * depth * vectors * kLanes, vectors,
            Store{tiles.out + p * tiles.stride_out, vectors * kLanes});
  }
}

// to = bias + 3x3 convolution of from, both framed maps.
inline void conv3x3_tiles(const Frame& f, const Tiles& tiles, const float* from,
                          const float* weights, const float* bias, float* to) {
  const Cut cut = cut3(f);
  for (int64_t first = 0; first < cut.count; first += kChunkTiles) {
    const int64_t count = smaller(cut.count - first, kChunkTiles);
    transform_tiles(f, tiles, from, cut, first, count);
    multiply_tiles(tiles, f.cp, kOneTap, f.c, count, weights, f.cp / kLanes);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t y0 = (first + t) / cut.across * kOutputs3;
      const int64_t x0 = (first + t) % cut.across * kOutputs3;
      const int64_t ys = smaller(f.height - y0, kOutputs3), xs = smaller(f.width - x0, kOutputs3);
      for (int64_t c = 0; c < f.cp; c += kLanes) {
        Floats out[kOutputs3][kOutputs3];
        output_transform<kOutputs3>(tiles.out + t * f.cp + c, tiles.stride_out, out);
        const Floats added = Simd::load(bias + c);
        for (int64_t y = 0; y < ys; ++y) {
          float* at = to + f.at(y0 + y, x0) + c;
          for (int64_t x = 0; x < xs; ++x) Simd::store(at + x * f.cp, Simd::add(out[y][x], added));
        }
      }
    }
  }
}

// Rows of a chunk's pixels: f = [f1; f3; f5] and X, of which other things may lie between.
template <class T>
struct Rows {
  T* f;
  float* x;
  int64_t stride_f, stride_x;
};

// f3, f5 and X of tiles [first, first + count); zeros where a tile leaves the map.
template <class T>
inline void feature_tiles(const Frame& f, const Tiles& tiles, const float* map,
                          const float* weights, int64_t first, int64_t count,
                          const Rows<T>& rows) {
  const Cut cut = cut5(f);
  transform_tiles(f, tiles, map, cut, first, count);
  multiply_tiles(tiles, f.cp, kOneTap, f.c, count, weights, 2 * f.cp / kLanes);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t y0 = (first + t) / cut.across * kOutputs5;
    const int64_t x0 = (first + t) % cut.across * kOutputs5;
    for (int64_t c = 0; c < 2 * f.cp; c += kLanes) {
      Floats out[kOutputs5][kOutputs5];
      output_transform<kOutputs5>(tiles.out + t * 2 * f.cp + c, tiles.stride_out, out);
      T* to = rows.f + t * kTilePixels * rows.stride_f + f.cp + c;
      for (int64_t y = 0; y < kOutputs5; ++y) {
        for (int64_t x = 0; x < kOutputs5; ++x) {
          const bool inside = y0 + y < f.height && x0 + x < f.width;
          put(to + (y * kOutputs5 + x) * rows.stride_f, inside ? out[y][x] : Simd::zero());
        }
      }
    }
    for (int64_t i = 0; i < kTilePixels; ++i) {
      const float* from = map + f.at(y0 + i / kOutputs5, x0 + i % kOutputs5);
      float* to = rows.x + (t * kTilePixels + i) * rows.stride_x;
      for (int64_t c = 0; c < f.cp; c += kLanes) Simd::store(to + c, Simd::load(from + c));
    }
  }
}
