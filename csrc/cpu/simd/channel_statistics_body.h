// The channel statistics for any instruction set. Included inside the anonymous namespace of a file
// that has defined `struct Simd` (see portable.cpp for what it must offer) under its target pragma.
//
// Sums     float32 within kBlock elements or kPixels pixels of a lane, float64 between them.
// Maximum  vector maxima to a block; only the block that first held the maximum is scanned again
//          (still in cache) for its position. Maximum instructions lose NaNs, but the sum never
//          does: only if it is NaN the plane is searched for its first NaN.

constexpr int64_t kBlock = 512;  // elements of a plane between two looks at the maximum
constexpr int kUnroll = 4;       // independent vectors in flight
constexpr int kPixels = 8;       // pixels taken together in channels_last

// Position of the first element equal to `value` among `count`; one is known to be there.
template <class T>
int64_t find_first(const T* x, int64_t count, float value) {
  int64_t s = 0;
  for (; s + Simd::kLanes <= count; s += Simd::kLanes) {
    const int lane = Simd::first_equal(Simd::load(x + s), value);
    if (lane >= 0) return s + lane;
  }
  while (s < count && to_float(x[s]) != value) ++s;
  return s;
}

// The first NaN replaces the maximum; a NaN sum without one came from inf - inf.
template <class T>
void take_first_nan(const T* x, int64_t count, int64_t stride, float* max, int64_t* argmax) {
  for (int64_t s = 0; s < count; ++s) {
    const float value = to_float(x[s * stride]);
    if (value != value) {
      *max = value;
      *argmax = s;
      return;
    }
  }
}

template <class T>
void plane_statistics(const void* data, int64_t count, float* mean, float* max, int64_t* argmax) {
  constexpr int64_t kStep = kUnroll * Simd::kLanes;
  static_assert(kBlock % kStep == 0, "a block is a whole number of steps");
  const T* x = static_cast<const T*>(data);
  Simd::Doubles total = Simd::no_doubles();
  float best = lowest();
  int64_t best_block = 0;
  int64_t s = 0;
  while (count - s >= kStep) {
    const int64_t block = s;
    const int64_t end = s + (count - s < kBlock ? (count - s) / kStep * kStep : kBlock);
    Simd::Floats sum[kUnroll], high[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = high[u] = Simd::load(x + s + u * Simd::kLanes);
    for (s += kStep; s < end; s += kStep) {
      for (int u = 0; u < kUnroll; ++u) {
        const Simd::Floats value = Simd::load(x + s + u * Simd::kLanes);
        sum[u] = Simd::add(sum[u], value);
        high[u] = Simd::max(high[u], value);
      }
    }
    total = Simd::add(total, Simd::add(Simd::add(sum[0], sum[1]), Simd::add(sum[2], sum[3])));
    const Simd::Floats highest =
        Simd::max(Simd::max(high[0], high[1]), Simd::max(high[2], high[3]));
    if (Simd::any_greater(highest, best)) {
      best = Simd::reduce_max(highest);
      best_block = block;
    }
  }
  double rest = 0.0;
  float best_rest = lowest();
  for (int64_t t = s; t < count; ++t) {
    const float value = to_float(x[t]);
    rest += value;
    if (value > best_rest) best_rest = value;
  }
  if (best_rest > best) {
    best = best_rest;
    best_block = s;
  }
  const double sum = Simd::reduce_add(total) + rest;
  *mean = static_cast<float>(sum / static_cast<double>(count));
  *argmax = best_block;
  if (sum != sum) {
    *max = best;
    take_first_nan(x, count, 1, max, argmax);
    if (*max != *max) return;
  }
  *argmax += find_first(x + best_block, count - best_block, best);
  *max = to_float(x[*argmax]);  // the element itself: of equal zeros the first one's sign
}

// One vector of channels over kPixels pixels (or `pixels`, at the end) into the running statistics.
template <class T>
inline void add_pixels(const T* x, int64_t stride_s, int64_t first, int pixels, double* sum,
                       float* max, int32_t* argmax) {
  Simd::Floats value = Simd::load(x);
  Simd::Floats added = value;
  Simd::Floats best = Simd::load(max);
  Simd::Ints at = Simd::load(argmax);
  Simd::take_greater(value, static_cast<int32_t>(first), best, at);
  for (int p = 1; p < pixels; ++p) {
    value = Simd::load(x + p * stride_s);
    added = Simd::add(added, value);
    Simd::take_greater(value, static_cast<int32_t>(first) + p, best, at);
  }
  Simd::accumulate(sum, added);
  Simd::store(max, best);
  Simd::store(argmax, at);
}

template <class T>
void channels_statistics(const void* data, int64_t count, int64_t stride_s, int64_t channels,
                         double* sum, int32_t* position, float* mean, float* max,
                         int64_t* argmax) {
  const T* x = static_cast<const T*>(data);
  for (int64_t c = 0; c < channels; ++c) {
    sum[c] = 0.0;
    max[c] = lowest();
    position[c] = 0;
  }
  const int64_t whole = channels / Simd::kLanes * Simd::kLanes;
  for (int64_t s = 0; s < count; s += kPixels) {
    const int pixels = static_cast<int>(count - s < kPixels ? count - s : kPixels);
    const T* row = x + s * stride_s;
    if (pixels == kPixels) {  // a constant to unroll by
      for (int64_t c = 0; c < whole; c += Simd::kLanes) {
        add_pixels(row + c, stride_s, s, kPixels, sum + c, max + c, position + c);
      }
    } else {
      for (int64_t c = 0; c < whole; c += Simd::kLanes) {
        add_pixels(row + c, stride_s, s, pixels, sum + c, max + c, position + c);
      }
    }
    for (int p = 0; p < pixels; ++p) {
      for (int64_t c = whole; c < channels; ++c) {
        const float value = to_float(row[p * stride_s + c]);
        sum[c] += value;
        if (value > max[c]) {
          max[c] = value;
          position[c] = static_cast<int32_t>(s) + p;
        }
      }
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    argmax[c] = position[c];
    mean[c] = static_cast<float>(sum[c] / static_cast<double>(count));
    if (sum[c] != sum[c]) take_first_nan(x + c, count, stride_s, max + c, argmax + c);
  }
}

constexpr ChannelStatistics kTable = {
    {plane_statistics<float>, plane_statistics<BFloat16>, plane_statistics<Half>},
    {channels_statistics<float>, channels_statistics<BFloat16>, channels_statistics<Half>},
};
