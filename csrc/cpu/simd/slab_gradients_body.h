// Gradients of products and of tiled convolutions for their weights. Operands are words of 4 bytes:
// a float of a pixel, or two bfloat16 of neighbouring pixels.
// Included inside the namespace of an instruction-set file, after slab_tiles_body.h.

template <class Words, int M, int N>
inline void outer_block(const float* a, int64_t stride_a, const float* b, int64_t stride_b,
                        int64_t count, float* out, int64_t stride_out) {
  Floats sum[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[m][n] = Simd::load(out + m * stride_out + n * kLanes);
  }
  for (int64_t k = 0; k < count; ++k) {
    typename Words::Vector column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = Words::load(b + k * stride_b + n * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const auto left = Words::spread(a + k * stride_a + m);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] = Words::multiply_add(left, column[n], sum[m][n]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) Simd::store(out + m * stride_out + n * kLanes, sum[m][n]);
  }
}

template <class Words, int N>
inline void outer_panel(const float* a, int64_t stride_a, int64_t rows, const float* b,
                        int64_t stride_b, int64_t count, float* out, int64_t stride_out) {
  constexpr int M = rows_at_once(N);
  int64_t m = 0;
  for (; m + M <= rows; m += M) {
    outer_block<Words, M, N>(a + m, stride_a, b, stride_b, count, out + m * stride_out, stride_out);
  }
  for (; m + 4 <= rows; m += 4) {
    outer_block<Words, 4, N>(a + m, stride_a, b, stride_b, count, out + m * stride_out, stride_out);
  }
  for (; m + 2 <= rows; m += 2) {
    outer_block<Words, 2, N>(a + m, stride_a, b, stride_b, count, out + m * stride_out, stride_out);
  }
  if (m < rows) {
    outer_block<Words, 1, N>(a + m, stride_a, b, stride_b, count, out + m * stride_out, stride_out);
  }
}

// Rows of words along the pixels: a row for each pixel, or for two.
struct PixelWords {
  const float* at;
  int64_t stride;
};

// out[m][n] += sum over k < count of a[k][m] b[k][n]; m < rows, n < vectors * lanes.
template <class Words = FloatWords>
inline void add_outer(const float* a, int64_t stride_a, int64_t rows, const float* b,
                      int64_t stride_b, int64_t vectors, int64_t count, float* out,
                      int64_t stride_out) {
  const Panels panels(vectors);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = panels.first(p) * kLanes;
    const float* columns = b + first;
    float* to = out + first;
    switch (panels.width(p)) {
      case 1:
        outer_panel<Words, 1>(a, stride_a, rows, columns, stride_b, count, to, stride_out);
        break;
      case 2:
        outer_panel<Words, 2>(a, stride_a, rows, columns, stride_b, count, to, stride_out);
        break;
      case 3:
        outer_panel<Words, 3>(a, stride_a, rows, columns, stride_b, count, to, stride_out);
        break;
      default:
        outer_panel<Words, kWidestPanel>(a, stride_a, rows, columns, stride_b, count, to,
                                         stride_out);
    }
  }
}

