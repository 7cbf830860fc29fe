// The samples of a group of cross_spatial in training, forward, on one core (spec.md 2.3 and 3):
//
//   L = Wa f    A = sigmoid(BN(L))    R = Wr (A f)    y = BN(R) + alpha Wc X    s = softmax(mean y)
//
// with BN's statistics over the samples and pixels of this group, apart for the two branches. Three
// passes over the samples, with a statistic to be known between two of them:
//   1. x1, x2, f and L   2. A f and R   3. mean y, softmax, w.
// y is read through R and X only: s.y = (s D).R + (alpha Wc^T s).X + const (spec.md 5.4).
//
// Scratch  rows (f: 3c, L: 3c, R: c, X: c) of every sample and branch, in the order of tiles: at
//          c = 32, 56x56 that is 6.4 MB a sample, or 3.2 MB where they are kept in bfloat16.
// Sums     statistics (of L and R as they are kept): mean and centred squares of a chunk in
//          float32, chunks joined in float64; means of a sample's R and X float32 by chunks.
//          Everything in a fixed order.
// Included inside the namespace of an instruction-set file, after slab_rows_body.h.

// Mean and sum of squares about it, of each column; joined chunk by chunk.
struct Moments {
  double* mean;
  double* squares;

  Moments(double* base, int64_t columns) : mean(base), squares(base + columns) {}
  void clear(int64_t columns) const {
    memset(mean, 0, static_cast<size_t>(2 * columns) * sizeof(double));
  }
  // count: pixels joined before.
  template <class T>
  void join(const T* rows, int64_t stride, const int32_t* valid, int64_t pixels,
            int64_t columns, int64_t count) const {
    if (pixels == 0) return;
    const double total = static_cast<double>(count + pixels);
    const Floats share = Simd::set(1.0f / static_cast<float>(pixels));
    for (int64_t c = 0; c < columns; c += kLanes) {
      Floats sum = Simd::zero(), spread = Simd::zero();
      for (int64_t i = 0; i < pixels; ++i) {
        sum = Simd::add(sum, Simd::load(rows + valid[i] * stride + c));
      }
      const Floats middle = Simd::mul(sum, share);
      for (int64_t i = 0; i < pixels; ++i) {
        const Floats off = Simd::sub(Simd::load(rows + valid[i] * stride + c), middle);
        spread = Simd::fma(off, off, spread);
      }
      float middles[kLanes], spreads[kLanes];
      Simd::store(middles, middle);
      Simd::store(spreads, spread);
      for (int i = 0; i < kLanes; ++i) {
        const double step = middles[i] - mean[c + i];
        mean[c + i] += step * static_cast<double>(pixels) / total;
        squares[c + i] += spreads[i] + step * step * static_cast<double>(count) *
                                           static_cast<double>(pixels) / total;
      }
    }
  }
};

// Scratch that forward and backward share.
struct TrainingWork {
  Frame frame;
  Tiles tiles;
  int64_t batch, pixels;  // pixels of a sample in tiles, those outside the map included
  float *e, *x1, *x2;     // framed maps of the sample at work
  float* gates;
  Stored* store;          // (B, 2, pixels, 8cp)
  float* exact;           // (chunk, cp): X before it is rounded, if it is
  Stored* weighted;       // A f of a chunk (chunk, 3cp)
  float *scale, *shift;   // (2, 3cp), L's batch norm in the two branches
  int32_t* valid;         // pixels of a chunk inside the map
  int64_t size;
  float* base;

  TrainingWork(const CrossSpatialShape& shape, int64_t samples, float* memory)
      : frame(shape.channels, shape.height, shape.width),
        tiles(2 * frame.cp, 2 * frame.cp),
        batch(samples),
        pixels(frame.tiles_y * frame.tiles_x * kTilePixels),
        size(0),
        base(memory) {
    const int64_t cp = frame.cp;
    e = take(frame.size());
    x1 = take(frame.size());
    x2 = take(frame.size());
    gates = take(Gates::size(frame));
    tiles.in = take(tiles.size_in());
    tiles.out = take(tiles.size_out());
    store = take_stored(batch * 2 * pixels * 8 * cp);
    exact = take(exact_size(cp));
    weighted = take_stored(kChunkPixels * 3 * cp);
    scale = take(6 * cp);
    shift = take(6 * cp);
    valid = reinterpret_cast<int32_t*>(take(kChunkPixels));
  }

