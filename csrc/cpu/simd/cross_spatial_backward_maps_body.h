// Pass 3 of the backward of cross_spatial: from grad_L to the maps' and the weights' gradients.
// Included after cross_spatial_backward_body.h.

// grad_f = sum + grad_Af A
struct AddWeighted {
  const float *grad_af, *attention;
  float* out;
  int64_t stride;

  template <int M, int N>
  CIEMA_INLINE void operator()(const Floats (&sum)[M][N], int64_t row, int64_t vector) const {
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) {
        const int64_t at = (row + m) * stride + (vector + n) * kLanes;
        Simd::store(out + at, Simd::fma(Simd::load(grad_af + at), Simd::load(attention + at),
                                        sum[m][n]));
      }
    }
  }
};

// From work.grad_rows: grad_k1 and through it grad_X, into work.through.
inline void backward_spatial1(const BackwardTask& task, const Stored* x, int64_t stride,
                              int64_t count) {
  const BackwardWork& work = task.work;
  const int64_t cp = work.frame.cp;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t at = 0; at < cp; at += kLanes) {
      put(work.grad_f1 + i * cp + at, Simd::load(work.grad_rows + i * 3 * cp + at));
    }
  }
  const PixelWords left = pixel_words(work.grad_f1, cp, count, cp, work.left_words);
  const PixelWords right = pixel_words(x, stride, count, cp, work.right_words);
  add_outer<StoredWords>(left.at, left.stride, work.frame.c, right.at, right.stride, cp / kLanes,
                         count / kPerWord, work.grad_spatial1, cp);
  multiply_rows(work.frame, work.grad_f1, cp, 1, count, task.weights.spatial1_back, cp / kLanes,
                Store{work.through, cp});
}

// A chunk: grad_L, grad_Wa, grad_f, grad_k1; grad_f3 and grad_f5 into their map, and grad_X as far
// as it comes through k1 and Wc.
inline void backward_chunk(const BackwardTask& task, int64_t b, int k, int64_t first,
                           int64_t count, float* grad_x) {
  const BackwardWork& work = task.work;
  const int64_t c = work.frame.c, cp = work.frame.cp, columns = 3 * cp;
  const RowsOf<Stored> rows = work.rows(b, k);
  weighted_gradient(task, b, k, first, count);
  for (int64_t at = 0; at < columns; at += kLanes) {
    const Floats scale = Simd::load(work.scale + k * columns + at);
    const Floats shift = Simd::load(work.l_shift + k * columns + at);
    const Floats slope = Simd::load(work.l_slope + k * columns + at);
    for (int64_t i = 0; i < count; ++i) {
      const Floats rest = Simd::fma(Simd::load(rows.l(first + i) + at), slope, shift);
      put(work.grad_l + i * columns + at,
          Simd::fma(gate_gradient(work, i * columns + at), scale, rest));
    }
  }
  const PixelWords grad_l = pixel_words(work.grad_l, columns, count, columns, work.left_words);
  const PixelWords features = pixel_words(rows.f(first), rows.stride, count, columns,
                                          work.right_words);
  for (int64_t section = 0; section < 3; ++section) {
    add_outer<StoredWords>(grad_l.at + section * cp, grad_l.stride, c, features.at,
                           features.stride, columns / kLanes, count / kPerWord,
                           work.grad_attention + section * c * columns, columns);
  }
  multiply_rows(work.frame, work.grad_l, columns, 3, count, task.weights.attention_back,
                columns / kLanes,
                AddWeighted{work.grad_af, work.attention, work.grad_rows, columns});
  backward_spatial1(task, rows.x(first), rows.stride, count);
  const float* g = work.g + b * work.pixels + first;
  const float *feat_g = work.feat_g + work.of(b, k), *feat = work.feat + work.of(b, k);
  const int64_t inside = work.find_valid(first, count);
  for (int64_t j = 0; j < inside; ++j) {
    const int64_t i = work.valid[j], tile = (first + i) / kTilePixels;
    const int64_t place = (first + i) % kTilePixels;
    const int64_t y = tile / work.frame.tiles_x * kOutputs5 + place / kOutputs5;
    const int64_t x = tile % work.frame.tiles_x * kOutputs5 + place % kOutputs5;
    float* to = work.grad_f + work.wide.at(y, x);
    for (int64_t at = 0; at < 2 * cp; at += kLanes) {
      Simd::store(to + at, Simd::load(work.grad_rows + i * columns + cp + at));
    }
    to = grad_x + work.frame.at(y, x);
    for (int64_t at = 0; at < cp; at += kLanes) {
      const Floats by_feat = Simd::fma(Simd::load(feat_g + at), Simd::set(g[i]),
                                       Simd::load(feat + at));
      Simd::store(to + at, Simd::add(Simd::load(work.through + i * cp + at), by_feat));
    }
  }
}

