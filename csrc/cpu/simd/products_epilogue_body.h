// What is done with a block of sums, for any instruction set. Included after products_body.h.
// All arithmetic is float32; results are rounded once, when they are stored.

// Runs `op(row, pixel, sums, map)` over vectors of a block and stores what it returns. The map is read
// only if it has data. `op.prepare(row, pixel, rows, pixels, v)` may fill v, what `op` gets as map.
template <class T, class Op>
inline void each_block(const float* acc, int rows, int count, const MutableMapView& out, Op op) {
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

// -------------------------------------------------------------------------------------------- affine

struct AffineOp {
  const Affine& affine;

  // Rows of the sum of the resized maps.
  void prepare(int row, int pixel, int rows, int pixels, Simd::Floats* v) const {
    if (affine.resized_count == 0) return;
    for (int p = 0; p < Simd::kLanes; ++p) v[p] = Simd::zero();
    for (int m = 0; m < affine.resized_count; ++m) {
      const float* data = affine.resized[m].data + row;
      const Taps* taps = affine.resized[m].taps + pixel;
      for (int p = 0; p < pixels; ++p) {
        for (int t = 0; t < 4; ++t) {
          const float* at = data + taps[p].offset[t];
          const Simd::Floats value =
              rows == Simd::kLanes ? Simd::load(at) : Simd::load(at, rows);
          v[p] = Simd::fma(value, Simd::set(taps[p].weight[t]), v[p]);
        }
      }
    }
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
  each_block<T>(acc, rows, count, out, AffineOp{affine});
}

template <class W>
void affine_to_panel(const float* acc, int rows, int count, const Affine& affine, void* panel) {
  const AffineOp op{affine};
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

// --------------------------------------------------------------------------------------- interpolate

template <class T>
struct InterpolateOp {
  const float* gate;
  const MapView& map;

  void prepare(int row, int pixel, int rows, int pixels, Simd::Floats* v) const {
    const T* x = static_cast<const T*>(map.data) + row * map.stride_c + pixel * map.stride_s;
    load_block(x, map.stride_c, map.stride_s, rows, pixels, v);
  }

  Simd::Floats operator()(int row, int, Simd::Floats sum, const Simd::Floats& x) const {
    const Simd::Floats a = Simd::set(gate[row]);
    return Simd::fma(a, x, Simd::mul(Simd::set(1.0f - gate[row]), sum));
  }
};

template <class T>
void interpolate(const float* acc, int rows, int count, const float* gate, const MapView& map,
                 const MutableMapView& out) {
  each_block<T>(acc, rows, count, out, InterpolateOp<T>{gate, map});
}

// -------------------------------------------------------------------------------------------- fusion

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
        // Lanes past the last pixel hold what the scratch held before: they must not count.
        float lanes[Simd::kLanes] = {};
        Simd::store(lanes, value, pixels);
        fusion.sums[r + i] += Simd::reduce_add(Simd::load(lanes));
      }
    }
  }
}

// --------------------------------------------------------------------------------------------- table

template <class W>
constexpr void add_words(Products* table, Words words) {
  const int i = static_cast<int>(words);
  table->pack[i][0] = pack<W, float>;
  table->pack[i][1] = pack<W, BFloat16>;
  table->pack[i][2] = pack<W, Half>;
  table->multiply[i] = multiply<W>;
  table->affine_to_panel[i] = affine_to_panel<W>;
}

constexpr Products table_of_floats() {
  Products table{kPanelRows,
                 kPanelPixels,
                 {},
                 {},
                 {store_affine<float>, store_affine<BFloat16>, store_affine<Half>},
                 {},
                 {interpolate<float>, interpolate<BFloat16>, interpolate<Half>},
                 {fuse<float>, fuse<BFloat16>, fuse<Half>}};
  add_words<Floats>(&table, Words::kFloats);
  return table;
}
