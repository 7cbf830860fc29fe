// Channel statistics in AVX2 with F16C: vectors of 8 floats.
#include "channel_statistics.h"

#ifdef CIEMA_X86_SIMD
#include <immintrin.h>

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
};

#include "channel_statistics_body.h"

}  // namespace

const ChannelStatistics kAvx2ChannelStatistics = kTable;

}  // namespace ciema::cpu

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // CIEMA_X86_SIMD