// grad_X += the convolutions' gradient for their input, from work.grad_f; and the weights' sums.
inline void backward_tiles(const BackwardTask& task, const float* map, float* grad_x) {
  const BackwardWork& work = task.work;
  const Frame& f = work.frame;
  const Cut cut = cut5(f);
  const Sections sections(f.cp);
  for (int64_t first = 0; first < cut.count; first += kChunkTiles) {
    const int64_t count = smaller(cut.count - first, kChunkTiles);
    transform_tiles(work.wide, work.tiles, work.grad_f, cut, first, count);
    multiply_tiles(work.tiles, 2 * f.cp, sections.taps(2), f.c, count, task.weights.spatial_back,
                   f.cp / kLanes);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t y0 = (first + t) / cut.across * kOutputs5;
      const int64_t x0 = (first + t) % cut.across * kOutputs5;
      const int64_t ys = smaller(f.height - y0, kOutputs5), xs = smaller(f.width - x0, kOutputs5);
      for (int64_t c = 0; c < f.cp; c += kLanes) {
        Floats out[kOutputs5][kOutputs5];
        output_transform<kOutputs5>(work.tiles.out + t * f.cp + c, work.tiles.stride_out, out);
        for (int64_t y = 0; y < ys; ++y) {
          float* at = grad_x + f.at(y0 + y, x0) + c;
          for (int64_t x = 0; x < xs; ++x, at += f.cp) {
            Simd::store(at, Simd::add(Simd::load(at), out[y][x]));
          }
        }
      }
    }
    transform_tiles(f, work.tiles, map, cut, first, count);
    add_weight_gradients<kOutputs5>(f, work.wide, work.tiles, work.grad_f, cut, first, count,
                                    work.sums5);
  }
}

// The 3x3 convolution that made x2: its weights' sums, its bias, and grad_e.
inline void backward_conv3x3(const BackwardTask& task) {
  const BackwardWork& work = task.work;
  const Frame& f = work.frame;
  const Cut cut = cut3(f);
  for (int64_t first = 0; first < cut.count; first += kChunkTiles) {
    const int64_t count = smaller(cut.count - first, kChunkTiles);
    transform_tiles(f, work.tiles, work.e, cut, first, count);
    add_weight_gradients<kOutputs3>(f, f, work.tiles, work.grad_x2, cut, first, count, work.sums3);
  }
  float* sum = work.gate_grads;
  memset(sum, 0, static_cast<size_t>(f.cp) * sizeof(float));
  for (int64_t y = 0; y < f.height; ++y) {
    add_rows(work.grad_x2 + f.at(y, 0), f.cp, f.width, f.cp, sum);
  }
  for (int64_t c = 0; c < f.c; ++c) task.grads.conv3x3_bias[c] += sum[c];
  conv3x3_tiles(f, work.tiles, work.grad_x2, task.weights.conv3x3_back, task.weights.no_bias,
                work.grad_e);
}

