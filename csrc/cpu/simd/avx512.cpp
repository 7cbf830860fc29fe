// Channel statistics in AVX-512 (F, BW, DQ, VL): vectors of 16 floats.
#include "channel_statistics.h"

#ifdef CIEMA_X86_SIMD
#ifndef __clang__  // gcc's own header reads "undefined" vectors, and warns of it
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

namespace ciema::cpu {
namespace {

#include "elements.h"

struct Simd {
  static constexpr int kLanes = 16;
  using Floats = __m512;
  using Ints = __m512i;
  struct Doubles {
    __m512d low, high;
  };

  static Floats load(const float* x) { return _mm512_loadu_ps(x); }
  static Floats load(const BFloat16* x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Floats load(const Half* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static Ints load(const int32_t* x) { return _mm512_loadu_si512(x); }
  static void store(float* out, Floats a) { _mm512_storeu_ps(out, a); }
  static void store(int32_t* out, Ints a) { _mm512_storeu_si512(out, a); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Doubles no_doubles() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static __m512d low(Floats a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }
  static __m512d high(Floats a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }
  static Doubles add(Doubles a, Floats b) {
    return {_mm512_add_pd(a.low, low(b)), _mm512_add_pd(a.high, high(b))};
  }
  static void accumulate(double* sum, Floats a) {
    _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), low(a)));
    _mm512_storeu_pd(sum + 8, _mm512_add_pd(_mm512_loadu_pd(sum + 8), high(a)));
  }
  static void take_greater(Floats value, int32_t position, Floats& best, Ints& at) {
    const __mmask16 greater = _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ);
    best = _mm512_mask_mov_ps(best, greater, value);
    at = _mm512_mask_set1_epi32(at, greater, position);
  }
  static bool any_greater(Floats a, float b) {
    return _mm512_cmp_ps_mask(a, _mm512_set1_ps(b), _CMP_GT_OQ) != 0;
  }
  static int first_equal(Floats a, float b) {
    const unsigned mask = _mm512_cmp_ps_mask(a, _mm512_set1_ps(b), _CMP_EQ_OQ);
    return mask ? __builtin_ctz(mask) : -1;
  }
  static float reduce_max(Floats a) { return _mm512_reduce_max_ps(a); }
  static double reduce_add(Doubles a) {
    return _mm512_reduce_add_pd(_mm512_add_pd(a.low, a.high));
  }
};

#include "channel_statistics_body.h"

}  // namespace

const ChannelStatistics kAvx512ChannelStatistics = kTable;

}  // namespace ciema::cpu

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // CIEMA_X86_SIMD
