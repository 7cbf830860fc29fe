// What is done with a block of sums, for any instruction set. Included after products_body.h.
// All arithmetic is float32; results are rounded once, when they are stored.

// Lanes past the last pixel hold what the scratch held before, and must not count in sums.
inline Simd::Floats first_lanes(const Simd::Floats& value, int count) {
  if (count == Simd::kLanes) return value;
  float lanes[Simd::kLanes] = {};
  Simd::store(lanes, value, count);
  return Simd::load(lanes);
}

// Runs `op(row, pixel, sums, map)` over vectors of a block and stores what it returns. The map is
// read only if it has data. `op.prepare(row, pixel, rows, pixels, v)` may fill v, what `op` gets as
// map.
template <class T, class Op>
inline void each_block(const float* acc, int rows, int count, const MutableMapView& out,
                       const Op& op) {
  T* to = static_cast<T*>(out.data);
  for (int r = 0; r < rows; r += Simd::kLanes) {
    const int block = smaller(Simd::kLanes, rows - r);
    for (int p = 0; p < count; p += Simd::kLanes) {
      const int pixels = smaller(Simd::kLanes, count - p);
      Simd::Floats v[Simd::kLanes];
      op.prepare(r, p, block, pixels, v);
      for (int i = 0; i < block; ++i) {
        v[i] = op(r + i, p, Simd::load(acc + (r + i) * kPanelPixels + p), v[i]);
      }
      store_block(to + r * out.stride_c + p * out.stride_s, out.stride_c, out.stride_s, block,
                  pixels, v);
    }
  }
}

// ------------------------------------------------------------------------------------------ affine

