#include "separable.h"

#ifdef CIEMA_X86_SIMD
#define CIEMA_AVX512_BF16 1
#include "avx512.h"

constexpr int kTilePixels = 14, kTileVectors = 2;  // as in separable_avx512.cpp

#include "separable_body.h"

// Two bfloat16 multiplied and added by one instruction; subnormal ones count as zero there.
struct PairSteps {
  using Element = BFloat16;
  using Vector = __m512i;
  static constexpr int kPerStep = 2;
  static Vector load(const Element* w) { return _mm512_loadu_si512(w); }
  static Vector spread(const Element* a) {
    int32_t pair;
    memcpy(&pair, a, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Simd::Floats multiply_add(Vector a, Vector b, Simd::Floats sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

constexpr Separable table_with_pairs() {
  Separable table = table_of_floats();
  PixelProductFunction* pairs = table.product[static_cast<int>(RowElement::kBFloat16)];
  pairs[static_cast<int>(Element::kFloat)] = multiply_pixels<PairSteps, float>;
  pairs[static_cast<int>(Element::kBFloat16)] = multiply_pixels<PairSteps, BFloat16>;
  pairs[static_cast<int>(Element::kHalf)] = multiply_pixels<PairSteps, Half>;
  return table;
}
constexpr Separable kTable = table_with_pairs();

#include "target_end.h"

const ciema::cpu::Separable ciema::cpu::kAvx512bf16Separable = ciema::cpu::kTable;
#endif
