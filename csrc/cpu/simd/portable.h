// Plain C++: any processor, any compiler.
// Begins a stretch of code for one instruction set: include it after the standard headers, then the
// bodies of kernels, then target_end.h. Only C headers may be included in between (see target.h).
#include "target.h"

namespace ciema::cpu {
namespace {

#include "elements.h"

struct Simd {
  static constexpr int kLanes = 8;  // two SSE or NEON registers
  struct Floats {
    float lane[kLanes];
  };
  struct Ints {
    int32_t lane[kLanes];
  };
  struct Doubles {
    double lane[kLanes];
  };

  template <class T>
  static Floats load(const T* x) {
    Floats out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = to_float(x[i]);
    return out;
  }
  static Ints load(const int32_t* x) {
    Ints out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = x[i];
    return out;
  }
  static void store(int32_t* out, const Ints& a) {
    for (int i = 0; i < kLanes; ++i) out[i] = a.lane[i];
  }
  static Floats add(Floats a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Floats max(Floats a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  static Doubles no_doubles() { return Doubles{}; }
  static Doubles add(Doubles a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static void accumulate(double* sum, const Floats& a) {
    for (int i = 0; i < kLanes; ++i) sum[i] += a.lane[i];
  }
  // Where value > best: best = value, at = position.
  static void take_greater(const Floats& value, int32_t position, Floats& best, Ints& at) {
    for (int i = 0; i < kLanes; ++i) {
      const bool greater = value.lane[i] > best.lane[i];
      best.lane[i] = greater ? value.lane[i] : best.lane[i];
      at.lane[i] = greater ? position : at.lane[i];
    }
  }
  static bool any_greater(const Floats& a, float b) {
    bool any = false;
    for (int i = 0; i < kLanes; ++i) any |= a.lane[i] > b;
    return any;
  }
  static int first_equal(const Floats& a, float b) {  // lane, or -1
    for (int i = 0; i < kLanes; ++i) {
      if (a.lane[i] == b) return i;
    }
    return -1;
  }
  static float reduce_max(const Floats& a) {
    float best = a.lane[0];
    for (int i = 1; i < kLanes; ++i) best = a.lane[i] > best ? a.lane[i] : best;
    return best;
  }
  static double reduce_add(const Doubles& a) {
    double sum = 0.0;
    for (int i = 0; i < kLanes; ++i) sum += a.lane[i];
    return sum;
  }

  static Floats zero() { return Floats{}; }
  static Floats set(float value) {
    Floats a;
    for (int i = 0; i < kLanes; ++i) a.lane[i] = value;
    return a;
  }
  static Floats sub(Floats a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  static Floats mul(Floats a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static Floats div(Floats a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] /= b.lane[i];
    return a;
  }
  static Floats fma(Floats a, const Floats& b, const Floats& c) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return a;
  }
  static Floats min(Floats a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  // To the nearest whole number, |a| below 2^22.
  static Floats round(Floats a) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] = (a.lane[i] + 0x1.8p23f) - 0x1.8p23f;
    return a;
  }
  // 2^a of whole a in [-126, 127]; anything for NaN
  static Floats exp2_of_whole(Floats a) {
    for (int i = 0; i < kLanes; ++i) {
      const int32_t whole = a.lane[i] == a.lane[i] ? static_cast<int32_t>(a.lane[i]) : 0;
      a.lane[i] = float_of_bits(static_cast<uint32_t>(whole + 127) << 23);
    }
    return a;
  }
  static float reduce_add(const Floats& a) {
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += a.lane[i];
    return sum;
  }

  // The first `count` lanes, 0 < count <= kLanes; the others load as zero and are not written.
  template <class T>
  static Floats load(const T* x, int count) {
    Floats a{};
    for (int i = 0; i < count; ++i) a.lane[i] = to_float(x[i]);
    return a;
  }
  template <class T>
  static void store(T* out, const Floats& a) {
    for (int i = 0; i < kLanes; ++i) from_float(a.lane[i], out + i);
  }
  template <class T>
  static void store(T* out, const Floats& a, int count) {
    for (int i = 0; i < count; ++i) from_float(a.lane[i], out + i);
  }

  // b where a > 0, else zero
  static Floats where_positive(const Floats& a, Floats b) {
    for (int i = 0; i < kLanes; ++i) b.lane[i] = a.lane[i] > 0.0f ? b.lane[i] : 0.0f;
    return b;
  }
  // v[i][j] and v[j][i] change places.
  static void transpose(Floats* v) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const float value = v[i].lane[j];
        v[i].lane[j] = v[j].lane[i];
        v[j].lane[i] = value;
      }
    }
  }
};

#include "arithmetic.h"
