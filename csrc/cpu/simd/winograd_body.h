// Winograd convolution on 8x8 tiles, points 0, 1, -1, 2, -2, 1/2, -1/2 and infinity (spec.md 5.8):
//
//   out = A^T [ (G k G^T) . (B^T d B) ] A     d: 8x8 pixels, k: r x r, out: m x m, m + r = 9
//
// B does not depend on r: 5x5 kernels give 4x4 outputs and 3x3 kernels 6x6 outputs of the same
// transformed tile. Column j of A is (1, p_j, p_j^2, ...), row j of G is that over the product of
// (p_j - p_l), row j of B^T holds the coefficients of the product of (x - p_l), l != j; for
// infinity the highest power, and the product over all points. Row 0 has the other sign in G and B.
// Included inside the namespace of an instruction-set file, after slab_products_body.h.

constexpr int kTile = 8;
constexpr int kPositions = kTile * kTile;

// a * factor + b
CIEMA_INLINE Floats times(Floats a, float factor, Floats b) {
  return Simd::fma(a, Simd::set(factor), b);
}

// One line of 8 points into its transform.
CIEMA_INLINE void input_line(const Floats (&d)[kTile], Floats (&t)[kTile]) {
  t[0] = times(Simd::sub(d[4], d[2]), 5.25f, Simd::sub(d[0], d[6]));
  t[7] = times(Simd::sub(d[3], d[5]), 5.25f, Simd::sub(d[7], d[1]));
  Floats even = times(d[4], -4.25f, Simd::add(d[2], d[6]));
  Floats odd = times(d[3], -4.25f, Simd::add(d[1], d[5]));
  t[1] = Simd::add(even, odd);
  t[2] = Simd::sub(even, odd);
  even = times(d[4], -1.25f, times(d[2], 0.25f, d[6]));
  const Floats middle = Simd::mul(d[3], Simd::set(-2.5f));
  odd = times(d[5], 2.0f, times(d[1], 0.5f, middle));
  t[3] = Simd::add(even, odd);
  t[4] = Simd::sub(even, odd);
  even = times(times(d[4], -1.25f, d[2]), 4.0f, d[6]);
  odd = times(d[5], 0.5f, times(d[1], 2.0f, middle));
  t[5] = Simd::add(even, odd);
  t[6] = Simd::sub(even, odd);
}

template <int kOutputs>
CIEMA_INLINE void output_line(const Floats (&t)[kTile], Floats (&y)[kOutputs]) {
  const Floats sum1 = Simd::add(t[1], t[2]), difference1 = Simd::sub(t[1], t[2]);
  const Floats sum2 = Simd::add(t[3], t[4]), difference2 = Simd::sub(t[3], t[4]);
  const Floats sum3 = Simd::add(t[5], t[6]), difference3 = Simd::sub(t[5], t[6]);
  y[0] = Simd::add(Simd::add(t[0], sum1), Simd::add(sum2, sum3));
#pragma GCC unroll 6
  for (int i = 1; i < kOutputs; ++i) {
    const Floats two = Simd::set(static_cast<float>(1 << i));
    const Floats half = Simd::set(1.0f / static_cast<float>(1 << i));
    y[i] = i % 2 == 0 ? Simd::fma(sum3, half, Simd::fma(sum2, two, sum1))
                      : Simd::fma(difference3, half, Simd::fma(difference2, two, difference1));
  }
  y[kOutputs - 1] = Simd::add(y[kOutputs - 1], t[7]);
}

// B^T d B of one vector of channels; strides in floats.
inline void input_transform(const float* d, int64_t stride_y, int64_t stride_x, float* out,
                            int64_t stride_position) {
  Floats rows[kTile][kTile];  // [position along y][x]
  for (int x = 0; x < kTile; ++x) {
    Floats line[kTile], t[kTile];
#pragma GCC unroll 8
    for (int y = 0; y < kTile; ++y) line[y] = Simd::load(d + y * stride_y + x * stride_x);
    input_line(line, t);
#pragma GCC unroll 8
    for (int y = 0; y < kTile; ++y) rows[y][x] = t[y];
  }
  for (int y = 0; y < kTile; ++y) {
    Floats t[kTile];
    input_line(rows[y], t);
#pragma GCC unroll 8
    for (int x = 0; x < kTile; ++x) Simd::store(out + (y * kTile + x) * stride_position, t[x]);
  }
}

// A^T t A of one vector of channels: out[y][x].
template <int kOutputs>
inline void output_transform(const float* t, int64_t stride_position,
                             Floats (&out)[kOutputs][kOutputs]) {
  Floats columns[kOutputs][kTile];
  for (int x = 0; x < kTile; ++x) {
    Floats line[kTile], y[kOutputs];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) line[i] = Simd::load(t + (i * kTile + x) * stride_position);
    output_line<kOutputs>(line, y);
#pragma GCC unroll 6
    for (int i = 0; i < kOutputs; ++i) columns[i][x] = y[i];
  }
  for (int i = 0; i < kOutputs; ++i) output_line<kOutputs>(columns[i], out[i]);
}

// G of an r-tap kernel: (8, r), r = 3 or 5.
inline void kernel_points(int r, double (&g)[kTile][5]) {
  const double point[kTile - 1] = {0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5};
  for (int j = 0; j < kTile - 1; ++j) {
    double norm = j == 0 ? -1.0 : 1.0;
    for (int l = 0; l < kTile - 1; ++l) norm *= l == j ? 1.0 : point[j] - point[l];
    double power = 1.0;
    for (int k = 0; k < r; ++k, power *= point[j]) g[j][k] = power / norm;
  }
  for (int k = 0; k < r; ++k) g[kTile - 1][k] = k == r - 1 ? 1.0 : 0.0;
}

// G k G^T of kKernels kernels (size x size), framed with zeros to r x r, in float64.
constexpr int kKernels = 8;
constexpr int kMostTaps = 25;

inline void kernel_transform(const double (&kernels)[kMostTaps][kKernels], int size, int r,
                             double (&out)[kPositions][kKernels]) {
  double g[kTile][5], rows[kTile][5][kKernels];
  kernel_points(r, g);
  const int frame = (r - size) / 2;
  memset(rows, 0, sizeof(rows));
  memset(out, 0, sizeof(out));
  for (int j = 0; j < kTile; ++j) {
    for (int tap = 0; tap < size * size; ++tap) {
      const double factor = g[j][tap / size + frame];
      for (int k = 0; k < kKernels; ++k) rows[j][tap % size][k] += factor * kernels[tap][k];
    }
  }
  for (int p = 0; p < kPositions; ++p) {
    for (int x = 0; x < size; ++x) {
      const double factor = g[p % kTile][x + frame];
      for (int k = 0; k < kKernels; ++k) out[p][k] += factor * rows[p / kTile][x][k];
    }
  }
}
