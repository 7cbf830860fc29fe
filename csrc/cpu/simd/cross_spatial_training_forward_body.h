// The forward of a group in training; see cross_spatial_training_body.h, after which this is
// included.

struct ForwardWork : TrainingWork {
  double *attention_moments, *reduce_moments;  // of the two branches
  float* mean;                                 // (2, B, 2cp): of R and X of a sample
  float *reduce_scale, *reduce_shift;          // (2, cp)
  float* vector;                               // (2cp)
  float *y, *logits, *plane;

  ForwardWork(const CrossSpatialShape& shape, int64_t samples, float* memory)
      : TrainingWork(shape, samples, memory) {
    const int64_t cp = frame.cp;
    attention_moments = reinterpret_cast<double*>(take(2 * 2 * 2 * 3 * cp));
    reduce_moments = reinterpret_cast<double*>(take(2 * 2 * 2 * cp));
    mean = take(2 * batch * 2 * cp);
    reduce_scale = take(2 * cp);
    reduce_shift = take(2 * cp);
    vector = take(2 * cp);
    y = take(cp);
    logits = take(pixels);
    plane = take(frame.height * frame.width);
  }
  float* sample_mean(int64_t sample, int branch) const {
    return mean + (branch * batch + sample) * 2 * frame.cp;
  }
};

inline void forward_features(const TrainingGroup& group, const ForwardWork& work,
                             const TrainingWeights& weights) {
  const int64_t cp = work.frame.cp, columns = 3 * cp;
  for (int k = 0; k < 2; ++k) {
    Moments(work.attention_moments + k * 2 * columns, columns).clear(columns);
  }
  memset(work.mean, 0, static_cast<size_t>(4 * work.batch * cp) * sizeof(float));
  for (int64_t b = 0; b < group.batch; ++b) {
    load_sample(group, work, weights, b);
    int64_t seen = b * work.frame.height * work.frame.width;
    for (int64_t first = 0; first < work.pixels; first += kChunkPixels) {
      const int64_t count = smaller(work.pixels - first, kChunkPixels);
      const int64_t inside = work.find_valid(first, count);
      for (int k = 0; k < 2; ++k) {
        const RowsOf<Stored> rows = work.rows(b, k);
        fill_rows(work, weights, k == 0 ? work.x1 : work.x2, rows, first, count);
        Moments(work.attention_moments + k * 2 * columns, columns)
            .join(rows.l(first), rows.stride, work.valid, inside, columns, seen);
        const ExactRows x = work.exact_x(rows, first);
        add_rows(x.at, x.stride, count, cp, work.sample_mean(b, k) + cp);
      }
      seen += inside;
    }
  }
}

// R of a branch, its moments, and the samples' means of R (those of X were sums).
inline void forward_reduce(const TrainingGroup& group, const ForwardWork& work,
                           const TrainingWeights& weights, int k) {
  const int64_t cp = work.frame.cp, plane = work.frame.height * work.frame.width;
  const Moments moments(work.reduce_moments + k * 2 * cp, cp);
  moments.clear(cp);
  for (int64_t b = 0; b < group.batch; ++b) {
    const RowsOf<Stored> rows = work.rows(b, k);
    float* mean = work.sample_mean(b, k);
    int64_t seen = b * plane;
    for (int64_t first = 0; first < work.pixels; first += kChunkPixels) {
      const int64_t count = smaller(work.pixels - first, kChunkPixels);
      const int64_t inside = work.find_valid(first, count);
      weigh_rows(work, k, rows, first, count, nullptr);
      reduce_rows(work, weights, rows, first, count);
      moments.join(rows.r(first), rows.stride, work.valid, inside, cp, seen);
      add_rows(rows.r(first), rows.stride, count, cp, mean);
      seen += inside;
    }
    for (int64_t i = 0; i < 2 * cp; ++i) mean[i] /= static_cast<float>(plane);
  }
}

// s = softmax(mean y) of a sample and branch.
inline void forward_softmax(const ForwardWork& work, const TrainingWeights& weights, int64_t b,
                            int k, float* softmax) {
  const int64_t c = work.frame.c, cp = work.frame.cp;
  const float* mean = work.sample_mean(b, k);
  const float *scale = work.reduce_scale + k * cp, *shift = work.reduce_shift + k * cp;
  for (int64_t o = 0; o < c; ++o) {
    const float feat = dot(weights.feat + o * cp, mean + cp, cp);
    work.y[o] = scale[o] * mean[o] + shift[o] + weights.alpha[0] * feat;
  }
  take_softmax(work.y, c, softmax);
}

