// Words of two bfloat16, multiplied and added by one instruction of AVX512-BF16. Included where the
// target has it. Subnormal bfloat16 count as zero there; products are exact, sums float32.

struct Bf16Words {
  using Vector = __m512i;
  static Vector load(const float* word) { return _mm512_loadu_si512(word); }
  static Vector spread(const float* word) { return _mm512_castps_si512(_mm512_set1_ps(*word)); }
  static Simd::Floats multiply_add(Vector a, Vector b, Simd::Floats sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
