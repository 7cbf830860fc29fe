// AVX2 with FMA and F16C: vectors of 8 floats.
// Begins a stretch of code for one instruction set: include it after the standard headers, then the
// bodies of kernels, then target_end.h. Only C headers may be included in between (see target.h).
#include "target.h"
#include <immintrin.h>

#define CIEMA_TARGET 1  // target_end.h has something to end
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace ciema::cpu {
namespace {

#include "elements.h"

struct Simd {
  static constexpr int kLanes = 8;
  using Floats = __m256;
  using Ints = __m256i;
  struct Doubles {
    __m256d low, high;
  };

  static Floats load(const float* x) { return _mm256_loadu_ps(x); }
  static Floats load(const BFloat16* x) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Floats load(const Half* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static Ints load(const int32_t* x) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  }
  static void store(float* out, Floats a) { _mm256_storeu_ps(out, a); }
  static void store(int32_t* out, Ints a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), a);
  }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static Doubles no_doubles() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static __m256d low(Floats a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a)); }
  static __m256d high(Floats a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)); }
  static Doubles add(Doubles a, Floats b) {
    return {_mm256_add_pd(a.low, low(b)), _mm256_add_pd(a.high, high(b))};
  }
  static void accumulate(double* sum, Floats a) {
    _mm256_storeu_pd(sum, _mm256_add_pd(_mm256_loadu_pd(sum), low(a)));
    _mm256_storeu_pd(sum + 4, _mm256_add_pd(_mm256_loadu_pd(sum + 4), high(a)));
  }
  static void take_greater(Floats value, int32_t position, Floats& best, Ints& at) {
    const Floats greater = _mm256_cmp_ps(value, best, _CMP_GT_OQ);
    best = _mm256_blendv_ps(best, value, greater);
    at = _mm256_blendv_epi8(at, _mm256_set1_epi32(position), _mm256_castps_si256(greater));
  }
  static bool any_greater(Floats a, float b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_set1_ps(b), _CMP_GT_OQ)) != 0;
  }
  static int first_equal(Floats a, float b) {
    const int mask = _mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_set1_ps(b), _CMP_EQ_OQ));
    return mask ? __builtin_ctz(static_cast<unsigned>(mask)) : -1;
  }
  static float reduce_max(Floats a) {
    float lane[kLanes];
    store(lane, a);
    float best = lane[0];
    for (int i = 1; i < kLanes; ++i) best = lane[i] > best ? lane[i] : best;
    return best;
  }
  static double reduce_add(Doubles a) {
    double lane[4];
    _mm256_storeu_pd(lane, _mm256_add_pd(a.low, a.high));
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
  }

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats set(float a) { return _mm256_set1_ps(a); }
  static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static Floats round(Floats a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 2^a of whole a in [-126, 127]; anything for NaN
  static Floats exp2_of_whole(Floats a) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static float reduce_add(Floats a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // The first `count` lanes, 0 < count <= kLanes; the others load as zero and are not written.
  static __m256i first(int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
  }
  static Floats load(const float* x, int count) { return _mm256_maskload_ps(x, first(count)); }
  template <class T>
  static Floats load(const T* x, int count) {
    T lane[kLanes] = {};
    for (int i = 0; i < count; ++i) lane[i] = x[i];
    return load(lane);
  }
  static void store(float* out, Floats a, int count) {
    _mm256_maskstore_ps(out, first(count), a);
  }
  template <class T>
  static void store(T* out, Floats a, int count) {
    T lane[kLanes];
    store(lane, a);
    for (int i = 0; i < count; ++i) out[i] = lane[i];
  }
  static void store(BFloat16* out, Floats a) {  // nearest even; NaN stays one
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nudged =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(nudged, quiet, nan), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_packus_epi32(_mm256_castsi256_si128(high),
                                      _mm256_extracti128_si256(high, 1)));
  }
  static void store(Half* out, Floats a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }

  // b where a > 0, else zero
  static Floats where_positive(Floats a, Floats b) {
    return _mm256_and_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ), b);
  }
  // v[i][j] and v[j][i] change places.
  static void transpose(Floats* v) {
    Floats pair[kLanes], four[kLanes];
    for (int i = 0; i < kLanes; i += 2) {
      pair[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      pair[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4) {
      for (int h = 0; h < 2; ++h) {
        const __m256d a = _mm256_castps_pd(pair[i + h]), b = _mm256_castps_pd(pair[i + 2 + h]);
        four[i + 2 * h] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
        four[i + 2 * h + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
      }
    }
    for (int j = 0; j < 4; ++j) {  // four[4 i + j] holds columns j and j + 4 of rows 4 i..
      v[j] = _mm256_permute2f128_ps(four[j], four[4 + j], 0x20);
      v[4 + j] = _mm256_permute2f128_ps(four[j], four[4 + j], 0x31);
    }
  }
};

#include "arithmetic.h"