// work.logits += softmax . y of a sample and branch, but for a constant, which is returned.
inline float forward_logits(const ForwardWork& work, const TrainingWeights& weights, int64_t b,
                            int k, const float* softmax) {
  const int64_t c = work.frame.c, cp = work.frame.cp;
  float* vector = work.vector;
  float constant = 0.0f;
  memset(vector, 0, static_cast<size_t>(2 * cp) * sizeof(float));
  for (int64_t o = 0; o < c; ++o) {
    vector[o] = softmax[o] * work.reduce_scale[k * cp + o];
    constant += softmax[o] * work.reduce_shift[k * cp + o];
    add_scaled(weights.alpha[0] * softmax[o], weights.feat + o * cp, cp, vector + cp);
  }
  const RowsOf<Stored> rows = work.rows(b, k);
  for (int64_t i = 0; i < work.pixels; ++i) work.logits[i] += dot(rows.r(i), vector, 2 * cp);
  return constant;
}

inline void forward_readout(const TrainingGroup& group, const ForwardWork& work,
                            const TrainingWeights& weights, const TrainingForward& out) {
  const Frame& f = work.frame;
  const int64_t plane = f.height * f.width;
  const int64_t bytes = plane * (group.map.element == Element::kFloat ? 4 : 2);
  for (int64_t b = 0; b < group.batch; ++b) {
    const int64_t slab = b * group.groups;
    float *softmax1 = out.softmax1 + slab * f.c, *softmax2 = out.softmax2 + slab * f.c;
    forward_softmax(work, weights, b, 0, softmax1);
    forward_softmax(work, weights, b, 1, softmax2);
    memset(work.logits, 0, static_cast<size_t>(work.pixels) * sizeof(float));
    const float constant1 = forward_logits(work, weights, b, 1, softmax1);
    const float constant2 = forward_logits(work, weights, b, 0, softmax2);
    tiles_to_plane(f, work.logits, work.plane);
    for (int64_t i = 0; i < plane; ++i) work.plane[i] += constant1 + constant2;
    store_gates(work.plane, plane, group.map.element, static_cast<char*>(out.w) + slab * bytes);
  }
}

// Mean and centred squares of a branch without padding, for the caller to join.
inline void leave_moments(const Moments& moments, int64_t sections, int64_t c, double* out) {
  for (int64_t i = 0; i < sections * c; ++i) {
    const int64_t at = i / c * padded(c) + i % c;
    out[i] = moments.mean[at];
    out[sections * c + i] = moments.squares[at];
  }
}

inline int64_t forward_scratch(const CrossSpatialShape& shape, int64_t batch) {
  return ForwardWork(shape, batch, nullptr).size;
}

inline void training_forward(const TrainingGroup& group, const float* packed,
                             const TrainingForward& out, float* scratch) {
  const ForwardWork work(group.shape, group.batch, scratch);
  const TrainingWeights weights(const_cast<float*>(packed), work.frame.c, false);
  const int64_t c = work.frame.c, cp = work.frame.cp;
  const int64_t count = group.batch * work.frame.height * work.frame.width;
  const bool whole = out.phase == Phase::kWhole;
  if (!out.kept || out.phase == Phase::kFirst) {
    work.clear_frames();
    forward_features(group, work, weights);
  }
  for (int k = 0; k < 2; ++k) {
    const Moments logits(work.attention_moments + k * 6 * cp, 3 * cp);
    const Moments reduced(work.reduce_moments + k * 2 * cp, cp);
    if (out.phase == Phase::kFirst) {
      leave_moments(logits, 3, c, out.moments + k * 6 * c);
      continue;
    }
    float* mean = out.attention_mean + (whole ? k * 3 * c : 0);
    float* var = out.attention_var + (whole ? k * 3 * c : 0);
    if (whole) store_moments(logits, 3, c, count, mean, var);
    norm_factors(mean, var, group.attention_eps, weights.attention_weight,
                 weights.attention_bias, 3, c, work.scale + k * 3 * cp, work.shift + k * 3 * cp);
    if (!out.kept || out.phase != Phase::kLast) forward_reduce(group, work, weights, k);
    if (out.phase == Phase::kSecond) {
      leave_moments(reduced, 1, c, out.moments + k * 2 * c);
      continue;
    }
    mean = out.reduce_mean + (whole ? k * c : 0);
    var = out.reduce_var + (whole ? k * c : 0);
    if (whole) store_moments(reduced, 1, c, count, mean, var);
    norm_factors(mean, var, group.reduce_eps, weights.reduce_weight, weights.reduce_bias, 1, c,
                 work.reduce_scale + k * cp, work.reduce_shift + k * cp);
  }
  if (whole || out.phase == Phase::kLast) forward_readout(group, work, weights, out);
}