// x1 = GN(u), u = e alpha_h alpha_w: into grad_e, the gates' and the statistics' gradients.
inline void backward_norm(const BackwardTask& task, int64_t sample) {
  const BackwardWork& work = task.work;
  const Frame& f = work.frame;
  const Gates gates(f, work.gates), grads(f, work.gate_grads);
  memset(work.gate_grads, 0, static_cast<size_t>(Gates::size(f)) * sizeof(float));
  for (int64_t c = 0; c < f.cp; c += kLanes) {
    const Floats rstd = Simd::load(gates.rstd + c), mean = Simd::load(gates.mean + c);
    const Floats slope = Simd::mul(rstd, Simd::load(task.weights.gn_weight + c));
    Floats total = Simd::zero(), centred = Simd::zero();
    for (int64_t y = 0; y < f.height; ++y) {
      const Floats row = Simd::load(gates.rows + y * f.cp + c);
      Floats row_sum = Simd::zero(), row_total = Simd::zero(), row_centred = Simd::zero();
      for (int64_t x = 0; x < f.width; ++x) {
        const int64_t at = f.at(y, x) + c;
        const Floats e = Simd::load(work.e + at), grad = Simd::load(work.grad_x1 + at);
        const Floats column = Simd::load(gates.columns + x * f.cp + c);
        const Floats gate = Simd::mul(row, column), grad_u = Simd::mul(grad, slope);
        row_total = Simd::add(row_total, grad);
        row_centred = Simd::fma(grad, Simd::sub(gated(e, row, column), mean), row_centred);
        Simd::store(work.grad_e + at, Simd::fma(grad_u, gate, Simd::load(work.grad_e + at)));
        const Floats through = Simd::mul(grad_u, e);
        row_sum = Simd::fma(through, column, row_sum);
        float* columns = grads.columns + x * f.cp + c;
        Simd::store(columns, Simd::fma(through, row, Simd::load(columns)));
      }
      Simd::store(grads.rows + y * f.cp + c, row_sum);
      total = Simd::add(total, row_total);
      centred = Simd::add(centred, row_centred);
    }
    Simd::store(grads.mean + c, total);
    Simd::store(grads.rstd + c, centred);
  }
  const int64_t slab = sample * task.group.groups * f.c;
  for (int64_t c = 0; c < f.c; ++c) {
    const float total = grads.mean[c], centred = grads.rstd[c], weight = task.weights.gn_weight[c];
    task.grads.gn_weight[c] += centred * gates.rstd[c];
    task.grads.gn_bias[c] += total;
    task.io.grad_mean[slab + c] = -total * weight * gates.rstd[c];
    task.io.grad_rstd[slab + c] = centred * weight;
  }
  to_channel_major(f, grads.rows, f.height, task.io.grad_alpha_h + slab * f.height);
  to_channel_major(f, grads.columns, f.width, task.io.grad_alpha_w + slab * f.width);
}

// Pass 3 of a branch and sample, up to grad_X.
inline void backward_branch(const BackwardTask& task, int64_t b, int k) {
  const BackwardWork& work = task.work;
  float* grad_x = k == 0 ? work.grad_x1 : work.grad_x2;
  for (int64_t first = 0; first < work.pixels; first += kChunkPixels) {
    backward_chunk(task, b, k, first, smaller(work.pixels - first, kChunkPixels), grad_x);
  }
  backward_tiles(task, k == 0 ? work.x1 : work.x2, grad_x);
}

inline void backward_sample(const BackwardTask& task, int64_t b) {
  const BackwardWork& work = task.work;
  load_map(task.group, work, b);
  restore_map(work.frame, work.rows(b, 0), work.x1);
  restore_map(work.frame, work.rows(b, 1), work.x2);
  backward_branch(task, b, 1);
  backward_conv3x3(task);
  backward_branch(task, b, 0);
  backward_norm(task, b);
  SlabMap grad_e = task.io.grad_e;
  grad_e.e = static_cast<const char*>(grad_e.e) + b * task.io.grad_sample_bytes;
  unpack_map(work.grad_e, work.frame, grad_e);
}