  float* take(int64_t count) {
    float* here = base != nullptr ? base + size : nullptr;
    size += rounded_up(count, 16);
    return here;
  }
  Stored* take_stored(int64_t count) {
    return reinterpret_cast<Stored*>(take(rounded_up(count, kPerWord) / kPerWord));
  }
  void clear_frames() const {
    memset(e, 0, static_cast<size_t>(3 * rounded_up(frame.size(), 16)) * sizeof(float));
  }
  RowsOf<Stored> rows(int64_t sample, int branch) const {
    const int64_t stride = 8 * frame.cp;
    return {frame.cp, stride, store + (sample * 2 + branch) * pixels * stride};
  }
  // X of the pixels from `first` on, as fill_rows leaves it.
  ExactRows exact_x(const RowsOf<Stored>& rows, int64_t first) const {
    return exact_rows(rows, first, exact);
  }
  // Lists the pixels of [first, first + count) that are in the map.
  int64_t find_valid(int64_t first, int64_t count) const {
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t tile = (first + i) / kTilePixels, place = (first + i) % kTilePixels;
      const int64_t y = tile / frame.tiles_x * kOutputs5 + place / kOutputs5;
      const int64_t x = tile % frame.tiles_x * kOutputs5 + place % kOutputs5;
      if (y < frame.height && x < frame.width) valid[found++] = static_cast<int32_t>(i);
    }
    return found;
  }
};

// The framed map e of a sample, and its gates.
inline Gates load_map(const TrainingGroup& group, const TrainingWork& work, int64_t sample) {
  const Frame& f = work.frame;
  const int64_t slab = sample * group.groups;
  SlabMap map = group.map;
  map.e = static_cast<const char*>(map.e) + sample * group.sample_bytes;
  pack_map(map, f, work.e);
  const Gates gates(f, work.gates);
  load_gates(group.alpha_h + slab * f.c * f.height, group.alpha_w + slab * f.c * f.width,
             group.mean + slab * f.c, group.rstd + slab * f.c, f, gates);
  return gates;
}

// The maps of a sample: e, x1 and x2, framed.
inline void load_sample(const TrainingGroup& group, const TrainingWork& work,
                        const TrainingWeights& weights, int64_t sample) {
  const Frame& f = work.frame;
  const Gates gates = load_map(group, work, sample);
  normalise_map(gates, weights.gn_weight, weights.gn_bias, f, work.e, work.x1);
  if (kDirectConv3x3) {
    conv3x3_direct(f, work.e, weights.conv3x3, weights.conv3x3_bias, work.x2);
  } else {
    conv3x3_tiles(f, work.tiles, work.e, weights.conv3x3, weights.conv3x3_bias, work.x2);
  }
}

// A branch's X from its rows back into a framed map.
inline void restore_map(const Frame& f, const RowsOf<Stored>& rows, float* map) {
  for (int64_t y = 0; y < f.height; ++y) {
    for (int64_t x = 0; x < f.width; ++x) {
      const Stored* from = rows.x(tile_place(f, y, x));
      float* to = map + f.at(y, x);
      for (int64_t c = 0; c < f.cp; c += kLanes) Simd::store(to + c, Simd::load(from + c));
    }
  }
}

struct Sections {
  Tap tap[3];

  explicit Sections(int64_t stride) : tap{{0, 0}, {stride, 1}, {2 * stride, 2}} {}
  Taps taps(int64_t count = 3) const { return {tap, count, count}; }
};

