// Convolutions of a slab's maps tap by tap, for small and narrow maps and few channels.
// Included inside the namespace of an instruction-set file, after slab_tiles_body.h.

struct StoreBiased {
  float* out;
  int64_t stride;
  const float* bias;

  template <int M, int N>
  CIEMA_INLINE void operator()(const Floats (&sum)[M][N], int64_t row, int64_t vector) const {
    float* at = out + row * stride + vector * kLanes;
    for (int n = 0; n < N; ++n) {
      const Floats added = Simd::load(bias + (vector + n) * kLanes);
      for (int m = 0; m < M; ++m) {
        Simd::store(at + m * stride + n * kLanes, Simd::add(sum[m][n], added));
      }
    }
  }
};

// The taps of a size x size kernel that can meet the map from row y: those wholly in the frame of
// zeros are left out, which makes narrow maps cheap.
inline Taps direct_taps(const Frame& f, int64_t size, int64_t y, Tap (&taps)[25]) {
  int64_t count = 0;
  const int64_t half = size / 2;
  for (int64_t i = 0; i < size * size; ++i) {
    const int64_t dy = i / size - half, dx = i % size - half;
    const bool meets = y + dy >= 0 && y + dy < f.height && dx < f.width && -dx < f.width;
    if (meets) taps[count++] = {dy * f.row() + dx * f.cp, i};
  }
  return {taps, count, size * size};
}

inline void conv3x3_direct(const Frame& f, const float* from, const float* weights,
                           const float* bias, float* to) {
  for (int64_t y = 0; y < f.height; ++y) {
    Tap taps[25];
    const Operand left = {from + f.at(y, 0), f.cp, direct_taps(f, 3, y, taps), f.c};
    product(left, f.width, weights, f.cp / kLanes, StoreBiased{to + f.at(y, 0), f.cp, bias});
  }
}

// f3, f5 and X of pixels [first, first + count).
inline void feature_pixels(const Frame& f, const float* map, const float* weights3,
                           const float* weights5, int64_t first, int64_t count,
                           const Rows<float>& rows) {
  for (int64_t done = 0; done < count;) {
    const int64_t y = (first + done) / f.width, x = (first + done) % f.width;
    const int64_t run = smaller(f.width - x, count - done);
    const float* from = map + f.at(y, x);
    float* to = rows.f + done * rows.stride_f;
    Tap taps[25];
    product({from, f.cp, direct_taps(f, 3, y, taps), f.c}, run, weights3, f.cp / kLanes,
            Store{to + f.cp, rows.stride_f});
    product({from, f.cp, direct_taps(f, 5, y, taps), f.c}, run, weights5, f.cp / kLanes,
            Store{to + 2 * f.cp, rows.stride_f});
    for (int64_t i = 0; i < run; ++i) {
      for (int64_t c = 0; c < f.cp; c += kLanes) {
        Simd::store(rows.x + (done + i) * rows.stride_x + c, Simd::load(from + i * f.cp + c));
      }
    }
    done += run;
  }
}