inline void copy_matrix(const float* from, int64_t rows, int64_t sections, int64_t c, float* to) {
  const int64_t cp = padded(c);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < sections * c; ++i) {
      to[r * sections * c + i] = from[r * sections * cp + i / c * cp + i % c];
    }
  }
}

inline void finish_parameters(const BackwardTask& task) {
  const BackwardWork& work = task.work;
  const ParameterGradients& grads = task.grads;
  const int64_t c = work.frame.c, cp = work.frame.cp;
  finish_weight_gradient<5>(work.sums5, c, 2 * cp, 0, 3, grads.spatial3);
  finish_weight_gradient<5>(work.sums5, c, 2 * cp, cp, 5, grads.spatial5);
  finish_weight_gradient<3>(work.sums3, c, cp, 0, 3, grads.conv3x3_weight);
  copy_matrix(work.grad_spatial1, c, 1, c, grads.spatial1);
  copy_matrix(work.grad_attention, 3 * c, 3, c, grads.attention);
  copy_matrix(work.grad_reduce, c, 3, c, grads.reduce);
  copy_matrix(work.grad_feat, c, 1, c, grads.feat);
}

// Scales and shifts of L's batch norm, with and without its own weight and bias.
inline void load_attention_norm(const BackwardTask& task) {
  const BackwardWork& work = task.work;
  const int64_t c = work.frame.c, columns = 3 * work.frame.cp;
  float *one = work.norm_sum, *none = work.norm_dot;
  for (int64_t i = 0; i < columns; ++i) {
    one[i] = 1.0f;
    none[i] = 0.0f;
  }
  for (int k = 0; k < 2; ++k) {
    const int64_t from = task.io.shared ? 0 : k * 3 * c;
    const float *mean = task.io.attention_mean + from, *var = task.io.attention_var + from;
    const double eps = task.group.attention_eps;
    norm_factors(mean, var, eps, task.weights.attention_weight, task.weights.attention_bias, 3, c,
                 work.scale + k * columns, work.shift + k * columns);
    norm_factors(mean, var, eps, one, none, 3, c, work.z_scale + k * columns,
                 work.z_shift + k * columns);
  }
}

inline int64_t backward_scratch(const CrossSpatialShape& shape, int64_t batch) {
  return BackwardWork(shape, batch, nullptr).size;
}

inline void training_backward(const TrainingGroup& group, const float* packed,
                              const TrainingBackward& io, float* scratch) {
  const BackwardWork work(group.shape, group.batch, scratch);
  const TrainingWeights weights(const_cast<float*>(packed), work.frame.c, true);
  const ParameterGradients grads(io.parameters, work.frame.c);
  const BackwardTask task = {group, io, work, weights, grads};
  const bool kept = io.kept && io.phase != Phase::kFirst;
  if (!kept) {
    work.clear_frames();
    memset(scratch + work.zero_from, 0,
           static_cast<size_t>(work.zero_to - work.zero_from) * sizeof(float));
    memset(io.parameters, 0,
           static_cast<size_t>(ParameterGradients::size(work.frame.c)) * sizeof(float));
    load_attention_norm(task);
    backward_recompute(task);
    backward_samples(task);
  }
  const bool last = kept && io.phase == Phase::kLast;
  if (!last) backward_join(task);
  if (io.phase == Phase::kFirst) return;
  for (int k = 0; k < 2; ++k) {
    if (!last) {
      backward_weights(task, k);
      attention_norm_gradient(task, k);
    }
    if (io.phase != Phase::kSecond) attention_norm_factors(task, k);
  }
  if (io.phase == Phase::kSecond) return;
  for (int64_t b = 0; b < group.batch; ++b) backward_sample(task, b);
  finish_parameters(task);
}
