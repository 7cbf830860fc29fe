// Panels of two bfloat16 a word. Included after products_body.h where the target has AVX512-BF16.

#include "bf16_words_body.h"

struct Pairs : Bf16Words {
  static constexpr int kPerStep = 2;
  static __m512i low_halves(Simd::Floats a) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
  }
  static void write(const Simd::Floats* v, int channels, float* panel) {
    for (int c = 0; c < channels; c += 2) {
      const __m512i odd = c + 1 < channels ? low_halves(v[c + 1]) : _mm512_setzero_si512();
      const __m512i word = _mm512_or_si512(low_halves(v[c]), _mm512_slli_epi32(odd, 16));
      _mm512_storeu_si512(panel + c / 2 * kPanelPixels, word);
    }
  }
};
