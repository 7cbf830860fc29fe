// Products of pixel-major maps with packed weights: out[row][n] = sum over taps and k of
// a[row * stride + offset[tap] + k] * b[tap][k][n]. One tap is a plain product, several are a
// direct convolution or a product over sections of a row. Sums in float32, in the order of (tap,
// k). Operands are words of 4 bytes: a float, or two bfloat16 of neighbouring k.
// Included inside the namespace of an instruction-set file, after `struct Simd`.

#ifdef __GNUC__
#define CIEMA_INLINE inline __attribute__((always_inline))
#else
#define CIEMA_INLINE inline
#endif

// Asks for the cache line of an address, which need not be readable.
inline void prefetch([[maybe_unused]] const void* address) {
#ifdef __GNUC__
  __builtin_prefetch(address);
#endif
}

using Floats = Simd::Floats;
constexpr int kLanes = Simd::kLanes;

struct FloatWords {
  using Vector = Floats;
  static Vector load(const float* word) { return Simd::load(word); }
  static Vector spread(const float* word) { return Simd::set(*word); }
  static Floats multiply_add(Vector a, Vector b, Floats sum) { return Simd::fma(a, b, sum); }
};

constexpr int64_t rounded_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
constexpr int64_t padded(int64_t channels) { return rounded_up(channels, kLanes); }

// Weights are cut into panels of up to kWidestPanel vectors of columns, as even as they come:
// (panel, tap, k, column). A block of rows and one panel fill the registers with sums.
constexpr int kWidestPanel = kLanes == 16 ? 4 : 3;
constexpr int kMostRows = 12;

constexpr int rows_at_once(int panel) {
  if (kLanes == 16) return panel == 4 ? 6 : panel == 3 ? 8 : 12;
  return panel == 3 ? 4 : panel == 2 ? 6 : 8;
}

struct Panels {
  int64_t count, narrow, wide;  // `wide` panels have one vector more than `narrow`

  explicit Panels(int64_t vectors)
      : count((vectors + kWidestPanel - 1) / kWidestPanel),
        narrow(vectors / count),
        wide(vectors % count) {}
  int64_t first(int64_t panel) const {
    return panel * narrow + (panel < wide ? panel : wide);
  }
  int64_t width(int64_t panel) const { return narrow + (panel < wide ? 1 : 0); }
};

// Column `column` of a packed `rows` x `vectors` matrix: row r is at start + r * step. Rows count
// taps and k.
struct PackedColumn {
  int64_t start, step;

  PackedColumn(int64_t rows, int64_t vectors, int64_t column) {
    const Panels panels(vectors);
    int64_t panel = 0;
    while (column >= (panels.first(panel) + panels.width(panel)) * kLanes) ++panel;
    const int64_t first = panels.first(panel) * kLanes;
    step = panels.width(panel) * kLanes;
    start = first * rows + column - first;
  }
};

struct Tap {
  int64_t offset;  // into a, from the row's start
  int64_t weight;  // which of b's taps
};

struct Taps {
  const Tap* tap;
  int64_t count;
  int64_t packed;  // taps that b holds; a tap that reads only zeros may be left out
};

struct Operand {
  const float* a;  // words
  int64_t stride;  // from row to row, in words
  Taps taps;
  int64_t depth;  // words of each tap
};

template <class Words, int M, int N>
CIEMA_INLINE void accumulate(const float* a, int64_t stride, const float* b, int64_t depth,
                             Floats (&sum)[M][N]) {
  for (int64_t k = 0; k < depth; ++k) {
    typename Words::Vector column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = Words::load(b + (k * N + n) * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const auto left = Words::spread(a + m * stride + k);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] = Words::multiply_add(left, column[n], sum[m][n]);
    }
  }
}

template <class Words, int M, int N, class Finish>
inline void block(const Operand& left, const float* b, int64_t row, int64_t vector,
                  const Finish& finish) {
  Floats sum[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[m][n] = Simd::zero();
  }
  const float* a = left.a + row * left.stride;
  for (int64_t i = 0; i < left.taps.count; ++i) {
    const Tap tap = left.taps.tap[i];
    accumulate<Words>(a + tap.offset, left.stride, b + tap.weight * left.depth * N * kLanes,
                      left.depth, sum);
  }
  finish(sum, row, vector);
}

template <class Words, int N, class Finish>
inline void panel_product(const Operand& left, int64_t rows, const float* b, int64_t vector,
                          const Finish& finish) {
  constexpr int M = rows_at_once(N);
  int64_t row = 0;
  for (; row + M <= rows; row += M) block<Words, M, N>(left, b, row, vector, finish);
  for (; row + 4 <= rows; row += 4) block<Words, 4, N>(left, b, row, vector, finish);
  for (; row + 2 <= rows; row += 2) block<Words, 2, N>(left, b, row, vector, finish);
  if (row < rows) block<Words, 1, N>(left, b, row, vector, finish);
}

// finish(sums[M][N], first row, first vector of columns) takes each block of results.
template <class Words = FloatWords, class Finish>
inline void product(const Operand& left, int64_t rows, const float* b, int64_t vectors,
                    const Finish& finish) {
  const Panels panels(vectors);
  const int64_t depth = left.taps.packed * left.depth;
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t vector = panels.first(p);
    const float* weights = b + vector * kLanes * depth;
    switch (panels.width(p)) {
      case 1:
        panel_product<Words, 1>(left, rows, weights, vector, finish);
        break;
      case 2:
        panel_product<Words, 2>(left, rows, weights, vector, finish);
        break;
      case 3:
        panel_product<Words, 3>(left, rows, weights, vector, finish);
        break;
      default:
        panel_product<Words, kWidestPanel>(left, rows, weights, vector, finish);
    }
  }
}

constexpr Tap kNoOffset[1] = {{0, 0}};
constexpr Taps kOneTap = {kNoOffset, 1, 1};

inline void put(float* out, Floats value) { Simd::store(out, value); }

// Writes sums as T, for which there is a `put`.
template <class T>
struct Store {
  T* out;
  int64_t stride;

  template <int M, int N>
  CIEMA_INLINE void operator()(const Floats (&sum)[M][N], int64_t row, int64_t vector) const {
    T* at = out + row * stride + vector * kLanes;
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) put(at + m * stride + n * kLanes, sum[m][n]);
    }
  }
};
template <class T>
Store(T*, int64_t) -> Store<T>;
