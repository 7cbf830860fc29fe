// A slab of coordinate attention (spec.md 2.2) on one core:
//
//   p_h = mean_W e, p_w = mean_H e   alpha = sigmoid(K p + b)   u = e alpha_h alpha_w
//   mean, rstd of u over H*W, of every channel
//
// The slab is copied once, pixel-major (slab_frame_body.h), and stays in the core's cache for the
// three passes: pools, a first mean of u, and what is left of mean and variance about that one: a
// float32 sum's error would be a shift, up to 316 times in a plane without spread. Sums are
// float32, a row's sum first and then the sum of the rows' (the pools: of pixels).
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

CIEMA_INLINE Floats sum_of(const Floats (&parts)[4]) {
  return Simd::add(Simd::add(parts[0], parts[1]), Simd::add(parts[2], parts[3]));
}

template <bool kSquares>
CIEMA_INLINE void add_off(Floats u, Floats start, Floats& sum, Floats& square) {
  const Floats off = Simd::sub(u, start);
  sum = Simd::add(sum, off);
  if (kSquares) square = Simd::fma(off, off, square);
}

struct Sums {
  Floats first, second;
};

// Sums over the map of u - start and, if asked for, of its square; one vector of channels.
template <bool kSquares>
inline Sums sums_of_u(const Frame& f, const float* map, const Gates& gates, int64_t c,
                      Floats start) {
  Sums total{Simd::zero(), Simd::zero()};
  for (int64_t y = 0; y < f.height; ++y) {
    const Floats row = Simd::load(gates.rows + y * f.cp + c);
    const float* pixel = map + f.at(y, 0) + c;
    const float* column = gates.columns + c;
    Floats sums[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
    Floats squares[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
    const int64_t end = f.width * f.cp, stride = 4 * f.cp;
    int64_t x = 0;
    for (; x + stride <= end; x += stride) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t at = x + i * f.cp;
        add_off<kSquares>(gated(Simd::load(pixel + at), row, Simd::load(column + at)), start,
                          sums[i], squares[i]);
      }
    }
    for (; x < end; x += f.cp) {
      add_off<kSquares>(gated(Simd::load(pixel + x), row, Simd::load(column + x)), start, sums[0],
                        squares[0]);
    }
    total.first = Simd::add(total.first, sum_of(sums));
    if (kSquares) total.second = Simd::add(total.second, sum_of(squares));
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
    const Floats start = Simd::mul(sums_of_u<false>(f, map, gates, c, Simd::zero()).first, share);
    const Sums left = sums_of_u<true>(f, map, gates, c, start);
    const Floats shift = Simd::mul(left.first, share);
    const Floats square = Simd::mul(left.second, share);
    // The operand order keeps NaN, as in `exponential`.
    const Floats variance = Simd::max(Simd::zero(), Simd::sub(square, Simd::mul(shift, shift)));
    Simd::store(gates.mean + c, Simd::add(start, shift));
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
    const Floats mean = Simd::load(gates.mean + c), bias = Simd::load(gn_bias + c);
    for (int64_t y = 0; y < f.height; ++y) {
      const Floats row = Simd::load(gates.rows + y * f.cp + c);
      const float* column = gates.columns + c;
      const int64_t first = f.at(y, 0) + c;
      for (int64_t x = 0; x < f.width; ++x, column += f.cp) {
        const int64_t pixel = first + x * f.cp;
        // u - mean first: a plane without spread must not be left with what rounding makes of it.
        const Floats u = gated(Simd::load(e + pixel), row, Simd::load(column));
        Simd::store(x1 + pixel, Simd::fma(Simd::sub(u, mean), slope, bias));
      }
    }
  }
}
