// What training keeps of a pixel and multiplies, rounded to bfloat16, for 16-bit maps on processors
// that multiply those: half the memory, twice the rate, sums in float32. The convolutions by tiles
// stay in float32: their transforms would magnify the rounding. Twin of slab_float_rows_body.h.
// Included inside the namespace of an instruction-set file, after slab_gradients_body.h.

#include "bf16_words_body.h"

using Stored = BFloat16;
using StoredWords = Bf16Words;
constexpr int64_t kPerWord = 2;
// The rounding of e costs alpha's gradient more than the tiles do.
constexpr bool kDirectConv3x3 = false;

inline void put(Stored* out, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(value));
}

inline int64_t words_of_section(int64_t c) { return padded(c) / 2; }

inline void pack_section(const float* weight, int64_t c, int64_t stride_out, int64_t stride_in,
                         const Block& block, float* out) {
  for (int64_t o = 0; o < c; ++o) {
    const PackedColumn column(block.rows, block.vectors, block.first_column + o);
    BFloat16* to =
        reinterpret_cast<BFloat16*>(out + column.start + block.first_row * column.step);
    for (int64_t i = 0; i < c; ++i) {
      from_float(weight[o * stride_out + i * stride_in], to + i / 2 * 2 * column.step + i % 2);
    }
  }
}

// 1 / (1 + e^-a) to 1e-4, a fortieth of what rounding does to it; NaN stays NaN.
inline Floats gate_of(Floats logit) {
  // The operand order keeps NaN: x86's min and max return the second operand then.
  const Floats power = Simd::max(
      Simd::set(-126.0f),
      Simd::min(Simd::set(126.0f), Simd::mul(logit, Simd::set(-0x1.715476p+0f))));
  const Floats rest = _mm512_reduce_ps(power, _MM_FROUND_TO_NEG_INF);  // [0, 1)
  Floats sum = Simd::set(0x1.3f96a4p-4f);  // 2^rest to 8e-5
  sum = Simd::fma(sum, rest, Simd::set(0x1.cefc4cp-3f));
  sum = Simd::fma(sum, rest, Simd::set(0x1.64444cp-1f));
  sum = Simd::fma(sum, rest, Simd::set(0x1.fff632p-1f));
  return _mm512_rcp14_ps(Simd::add(Simd::set(1.0f), _mm512_scalef_ps(sum, power)));
}

// Sums of X are taken before it is rounded: alpha's gradient is a small difference of them.
inline int64_t exact_size(int64_t cp) { return kChunkPixels * cp; }
inline ExactRows exact_rows(const RowsOf<Stored>& rows, int64_t, float* exact) {
  return {exact, rows.cp};
}
inline void keep_rows(const ExactRows& from, int64_t count, int64_t columns, Stored* to,
                      int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      put(to + i * stride + c, Simd::load(from.at + i * from.stride + c));
    }
  }
}

inline int64_t pixel_words_size(int64_t columns) { return kChunkPixels / 2 * columns; }
inline PixelWords pixel_words(const Stored* rows, int64_t stride, int64_t count, int64_t columns,
                              float* words) {
  for (int64_t i = 0; i < count; i += 2) {  // chunks hold an even number of pixels
    const Stored *even = rows + i * stride, *odd = even + stride;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const auto halves = [c](const Stored* row) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + c)));
      };
      const __m512i word = _mm512_or_si512(halves(even), _mm512_slli_epi32(halves(odd), 16));
      _mm512_storeu_si512(words + i / 2 * columns + c, word);
    }
  }
  return {words, columns};
}