// The sum of the resized maps, [pixel][kBlockRows].
template <int kVectors>
inline void sum_resized_vectors(const Affine& affine, int count, float* out) {
  for (int p = 0; p < count; ++p) {
    Simd::Floats sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = Simd::zero();
    for (int m = 0; m < affine.resized_count; ++m) {
      const Taps& taps = affine.resized[m].taps[p];
      for (int t = 0; t < 4; ++t) {
        const float* at = affine.resized[m].data + taps.offset[t];
        const Simd::Floats weight = Simd::set(taps.weight[t]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          sum[v] = Simd::fma(Simd::load(at + v * Simd::kLanes), weight, sum[v]);
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      Simd::store(out + p * kBlockRows + v * Simd::kLanes, sum[v]);
    }
  }
}

struct AffineOp {
  const Affine& affine;
  float resized_sum[kPanelPixels * kBlockRows];

  AffineOp(const Affine& what, int rows, int count) : affine(what) {
    if (affine.resized_count == 0) return;
    if (rows <= Simd::kLanes) {
      sum_resized_vectors<1>(affine, count, resized_sum);
    } else {
      sum_resized_vectors<kBlockRows / Simd::kLanes>(affine, count, resized_sum);
    }
  }

  void prepare(int row, int pixel, int, int pixels, Simd::Floats* v) const {
    if (affine.resized_count == 0) return;
    const float* from = resized_sum + pixel * kBlockRows + row;
    for (int p = 0; p < pixels; ++p) v[p] = Simd::load(from + p * kBlockRows);
    for (int p = pixels; p < Simd::kLanes; ++p) v[p] = Simd::zero();
    Simd::transpose(v);
  }

  Simd::Floats operator()(int row, int, Simd::Floats sum, const Simd::Floats& resized) const {
    if (affine.resized_count != 0) sum = Simd::add(sum, resized);
    if (affine.scale != nullptr) sum = Simd::mul(sum, Simd::set(affine.scale[row]));
    if (affine.shift != nullptr) sum = Simd::add(sum, Simd::set(affine.shift[row]));
    // The operand order keeps NaN, as in `exponential`.
    return affine.relu ? Simd::max(Simd::zero(), sum) : sum;
  }
};

template <class T>
void store_affine(const float* acc, int rows, int count, const Affine& affine,
                  const MutableMapView& out) {
  each_block<T>(acc, rows, count, out, AffineOp(affine, rows, count));
}

void add_resized(float* acc, int rows, int count, const Affine& affine) {
  if (affine.resized_count == 0) return;
  const AffineOp op(affine, rows, count);
  for (int r = 0; r < rows; r += Simd::kLanes) {
    for (int p = 0; p < count; p += Simd::kLanes) {
      Simd::Floats v[Simd::kLanes];
      op.prepare(r, p, 0, smaller(Simd::kLanes, count - p), v);
      for (int i = 0; i < smaller(Simd::kLanes, rows - r); ++i) {
        float* at = acc + (r + i) * kPanelPixels + p;
        Simd::store(at, Simd::add(Simd::load(at), v[i]));
      }
    }
  }
}

template <class W>
void affine_to_panel(const float* acc, int rows, int count, const Affine& affine, void* panel) {
  const AffineOp op(affine, rows, count);
  for (int r = 0; r < rows; r += Simd::kLanes) {
    const int block = smaller(Simd::kLanes, rows - r);
    for (int p = 0; p < count; p += Simd::kLanes) {
      Simd::Floats v[Simd::kLanes];
      op.prepare(r, p, block, smaller(Simd::kLanes, count - p), v);
      for (int i = 0; i < block; ++i) {
        v[i] = op(r + i, p, Simd::load(acc + (r + i) * kPanelPixels + p), v[i]);
      }
      W::write(v, block, static_cast<float*>(panel) + r / W::kPerStep * kPanelPixels + p);
    }
  }
}

// ------------------------------------------------------------------------------------- combination

template <class T>
struct CombineOp {
  const Combination& how;
  const MapView& map;

  void prepare(int row, int pixel, int rows, int pixels, Simd::Floats* v) const {
    const T* x = static_cast<const T*>(map.data) + row * map.stride_c + pixel * map.stride_s;
    load_block(x, map.stride_c, map.stride_s, rows, pixels, v);
  }

  Simd::Floats operator()(int row, int, Simd::Floats sum, const Simd::Floats& x) const {
    if (how.acc_scale != nullptr) sum = Simd::mul(Simd::set(how.acc_scale[row]), sum);
    sum = Simd::fma(Simd::set(how.map_scale[row]), x, sum);
    return how.shift == nullptr ? sum : Simd::add(sum, Simd::set(how.shift[row]));
  }
};

template <class T>
void combine(const float* acc, int rows, int count, const Combination& how, const MapView& map,
             const MutableMapView& out) {
  each_block<T>(acc, rows, count, out, CombineOp<T>{how, map});
}

// ------------------------------------------------------------------------------------------ fusion

template <class T>
struct FusionOp {
  const Fusion& fusion;
  const MapView& e;

  void prepare(int row, int pixel, int rows, int pixels, Simd::Floats* v) const {
    const T* x = static_cast<const T*>(e.data) + row * e.stride_c + pixel * e.stride_s;
    load_block(x, e.stride_c, e.stride_s, rows, pixels, v);
  }

  Simd::Floats operator()(int row, int pixel, Simd::Floats sum, const Simd::Floats& x) const {
    if (fusion.scale != nullptr) sum = Simd::mul(sum, Simd::set(fusion.scale[row]));
    const Simd::Floats phi = sigmoid(Simd::add(sum, Simd::set(fusion.shift[row])));
    const int64_t group = (fusion.first_row + row) / fusion.group_channels;
    const Simd::Floats w = Simd::load(fusion.w + group * kPanelPixels + pixel);
    return Simd::mul(x, Simd::fma(w, Simd::sub(Simd::set(1.0f), phi), phi));
  }
};

template <class T>
void fuse(const float* acc, int rows, int count, const Fusion& fusion, const MapView& e,
          const MutableMapView& out) {
  const FusionOp<T> op{fusion, e};
  if (out.data != nullptr) {
    each_block<T>(acc, rows, count, out, op);
    return;
  }
  for (int r = 0; r < rows; ++r) fusion.sums[r] = 0.0f;
  for (int r = 0; r < rows; r += Simd::kLanes) {
    const int block = smaller(Simd::kLanes, rows - r);
    for (int p = 0; p < count; p += Simd::kLanes) {
      const int pixels = smaller(Simd::kLanes, count - p);
      Simd::Floats v[Simd::kLanes];
      op.prepare(r, p, block, pixels, v);
      for (int i = 0; i < block; ++i) {
        const Simd::Floats value =
            op(r + i, p, Simd::load(acc + (r + i) * kPanelPixels + p), v[i]);
        fusion.sums[r + i] += Simd::reduce_add(first_lanes(value, pixels));
      }
    }
  }
}
