// A slab of coordinate attention (spec.md 2.2) on one core:
//
//   p_h = mean_W e, p_w = mean_H e   alpha = sigmoid(K p + b)   u = e alpha_h alpha_w
//   mean, rstd of u over H*W, of every channel
//
// The slab is copied once, pixel-major (slab_frame_body.h), and stays in the core's cache for the
// three passes: pools, mean of u, variance of u about that mean. Sums are float32, a row's sum
// first and then the sum of the rows' (the pools: of pixels).
// Included inside the namespace of an instruction-set file, after slab_frame_body.h.

// Gates and statistics, pixel-major: what normalise_map takes.
struct Gates {
  float* rows;     // (H, cp)
  float* columns;  // (W, cp), behind the rows: both go through K at once
  float* mean;     // (cp)
  float* rstd;     // (cp)

  Gates(const Frame& f, float* base)
      : rows(base),
        columns(rows + f.height * f.cp),
        mean(columns + f.width * f.cp),
        rstd(mean + f.cp) {}
  static int64_t size(const Frame& f) { return (f.height + f.width + 2) * f.cp; }
};

inline int64_t packed_gate_size(int64_t channels) {
  return channels * padded(channels) + padded(channels);
}

inline void pack_gate(const float* weight, const float* bias, int64_t c, float* packed) {
  memset(packed, 0, static_cast<size_t>(packed_gate_size(c)) * sizeof(float));
  for (int64_t o = 0; o < c; ++o) {
    const PackedColumn column(c, padded(c) / kLanes, o);
    for (int64_t i = 0; i < c; ++i) packed[column.start + i * column.step] = weight[o * c + i];
  }
  memcpy(packed + c * padded(c), bias, static_cast<size_t>(c) * sizeof(float));
}

inline void pool(const Frame& f, const float* map, const Gates& pooled) {
  const Floats per_row = Simd::set(1.0f / static_cast<float>(f.width));
  const Floats per_column = Simd::set(1.0f / static_cast<float>(f.height));
  for (int64_t c = 0; c < f.cp; c += kLanes) {
    for (int64_t x = 0; x < f.width; ++x) Simd::store(pooled.columns + x * f.cp + c, Simd::zero());
    for (int64_t y = 0; y < f.height; ++y) {
      const float* pixel = map + f.at(y, 0) + c;
      float* column = pooled.columns + c;
      Floats sum = Simd::zero();
      for (int64_t x = 0; x < f.width; ++x, pixel += f.cp, column += f.cp) {
        const Floats value = Simd::load(pixel);
        sum = Simd::add(sum, value);
        Simd::store(column, Simd::add(Simd::load(column), value));
      }
      Simd::store(pooled.rows + y * f.cp + c, Simd::mul(sum, per_row));
    }
    for (int64_t x = 0; x < f.width; ++x) {
      float* column = pooled.columns + x * f.cp + c;
      Simd::store(column, Simd::mul(Simd::load(column), per_column));
    }
  }
}

struct StoreSigmoid {
  float* out;
  int64_t stride;
  const float* bias;

  template <int M, int N>
  CIEMA_INLINE void operator()(const Floats (&sum)[M][N], int64_t row, int64_t vector) const {
    for (int n = 0; n < N; ++n) {
      const Floats added = Simd::load(bias + (vector + n) * kLanes);
      for (int m = 0; m < M; ++m) {
        Simd::store(out + (row + m) * stride + (vector + n) * kLanes,
                    sigmoid(Simd::add(sum[m][n], added)));
      }
    }
  }
};

// u = e alpha_h alpha_w, rounded as the reference rounds it: a single pixel's u - mean is zero.
CIEMA_INLINE Floats gated(Floats e, Floats row, Floats column) {
  return Simd::mul(Simd::mul(e, row), column);
}

