// AVX-512 (F, BW, DQ, VL): vectors of 16 floats; with CIEMA_AVX512_BF16 defined, that as well.
// Begins a stretch of code for one instruction set: include it after the standard headers, then the
// bodies of kernels, then target_end.h. Only C headers may be included in between (see target.h).
#include "target.h"
#ifndef __clang__  // gcc's own header reads "undefined" vectors, and warns of it
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define CIEMA_TARGET 1  // target_end.h has something to end
#if defined(__clang__) && defined(CIEMA_AVX512_BF16)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), \
    apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#ifdef CIEMA_AVX512_BF16
#pragma GCC target("avx512bf16")
#endif
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

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats set(float a) { return _mm512_set1_ps(a); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats round(Floats a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 2^a of whole a in [-126, 127]; anything for NaN
  static Floats exp2_of_whole(Floats a) { return _mm512_scalef_ps(set(1.0f), a); }
  static float reduce_add(Floats a) { return _mm512_reduce_add_ps(a); }

  // The first `count` lanes, 0 < count <= kLanes; the others load as zero and are not written.
  static __mmask16 first(int count) { return static_cast<__mmask16>(0xffffu >> (16 - count)); }
  static Floats load(const float* x, int count) { return _mm512_maskz_loadu_ps(first(count), x); }
  static __m256i load_bits(const void* x, int count) {
    return _mm256_maskz_loadu_epi16(first(count), x);
  }
  static Floats load(const BFloat16* x, int count) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits(x, count)), 16));
  }
  static Floats load(const Half* x, int count) { return _mm512_cvtph_ps(load_bits(x, count)); }
  static void store(float* out, Floats a, int count) {
    _mm512_mask_storeu_ps(out, first(count), a);
  }
  static __m256i to_bfloat16(Floats a) {  // nearest even; NaN stays one
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nudged =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i safe =
        _mm512_mask_mov_epi32(nudged, nan, _mm512_or_si512(bits, _mm512_set1_epi32(0x400000)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16));
  }
  static void store(BFloat16* out, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), to_bfloat16(a));
  }
  static void store(BFloat16* out, Floats a, int count) {
    _mm256_mask_storeu_epi16(out, first(count), to_bfloat16(a));
  }
  static __m256i to_half(Floats a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
  static void store(Half* out, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), to_half(a));
  }
  static void store(Half* out, Floats a, int count) {
    _mm256_mask_storeu_epi16(out, first(count), to_half(a));
  }

  // b where a > 0, else zero
  static Floats where_positive(Floats a, Floats b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ), b);
  }
  // v[i][j] and v[j][i] change places.
  static void transpose(Floats* v) {
    Floats pair[kLanes], four[kLanes];
    for (int i = 0; i < kLanes; i += 2) {
      pair[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      pair[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4) {
      for (int h = 0; h < 2; ++h) {
        const __m512d a = _mm512_castps_pd(pair[i + h]), b = _mm512_castps_pd(pair[i + 2 + h]);
        four[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        four[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    }
    for (int j = 0; j < 4; ++j) {  // four[4 i + j]: columns j, j + 4, j + 8, j + 12 of rows 4 i..
      const Floats a = _mm512_shuffle_f32x4(four[j], four[4 + j], 0x88);
      const Floats b = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0x88);
      const Floats c = _mm512_shuffle_f32x4(four[j], four[4 + j], 0xdd);
      const Floats d = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0xdd);
      v[j] = _mm512_shuffle_f32x4(a, b, 0x88);
      v[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
      v[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
      v[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
  }
};

#include "arithmetic.h"
