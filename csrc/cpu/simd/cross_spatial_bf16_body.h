// rows = sigmoid(Wa f + ba) f with Wa and f rounded to bfloat16 in the product; everything else as
// in cross_spatial_body.h. vdpbf16ps takes pairs of neighbouring k: weights lie (panel, k / 2,
// column, 2), k counts the padded channels of the three sections.
// Included inside the namespace of an instruction-set file.

#include "slab_products_body.h"
#include "attend_body.h"

using Pairs = __m512i;  // 16 pairs of bfloat16

inline int64_t pairs_of(int64_t channels) { return 3 * padded(channels) / 2; }

inline int64_t bf16_packed_size(int64_t channels) {
  return pairs_of(channels) * 3 * padded(channels);  // one pair takes a float's place
}

inline void bf16_pack(const float* matrix, int64_t c, void* packed) {
  const int64_t cp = padded(c), pairs = pairs_of(c);
  BFloat16* out = static_cast<BFloat16*>(packed);
  memset(out, 0, static_cast<size_t>(bf16_packed_size(c)) * sizeof(float));
  for (int64_t o = 0; o < 3 * c; ++o) {
    const PackedColumn column(pairs, 3 * cp / kLanes, o / c * cp + o % c);
    for (int64_t i = 0; i < 3 * c; ++i) {
      const int64_t k = i / c * cp + i % c;
      from_float(matrix[o * 3 * c + i], out + 2 * (column.start + k / 2 * column.step) + k % 2);
    }
  }
}

inline int64_t bf16_scratch_size(int64_t channels, int64_t pixels) {
  return pixels * pairs_of(channels);
}

template <int M, int N>
inline void bf16_block(const int32_t* a, int64_t stride, const float* b, int64_t pairs,
                       int64_t row, int64_t vector, const Attend& finish) {
  Floats sum[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[m][n] = Simd::zero();
  }
  a += row * stride;
  for (int64_t k = 0; k < pairs; ++k) {
    Pairs column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = _mm512_loadu_si512(b + (k * N + n) * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const Pairs left = _mm512_set1_epi32(a[m * stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        sum[m][n] = _mm512_dpbf16_ps(sum[m][n], reinterpret_cast<__m512bh>(left),
                                     reinterpret_cast<__m512bh>(column[n]));
      }
    }
  }
  finish(sum, row, vector);
}

template <int N>
inline void bf16_panel(const int32_t* a, int64_t stride, int64_t rows, const float* b,
                       int64_t pairs, int64_t vector, const Attend& finish) {
  constexpr int M = rows_at_once(N);
  int64_t row = 0;
  for (; row + M <= rows; row += M) bf16_block<M, N>(a, stride, b, pairs, row, vector, finish);
  for (; row + 4 <= rows; row += 4) bf16_block<4, N>(a, stride, b, pairs, row, vector, finish);
  for (; row < rows; ++row) bf16_block<1, N>(a, stride, b, pairs, row, vector, finish);
}

inline void bf16_attend(int64_t channels, const void* packed, const float* bias,
                        const float* features, int64_t count, float* rows, int64_t stride_rows,
                        void* scratch) {
  const int64_t columns = 3 * padded(channels), pairs = pairs_of(channels);
  BFloat16* rounded = static_cast<BFloat16*>(scratch);
  for (int64_t i = 0; i < count * columns; i += kLanes) {
    const __m256bh half = _mm512_cvtneps_pbh(Simd::load(features + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + i),
                        reinterpret_cast<__m256i>(half));
  }
  const int32_t* a = static_cast<const int32_t*>(scratch);
  const Attend finish = {bias, features, columns, rows, stride_rows};
  const Panels panels(columns / kLanes);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t vector = panels.first(p);
    const float* b = static_cast<const float*>(packed) + vector * kLanes * pairs;
    switch (panels.width(p)) {
      case 3:
        bf16_panel<3>(a, pairs, count, b, pairs, vector, finish);
        break;
      default:  // 3 * padded / lanes is a multiple of 3: panels have 3 or 4 vectors
        bf16_panel<4>(a, pairs, count, b, pairs, vector, finish);
    }
  }
}

constexpr CrossSpatialBf16 kTable = {bf16_packed_size, bf16_pack, bf16_scratch_size, bf16_attend};