// Sum over the map of u, or of (u - mean)^2; one vector of channels.
template <bool kCentred>
inline Floats sum_of_u(const Frame& f, const float* map, const Gates& gates, int64_t c,
                       Floats mean) {
  Floats total = Simd::zero();
  for (int64_t y = 0; y < f.height; ++y) {
    const Floats row = Simd::load(gates.rows + y * f.cp + c);
    const float* pixel = map + f.at(y, 0) + c;
    const float* column = gates.columns + c;
    Floats sums[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
    int64_t x = 0;
    for (; x + 4 <= f.width; x += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Floats u = gated(Simd::load(pixel + (x + i) * f.cp), row,
                               Simd::load(column + (x + i) * f.cp));
        const Floats off = Simd::sub(u, mean);
        sums[i] = kCentred ? Simd::fma(off, off, sums[i]) : Simd::add(sums[i], u);
      }
    }
    for (; x < f.width; ++x) {
      const Floats u = gated(Simd::load(pixel + x * f.cp), row, Simd::load(column + x * f.cp));
      const Floats off = Simd::sub(u, mean);
      sums[0] = kCentred ? Simd::fma(off, off, sums[0]) : Simd::add(sums[0], u);
    }
    total = Simd::add(total, Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
  }
  return total;
}

// Gates and statistics of a packed map. pooled: scratch of Gates::size.
inline void coordinate_gates(const Frame& f, const float* map, const float* packed, double eps,
                             const Gates& pooled, const Gates& gates) {
  pool(f, map, pooled);
  product({pooled.rows, f.cp, kOneTap, f.c}, f.height + f.width, packed, f.cp / kLanes,
          StoreSigmoid{gates.rows, f.cp, packed + f.c * f.cp});
  const Floats share = Simd::set(1.0f / static_cast<float>(f.height * f.width));
  for (int64_t c = 0; c < f.cp; c += kLanes) {
    const Floats sum = sum_of_u<false>(f, map, gates, c, Simd::zero());
    const Floats mean = Simd::mul(sum, share);
    const Floats variance = Simd::mul(sum_of_u<true>(f, map, gates, c, mean), share);
    Simd::store(gates.mean + c, mean);
    Simd::store(gates.rstd + c, variance);
  }
  for (int64_t c = 0; c < f.cp; ++c) {
    gates.rstd[c] = static_cast<float>(1.0 / sqrt(static_cast<double>(gates.rstd[c]) + eps));
  }
}

// (count, cp) into (c, count)
inline void to_channel_major(const Frame& f, const float* from, int64_t count, float* to) {
  for (int64_t c = 0; c < f.c; ++c) {
    for (int64_t i = 0; i < count; ++i) to[c * count + i] = from[i * f.cp + c];
  }
}

// Gates and statistics as the ops pass them, (c, H), (c, W) and (c), pixel-major.
inline void load_gates(const float* alpha_h, const float* alpha_w, const float* mean,
                       const float* rstd, const Frame& f, const Gates& gates) {
  memset(gates.rows, 0, static_cast<size_t>(Gates::size(f)) * sizeof(float));
  for (int64_t c = 0; c < f.c; ++c) {
    for (int64_t y = 0; y < f.height; ++y) gates.rows[y * f.cp + c] = alpha_h[c * f.height + y];
    for (int64_t x = 0; x < f.width; ++x) gates.columns[x * f.cp + c] = alpha_w[c * f.width + x];
    gates.mean[c] = mean[c];
    gates.rstd[c] = rstd[c];
  }
}

// x1 = GN(e alpha_h alpha_w), maybe in place. gn_weight and gn_bias are zero in the padding.
inline void normalise_map(const Gates& gates, const float* gn_weight, const float* gn_bias,
                          const Frame& f, const float* e, float* x1) {
  for (int64_t c = 0; c < f.cp; c += kLanes) {
    const Floats slope = Simd::mul(Simd::load(gates.rstd + c), Simd::load(gn_weight + c));
    const Floats start = Simd::sub(Simd::load(gn_bias + c),
                                   Simd::mul(Simd::load(gates.mean + c), slope));
    for (int64_t y = 0; y < f.height; ++y) {
      const Floats row = Simd::mul(Simd::load(gates.rows + y * f.cp + c), slope);
      const float* column = gates.columns + c;
      const int64_t first = f.at(y, 0) + c;
      for (int64_t x = 0; x < f.width; ++x, column += f.cp) {
        const int64_t pixel = first + x * f.cp;
        const Floats gate = Simd::mul(row, Simd::load(column));
        Simd::store(x1 + pixel, Simd::fma(Simd::load(e + pixel), gate, start));
      }
    }
  }
}
