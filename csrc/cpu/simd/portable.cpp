// Channel statistics in plain C++: any processor, any compiler.
#include "channel_statistics.h"

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
  static void store(float* out, const Floats& a) {
    for (int i = 0; i < kLanes; ++i) out[i] = a.lane[i];
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
};

#include "channel_statistics_body.h"

}  // namespace

const ChannelStatistics kPortableChannelStatistics = kTable;

}  // namespace ciema::cpu
