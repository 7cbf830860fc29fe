// The backward of a group of cross_spatial on one core, after cross_spatial_training_body.h. Maps
// are recomputed from e and the vectors; between its passes over the samples sums must be known:
//
//   1. f, L, R, X of both branches; per sample the sums of R, X and of g R, g X, where
//      g = grad_w w (1 - w). As grad_y = s_other g + m (m constant over a sample's pixels), they
//      give the gradients of softmax, of alpha, Wc and R's batch norm, and
//      grad_R = P g + Q + T R with constants P, Q of a sample and T of the group.
//   2. grad_Af = Wr^T grad_R, grad_Wr, and the two sums of L's batch norm.
//   3. grad_L, grad_Wa, grad_f = grad_Af A + Wa^T grad_L, then the convolutions: grad_X by tiles
//      with mirrored kernels, their weights' gradients by tiles too (slab_gradients_body.h), and
//      what is left of a sample: grad_e by conv3x3 and the group norm, gates, statistics.
//
// Scratch  the rows of the forward, plus three framed maps and one of 2c channels.
// Sums     weights' gradients float32 over all pixels of the group, by blocks; sums of a sample
//          float32 by chunks; what joins samples float64. Everything in a fixed order.

struct BackwardWork : TrainingWork {
  Frame wide;                      // 2c channels: gradients of f3 and f5
  float *grad_f, *grad_x1, *grad_x2, *grad_e;
  float* g;                        // (B, pixels), in the order of tiles
  double* g_sum;                   // (B)
  float *sums, *g_sums;            // (B, 2, 2cp): of R and X, plain and times g
  float *p, *q;                    // (B, 2, cp)
  float* t;                        // (2, cp)
  float *feat_g, *feat;            // (B, 2, cp): grad_X of alpha Wc X is feat_g g + feat
  float *attention, *grad_af, *grad_rows, *through;  // of a chunk; through: grad_X by way of k1
  Stored *grad_r, *grad_l, *grad_f1;                 // of a chunk, to be multiplied
  float *left_words, *right_words;                   // of a chunk, along the pixels
  float *z_scale, *z_shift;        // (2, 3cp): normalised L
  float *norm_sum, *norm_dot;      // (3cp): of grad A and grad A times normalised L, of a branch
  float *l_shift, *l_slope;        // (2, 3cp): grad_L = scale grad_A + l_shift + l_slope L
  float *sums5, *sums3;            // (64, c, 2cp), (64, c, cp): transformed weight gradients
  float *grad_attention, *grad_reduce, *grad_spatial1, *grad_feat;  // (3c, 3cp) (c, 3cp) (c, cp)
  float* gate_grads;               // as gates
  int64_t zero_from, zero_to;      // what must be zero at the start: accumulators, frames, padding

  BackwardWork(const CrossSpatialShape& shape, int64_t samples, float* memory)
      : TrainingWork(shape, samples, memory),
        wide(2 * frame.cp, frame.height, frame.width) {
    const int64_t c = frame.c, cp = frame.cp;
    g = take(batch * pixels);
    g_sum = reinterpret_cast<double*>(take(2 * batch));
    feat_g = take(batch * 2 * cp);
    feat = take(batch * 2 * cp);
    attention = take(kChunkPixels * 3 * cp);
    grad_af = take(kChunkPixels * 3 * cp);
    grad_rows = take(kChunkPixels * 3 * cp);
    through = take(kChunkPixels * cp);
    grad_r = take_stored(kChunkPixels * cp);
    grad_l = take_stored(kChunkPixels * 3 * cp);
    grad_f1 = take_stored(kChunkPixels * cp);
    left_words = take(pixel_words_size(3 * cp));
    right_words = take(pixel_words_size(3 * cp));
    z_scale = take(6 * cp);
    z_shift = take(6 * cp);
    norm_sum = take(3 * cp);
    norm_dot = take(3 * cp);
    gate_grads = take(Gates::size(frame));
    zero_from = size;
    p = take(batch * 2 * cp);
    q = take(batch * 2 * cp);
    t = take(2 * cp);
    l_shift = take(6 * cp);
    l_slope = take(6 * cp);
    grad_f = take(wide.size());
    grad_x1 = take(frame.size());
    grad_x2 = take(frame.size());
    grad_e = take(frame.size());
    sums = take(batch * 4 * cp);
    g_sums = take(batch * 4 * cp);
    sums5 = take(kPositions * c * 2 * cp);
    sums3 = take(kPositions * c * cp);
    grad_attention = take(3 * c * 3 * cp);
    grad_reduce = take(c * 3 * cp);
    grad_spatial1 = take(c * cp);
    grad_feat = take(c * cp);
    zero_to = size;
  }
  int64_t of(int64_t sample, int branch) const { return (sample * 2 + branch) * frame.cp; }
};

