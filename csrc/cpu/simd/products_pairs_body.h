// Words of two bfloat16, multiplied and added by one instruction of AVX512-BF16. Included after
// products_body.h where the target has it. Subnormal bfloat16 count as zero there; products are
// exact, sums float32.

struct Pairs {
  using Vector = __m512i;
  static constexpr int kPerStep = 2;
  static Vector load(const float* word) { return _mm512_loadu_si512(word); }
  static Vector spread(const float* word) { return _mm512_castps_si512(_mm512_set1_ps(*word)); }
  static Simd::Floats multiply_add(Vector a, Vector b, Simd::Floats sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
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