// Rows of `sections` times c channels times packed sections.
template <class Finish>
inline void multiply_rows(const Frame& f, const Stored* rows, int64_t stride, int64_t sections,
                          int64_t count, const float* weights, int64_t vectors,
                          const Finish& finish) {
  const Sections taps(f.cp / kPerWord);
  const Operand left = {reinterpret_cast<const float*>(rows), stride / kPerWord,
                        taps.taps(sections), words_of_section(f.c)};
  product<StoredWords>(left, count, weights, vectors, finish);
}

// f, L and X of a chunk of pixels; X unrounded too, in work.exact_x(rows, first).
inline void fill_rows(const TrainingWork& work, const TrainingWeights& weights, const float* map,
                      const RowsOf<Stored>& rows, int64_t first, int64_t count) {
  const Frame& f = work.frame;
  const ExactRows exact = work.exact_x(rows, first);
  feature_tiles(f, work.tiles, map, weights.spatial, first / kTilePixels, count / kTilePixels,
                Rows<Stored>{rows.f(first), exact.at, rows.stride, exact.stride});
  keep_rows(exact, count, f.cp, rows.x(first), rows.stride);
  multiply_rows(f, rows.x(first), rows.stride, 1, count, weights.spatial1, f.cp / kLanes,
                Store{rows.f(first), rows.stride});
  multiply_rows(f, rows.f(first), rows.stride, 3, count, weights.attention, 3 * f.cp / kLanes,
                Store{rows.l(first), rows.stride});
}

// Scale and shift of a batch norm from its statistics; zero in the padding.
inline void norm_factors(const float* mean, const float* var, double eps, const float* weight,
                         const float* bias, int64_t sections, int64_t c, float* scale,
                         float* shift) {
  const int64_t cp = padded(c);
  for (int64_t i = 0; i < sections * cp; ++i) scale[i] = shift[i] = 0.0f;
  for (int64_t i = 0; i < sections * c; ++i) {
    const int64_t at = i / c * cp + i % c;
    const double factor = weight[at] / sqrt(static_cast<double>(var[i]) + eps);
    scale[at] = static_cast<float>(factor);
    shift[at] = static_cast<float>(bias[at] - mean[i] * factor);
  }
}

constexpr int64_t kRowsAhead = 8;  // rows asked for before they are read: they lie in the L3 cache

// A f of a chunk of branch k into work.weighted, and if wanted A into `attention`.
inline void weigh_rows(const TrainingWork& work, int k, const RowsOf<Stored>& rows, int64_t first,
                       int64_t count, float* attention) {
  const int64_t columns = 3 * work.frame.cp;
  const float *scale = work.scale + k * columns, *shift = work.shift + k * columns;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < 2 * columns; c += kLanes * kPerWord) {
      prefetch(rows.f(first + i + kRowsAhead) + c);
    }
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Floats logit = Simd::fma(Simd::load(rows.l(first + i) + c), Simd::load(scale + c),
                                     Simd::load(shift + c));
      const Floats gate = gate_of(logit);
      if (attention != nullptr) Simd::store(attention + i * columns + c, gate);
      put(work.weighted + i * columns + c, Simd::mul(gate, Simd::load(rows.f(first + i) + c)));
    }
  }
}

// R of a chunk.
inline void reduce_rows(const TrainingWork& work, const TrainingWeights& weights,
                        const RowsOf<Stored>& rows, int64_t first, int64_t count) {
  const int64_t cp = work.frame.cp;
  multiply_rows(work.frame, work.weighted, 3 * cp, 3, count, weights.reduce, cp / kLanes,
                Store{rows.r(first), rows.stride});
}

inline void store_moments(const Moments& moments, int64_t sections, int64_t c, int64_t count,
                          float* mean, float* var) {
  for (int64_t i = 0; i < sections * c; ++i) {
    const int64_t at = i / c * padded(c) + i % c;
    mean[i] = static_cast<float>(moments.mean[at]);
    var[i] = static_cast<float>(moments.squares[at] / static_cast<double>(count));
  }
}