struct BackwardTask {
  const TrainingGroup& group;
  const TrainingBackward& io;
  const BackwardWork& work;
  const TrainingWeights& weights;
  const ParameterGradients& grads;
};

// sum += factor[i] * row i
template <class T>
inline void add_weighted_rows(const T* rows, int64_t stride, const float* factor,
                              int64_t count, int64_t columns, float* sum) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    Floats even = Simd::zero(), odd = Simd::zero();
    for (int64_t i = 0; i + 2 <= count; i += 2) {
      even = Simd::fma(Simd::set(factor[i]), Simd::load(rows + i * stride + c), even);
      odd = Simd::fma(Simd::set(factor[i + 1]), Simd::load(rows + (i + 1) * stride + c), odd);
    }
    Simd::store(sum + c, Simd::add(Simd::load(sum + c), Simd::add(even, odd)));
  }
}

// g of a sample, zero outside the map (chunks hold an even number of pixels).
inline void load_g(const BackwardTask& task, int64_t sample) {
  const Frame& f = task.work.frame;
  const int64_t plane = f.height * f.width;
  const float* grad = task.io.grad_w + sample * task.group.groups * plane;
  const float* w = task.io.w + sample * task.group.groups * plane;
  float* g = task.work.g + sample * task.work.pixels;
  memset(g, 0, static_cast<size_t>(task.work.pixels) * sizeof(float));
  double total = 0.0;
  for (int64_t y = 0; y < f.height; ++y) {
    for (int64_t x = 0; x < f.width; ++x) {
      const int64_t i = y * f.width + x;
      const float value = grad[i] * w[i] * (1.0f - w[i]);
      g[tile_place(f, y, x)] = value;
      total += value;
    }
  }
  task.work.g_sum[sample] = total;
}

// Pass 1.
inline void backward_recompute(const BackwardTask& task) {
  const BackwardWork& work = task.work;
  const int64_t cp = work.frame.cp;
  for (int64_t b = 0; b < work.batch; ++b) {
    load_sample(task.group, work, task.weights, b);
    load_g(task, b);
    for (int64_t first = 0; first < work.pixels; first += kChunkPixels) {
      const int64_t count = smaller(work.pixels - first, kChunkPixels);
      for (int k = 0; k < 2; ++k) {
        const RowsOf<Stored> rows = work.rows(b, k);
        fill_rows(work, task.weights, k == 0 ? work.x1 : work.x2, rows, first, count);
        weigh_rows(work, k, rows, first, count, nullptr);
        reduce_rows(work, task.weights, rows, first, count);
        const float* g = work.g + b * work.pixels + first;
        float *sums = work.sums + 2 * work.of(b, k), *g_sums = work.g_sums + 2 * work.of(b, k);
        const ExactRows x = work.exact_x(rows, first);
        add_rows(rows.r(first), rows.stride, count, cp, sums);
        add_rows(x.at, x.stride, count, cp, sums + cp);
        add_weighted_rows(rows.r(first), rows.stride, g, count, cp, g_sums);
        add_weighted_rows(x.at, x.stride, g, count, cp, g_sums + cp);
      }
    }
  }
}