// A convolution's weight gradient is the convolution of its input with the gradient g of its
// output. On a tile g (R x R) is the kernel and the weights' r x r are the outputs, r + R = 9: the
// same transform of the input serves, and the way back is done once, after the sum over all tiles.
template <int R>
CIEMA_INLINE void gradient_line(const Floats (&g)[R], Floats (&t)[kTile]) {
  Floats even1 = g[0], odd1 = g[1], even2 = g[0], odd2 = Simd::mul(g[1], Simd::set(2.0f));
  Floats even3 = g[0], odd3 = Simd::mul(g[1], Simd::set(0.5f));
#pragma GCC unroll 6
  for (int i = 2; i < R; ++i) {
    const float two = static_cast<float>(1 << i), half = 1.0f / static_cast<float>(1 << i);
    if (i % 2 == 0) {
      even1 = Simd::add(even1, g[i]);
      even2 = times(g[i], two, even2);
      even3 = times(g[i], half, even3);
    } else {
      odd1 = Simd::add(odd1, g[i]);
      odd2 = times(g[i], two, odd2);
      odd3 = times(g[i], half, odd3);
    }
  }
  const Floats norm1 = Simd::set(-2.0f / 9.0f), norm2 = Simd::set(1.0f / 90.0f);
  const Floats norm3 = Simd::set(32.0f / 45.0f);
  t[0] = g[0];
  t[1] = Simd::mul(Simd::add(even1, odd1), norm1);
  t[2] = Simd::mul(Simd::sub(even1, odd1), norm1);
  t[3] = Simd::mul(Simd::add(even2, odd2), norm2);
  t[4] = Simd::mul(Simd::sub(even2, odd2), norm2);
  t[5] = Simd::mul(Simd::add(even3, odd3), norm3);
  t[6] = Simd::mul(Simd::sub(even3, odd3), norm3);
  t[7] = g[R - 1];
}

template <int R>
inline void gradient_transform(const float* g, int64_t stride_y, int64_t stride_x, float* out,
                               int64_t stride_position) {
  Floats rows[kTile][R];
  for (int x = 0; x < R; ++x) {
    Floats line[R], t[kTile];
#pragma GCC unroll 6
    for (int y = 0; y < R; ++y) line[y] = Simd::load(g + y * stride_y + x * stride_x);
    gradient_line<R>(line, t);
#pragma GCC unroll 8
    for (int y = 0; y < kTile; ++y) rows[y][x] = t[y];
  }
  for (int y = 0; y < kTile; ++y) {
    Floats t[kTile];
    gradient_line<R>(rows[y], t);
#pragma GCC unroll 8
    for (int x = 0; x < kTile; ++x) Simd::store(out + (y * kTile + x) * stride_position, t[x]);
  }
}

// sums (64, c, columns of g) += of tiles [first, first + count): map's transforms (already in
// tiles.in) with those of g, a framed map of `g` channels. R: outputs along a tile.
template <int R>
inline void add_weight_gradients(const Frame& f, const Frame& g_frame, const Tiles& tiles,
                                 const float* g, const Cut& cut, int64_t first, int64_t count,
                                 float* sums) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t y = (first + t) / cut.across * R, x = (first + t) % cut.across * R;
    const float* from = g + g_frame.at(y, x);
    for (int64_t c = 0; c < g_frame.cp; c += kLanes) {
      gradient_transform<R>(from + c, g_frame.row(), g_frame.cp, tiles.out + t * g_frame.cp + c,
                            tiles.stride_out);
    }
  }
  for (int64_t p = 0; p < kPositions; ++p) {
    add_outer(tiles.in + p * tiles.stride_in, f.cp, f.c, tiles.out + p * tiles.stride_out,
              g_frame.cp, g_frame.cp / kLanes, count, sums + p * f.c * g_frame.cp, g_frame.cp);
  }
}

// From the sums, `columns` wide, of which those from `column` on belong to this kernel: the
// gradient (c, c, size, size), a size x size piece out of the middle of r x r.
template <int r>
inline void finish_weight_gradient(const float* sums, int64_t c, int64_t columns, int64_t column,
                                   int size, float* out) {
  const int frame = (r - size) / 2;
  for (int64_t i = 0; i < c; ++i) {
    for (int64_t o = 0; o < c; o += kLanes) {
      Floats taps[r][r];
      output_transform<r>(sums + i * columns + column + o, c * columns, taps);
      const int64_t lanes = smaller(c - o, kLanes);
      for (int tap = 0; tap < size * size; ++tap) {
        float values[kLanes];
        Simd::store(values, taps[tap / size + frame][tap % size + frame]);
        for (int64_t l = 0; l < lanes; ++l) {
          out[((o + l) * c + i) * size * size + tap] = values[l];
        }
      }
    }
  }
}