inline double dot_double(const float* a, const float* b, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

// Statistics of R's batch norm in a branch.
struct ReduceNorm {
  const float *mean, *var;
  double eps;

  ReduceNorm(const BackwardTask& task, int k)
      : mean(task.io.reduce_mean + (task.io.shared ? 0 : k * task.work.frame.c)),
        var(task.io.reduce_var + (task.io.shared ? 0 : k * task.work.frame.c)),
        eps(task.group.reduce_eps) {}
  double inverse(int64_t c) const { return 1.0 / sqrt(static_cast<double>(var[c]) + eps); }
};

// m of a sample's branch into work.q: s (h - s.h) / (H W) with h = sum of g y of the other branch.
inline void softmax_gradient(const BackwardTask& task, int64_t b, int k) {
  const BackwardWork& work = task.work;
  const TrainingWeights& weights = task.weights;
  const int64_t c = work.frame.c, cp = work.frame.cp;
  const int64_t slab = b * task.group.groups * c;
  const float* s = (k == 0 ? task.io.softmax1 : task.io.softmax2) + slab;
  const ReduceNorm norm(task, 1 - k);
  const float* g_sums = work.g_sums + 2 * work.of(b, 1 - k);
  float* m = work.q + work.of(b, k);
  double inner = 0.0;
  for (int64_t o = 0; o < c; ++o) {
    const double n = norm.inverse(o) * (g_sums[o] - norm.mean[o] * work.g_sum[b]);
    const double feat = dot_double(weights.feat + o * cp, g_sums + cp, c);
    const double h = weights.reduce_weight[o] * n + weights.reduce_bias[o] * work.g_sum[b] +
                     weights.alpha[0] * feat;
    m[o] = static_cast<float>(h);
    inner += s[o] * h;
  }
  const double plane = static_cast<double>(work.frame.height * work.frame.width);
  for (int64_t o = 0; o < c; ++o) m[o] = static_cast<float>(s[o] * (m[o] - inner) / plane);
}

// Gradients of alpha and Wc of a sample's branch, and those of X through them.
inline void feat_gradient(const BackwardTask& task, int64_t b, int k, const float* s,
                          double& alpha) {
  const BackwardWork& work = task.work;
  const TrainingWeights& weights = task.weights;
  const int64_t c = work.frame.c, cp = work.frame.cp;
  const float *x = work.sums + 2 * work.of(b, k) + cp, *gx = work.g_sums + 2 * work.of(b, k) + cp;
  const float* m = work.q + work.of(b, k);
  float *feat_g = work.feat_g + work.of(b, k), *feat = work.feat + work.of(b, k);
  memset(feat_g, 0, static_cast<size_t>(cp) * sizeof(float));
  memset(feat, 0, static_cast<size_t>(cp) * sizeof(float));
  for (int64_t o = 0; o < c; ++o) {
    const float* row = weights.feat + o * cp;
    alpha += s[o] * dot_double(row, gx, c) + m[o] * dot_double(row, x, c);
    add_scaled(weights.alpha[0] * s[o], gx, cp, work.grad_feat + o * cp);
    add_scaled(weights.alpha[0] * m[o], x, cp, work.grad_feat + o * cp);
    add_scaled(weights.alpha[0] * s[o], row, cp, feat_g);
    add_scaled(weights.alpha[0] * m[o], row, cp, feat);
  }
}

// Sums over a branch's samples of grad_y and grad_y times the normalised R, of channel o.
struct NormSums {
  double sum = 0.0, dotted = 0.0;

  NormSums(const BackwardTask& task, const ReduceNorm& norm, int k, int64_t o) {
    const BackwardWork& work = task.work;
    const double plane = static_cast<double>(work.frame.height * work.frame.width);
    const double inverse = norm.inverse(o), mean = norm.mean[o];
    const float* softmax = k == 0 ? task.io.softmax2 : task.io.softmax1;
    for (int64_t b = 0; b < work.batch; ++b) {
      const double s = softmax[b * task.group.groups * work.frame.c + o];
      const double m = work.q[work.of(b, k) + o];
      const double gr = work.g_sums[2 * work.of(b, k) + o], r = work.sums[2 * work.of(b, k) + o];
      sum += s * work.g_sum[b] + m * plane;
      dotted += inverse * (s * (gr - mean * work.g_sum[b]) + m * (r - mean * plane));
    }
  }
};

// P, Q and T of a branch, and the gradients of R's batch norm.
inline void reduce_norm_gradient(const BackwardTask& task, int k) {
  const BackwardWork& work = task.work;
  const int64_t c = work.frame.c, cp = work.frame.cp;
  const ReduceNorm norm(task, k);
  const float* softmax = k == 0 ? task.io.softmax2 : task.io.softmax1;
  for (int64_t o = 0; o < c; ++o) {
    const double inverse = norm.inverse(o), mean = norm.mean[o];
    const NormSums own(task, norm, k, o);
    task.grads.reduce_weight[o] += static_cast<float>(own.dotted);
    task.grads.reduce_bias[o] += static_cast<float>(own.sum);
    const double* totals = task.io.reduce_totals;
    const double scale = task.weights.reduce_weight[o] * inverse;
    double middle = 0.0, away = 0.0;
    if (!task.io.constants) {  // a product with 0 would pass one sample's NaN to all
      middle = (totals != nullptr ? totals[o] : own.sum) / task.io.count;
      away = (totals != nullptr ? totals[c + o] : own.dotted) / task.io.count;
    }
    work.t[k * cp + o] = static_cast<float>(-scale * inverse * away);
    for (int64_t b = 0; b < work.batch; ++b) {
      const double s = softmax[b * task.group.groups * c + o], m = work.q[work.of(b, k) + o];
      work.p[work.of(b, k) + o] = static_cast<float>(scale * s);
      work.q[work.of(b, k) + o] =
          static_cast<float>(scale * (m - middle + inverse * mean * away));
    }
  }
}

// What a sample's sums give: m of the softmax, and the gradients of alpha and Wc.
inline void backward_samples(const BackwardTask& task) {
  const BackwardWork& work = task.work;
  double alpha = 0.0;
  for (int64_t b = 0; b < work.batch; ++b) {
    const int64_t slab = b * task.group.groups * work.frame.c;
    for (int k = 0; k < 2; ++k) {
      softmax_gradient(task, b, k);
      feat_gradient(task, b, k, (k == 0 ? task.io.softmax2 : task.io.softmax1) + slab, alpha);
    }
  }
  task.grads.alpha[0] = static_cast<float>(alpha);
}

// R's batch norm: its gradient, or in the first phase the sums that the groups join.
inline void backward_join(const BackwardTask& task) {
  const BackwardWork& work = task.work;
  for (int k = 0; k < 2; ++k) {
    if (task.io.phase != Phase::kFirst) {
      reduce_norm_gradient(task, k);
      continue;
    }
    const ReduceNorm norm(task, k);
    const int64_t c = work.frame.c;
    for (int64_t o = 0; o < c; ++o) {
      const NormSums own(task, norm, k, o);
      task.io.norm_sums[o] = own.sum + (k == 0 ? 0.0 : task.io.norm_sums[o]);
      task.io.norm_sums[c + o] = own.dotted + (k == 0 ? 0.0 : task.io.norm_sums[c + o]);
    }
  }
}

// grad_R and grad_Af of a chunk; A and A f too.
inline void weighted_gradient(const BackwardTask& task, int64_t b, int k, int64_t first,
                              int64_t count) {
  const BackwardWork& work = task.work;
  const int64_t cp = work.frame.cp;
  const RowsOf<Stored> rows = work.rows(b, k);
  weigh_rows(work, k, rows, first, count, work.attention);
  const float* g = work.g + b * work.pixels + first;
  for (int64_t c = 0; c < cp; c += kLanes) {
    const Floats p = Simd::load(work.p + work.of(b, k) + c);
    const Floats q = Simd::load(work.q + work.of(b, k) + c), t = Simd::load(work.t + k * cp + c);
    for (int64_t i = 0; i < count; ++i) {
      const Floats r = Simd::load(rows.r(first + i) + c);
      put(work.grad_r + i * cp + c, Simd::fma(p, Simd::set(g[i]), Simd::fma(t, r, q)));
    }
  }
  multiply_rows(work.frame, work.grad_r, cp, 1, count, task.weights.reduce_back, 3 * cp / kLanes,
                Store{work.grad_af, 3 * cp});
}

// grad_A = grad_Af f A (1 - A), where a chunk's A, A f and grad_Af are at hand.
CIEMA_INLINE Floats gate_gradient(const BackwardWork& work, int64_t at) {
  const Floats rest = Simd::sub(Simd::set(1.0f), Simd::load(work.attention + at));
  return Simd::mul(Simd::mul(Simd::load(work.grad_af + at), Simd::load(work.weighted + at)), rest);
}

// Pass 2 of a branch: grad_Wr, and the sums of L's batch norm.
inline void backward_weights(const BackwardTask& task, int k) {
  const BackwardWork& work = task.work;
  const int64_t cp = work.frame.cp, columns = 3 * cp;
  memset(work.norm_sum, 0, static_cast<size_t>(columns) * sizeof(float));
  memset(work.norm_dot, 0, static_cast<size_t>(columns) * sizeof(float));
  const float *z_scale = work.z_scale + k * columns, *z_shift = work.z_shift + k * columns;
  for (int64_t b = 0; b < work.batch; ++b) {
    const RowsOf<Stored> rows = work.rows(b, k);
    for (int64_t first = 0; first < work.pixels; first += kChunkPixels) {
      const int64_t count = smaller(work.pixels - first, kChunkPixels);
      weighted_gradient(task, b, k, first, count);
      const PixelWords left = pixel_words(work.grad_r, cp, count, cp, work.left_words);
      const PixelWords right = pixel_words(work.weighted, columns, count, columns,
                                           work.right_words);
      add_outer<StoredWords>(left.at, left.stride, work.frame.c, right.at, right.stride,
                             columns / kLanes, count / kPerWord, work.grad_reduce, columns);
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Floats slope = Simd::load(z_scale + c), start = Simd::load(z_shift + c);
        Floats sum = Simd::zero(), dotted = Simd::zero();
        for (int64_t i = 0; i < count; ++i) {
          const Floats grad = gate_gradient(work, i * columns + c);
          const Floats z = Simd::fma(Simd::load(rows.l(first + i) + c), slope, start);
          sum = Simd::add(sum, grad);
          dotted = Simd::fma(grad, z, dotted);
        }
        Simd::store(work.norm_sum + c, Simd::add(Simd::load(work.norm_sum + c), sum));
        Simd::store(work.norm_dot + c, Simd::add(Simd::load(work.norm_dot + c), dotted));
      }
    }
  }
}

// From those sums: the gradients of L's batch norm; in the second phase left to be joined.
inline void attention_norm_gradient(const BackwardTask& task, int k) {
  const BackwardWork& work = task.work;
  const int64_t c = work.frame.c, cp = work.frame.cp;
  for (int64_t i = 0; i < 3 * c; ++i) {
    const int64_t at = i / c * cp + i % c;
    task.grads.attention_weight[i] += work.norm_dot[at];
    task.grads.attention_bias[i] += work.norm_sum[at];
    if (task.io.phase != Phase::kSecond) continue;
    double* sums = task.io.norm_sums;
    sums[i] = work.norm_sum[at] + (k == 0 ? 0.0 : sums[i]);
    sums[3 * c + i] = work.norm_dot[at] + (k == 0 ? 0.0 : sums[3 * c + i]);
  }
}

// grad_L as a function of grad_A and L.
inline void attention_norm_factors(const BackwardTask& task, int k) {
  if (task.io.constants) return;
  const BackwardWork& work = task.work;
  const int64_t c = work.frame.c, cp = work.frame.cp;
  const double* totals = task.io.attention_totals;
  for (int64_t i = 0; i < 3 * c; ++i) {
    const int64_t at = i / c * cp + i % c;
    const double scale = work.scale[k * 3 * cp + at];
    const double middle = (totals != nullptr ? totals[i] : work.norm_sum[at]) / task.io.count;
    const double away = (totals != nullptr ? totals[3 * c + i] : work.norm_dot[at]) / task.io.count;
    const double z_scale = work.z_scale[k * 3 * cp + at], z_shift = work.z_shift[k * 3 * cp + at];
    work.l_shift[k * 3 * cp + at] = static_cast<float>(-scale * (middle + z_shift * away));
    work.l_slope[k * 3 * cp + at] = static_cast<float>(-scale * z_scale * away);
  }
}
