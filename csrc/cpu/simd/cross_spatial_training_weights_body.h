// Weights of cross_spatial in training: nothing folded, and for the backward the products'
// transposes and the convolutions' mirrors. The products' are in words of slab_*_rows_body.h.
// Included inside the namespace of an instruction-set file, after that.

struct TrainingWeights {
  float *gn_weight, *gn_bias, *conv3x3_bias, *no_bias;            // (c)
  float *attention_weight, *attention_bias;                       // (3c), of the batch norm
  float *reduce_weight, *reduce_bias;                             // (c), of the batch norm
  float* alpha;                                                   // first of a vector
  float* feat;                                                    // (c, c), rows of outputs
  float *conv3x3, *spatial;                                       // (9 or 64, c, c), (64, c, 2c)
  float *spatial1, *attention, *reduce;                           // (c, c), (3c, 3c), (3c, c)
  float *conv3x3_back, *spatial_back;                             // (64, c, c), (64, 2c, c)
  float *spatial1_back, *attention_back, *reduce_back;            // (c, c), (3c, 3c), (c, 3c)
  int64_t size;

  TrainingWeights(float* base, int64_t c, bool backward) {
    const int64_t cp = padded(c), square = c * cp, block = words_of_section(c) * cp;
    size = 0;
    const auto take = [&](int64_t count, bool wanted = true) {
      float* here = base != nullptr && wanted ? base + size : nullptr;
      size += wanted ? count : 0;
      return here;
    };
    gn_weight = take(cp);
    gn_bias = take(cp);
    conv3x3_bias = take(cp);
    no_bias = take(cp);
    reduce_weight = take(cp);
    reduce_bias = take(cp);
    attention_weight = take(3 * cp);
    attention_bias = take(3 * cp);
    alpha = take(kLanes);
    feat = take(square);
    conv3x3 = take((kDirectConv3x3 ? 9 : kPositions) * square);
    spatial = take(kPositions * 2 * square);
    spatial1 = take(block);
    attention = take(9 * block);
    reduce = take(3 * block);
    conv3x3_back = take(kPositions * square, backward);
    spatial_back = take(kPositions * 2 * square, backward);
    spatial1_back = take(block, backward);
    attention_back = take(9 * block, backward);
    reduce_back = take(3 * block, backward);
  }
};

// A group's gradients of the parameters, in the order of the op's results.
struct ParameterGradients {
  float *gn_weight, *gn_bias, *conv3x3_weight, *conv3x3_bias;
  float *spatial1, *spatial3, *spatial5, *attention, *attention_weight, *attention_bias;
  float *reduce, *reduce_weight, *reduce_bias, *feat, *alpha;

  ParameterGradients(float* base, int64_t c) {
    const int64_t square = c * c;
    float* next = base;
    const auto take = [&](int64_t count) {
      float* here = next;
      next += count;
      return here;
    };
    gn_weight = take(c);
    gn_bias = take(c);
    conv3x3_weight = take(9 * square);
    conv3x3_bias = take(c);
    spatial1 = take(square);
    spatial3 = take(9 * square);
    spatial5 = take(25 * square);
    attention = take(9 * square);
    attention_weight = take(3 * c);
    attention_bias = take(3 * c);
    reduce = take(3 * square);
    reduce_weight = take(c);
    reduce_bias = take(c);
    feat = take(square);
    alpha = take(1);
  }
  static int64_t size(int64_t c) { return 57 * c * c + 11 * c + 1; }
};

inline int64_t training_size(int64_t channels, bool backward) {
  return TrainingWeights(nullptr, channels, backward).size;
}

inline void copy_vector(const float* from, int64_t sections, int64_t c, float* to) {
  for (int64_t i = 0; i < sections * c; ++i) to[i / c * padded(c) + i % c] = from[i];
}

inline void pack_backward(const CrossSpatialParameters& p, int64_t c, const TrainingWeights& out) {
  const int64_t vectors = padded(c) / kLanes, cp = padded(c), depth = words_of_section(c);
  pack_winograd(p.conv3x3_weight, c, 3, 3, true, {c, vectors, 0, 0}, out.conv3x3_back);
  pack_winograd(p.spatial_conv3_weight, c, 3, 5, true, {2 * c, vectors, 0, 0}, out.spatial_back);
  pack_winograd(p.spatial_conv5_weight, c, 5, 5, true, {2 * c, vectors, c, 0}, out.spatial_back);
  pack_section(p.spatial_conv1_weight, c, 1, c, {depth, vectors, 0, 0}, out.spatial1_back);
  for (int64_t from = 0; from < 3; ++from) {
    pack_section(p.reduce_weight + from * c, c, 1, 3 * c, {depth, 3 * vectors, 0, from * cp},
                 out.reduce_back);
    for (int64_t to = 0; to < 3; ++to) {  // Wa[to section][from section], transposed
      pack_section(p.attention_weight + to * c * 3 * c + from * c, c, 1, 3 * c,
                   {3 * depth, 3 * vectors, to * depth, from * cp}, out.attention_back);
    }
  }
}

inline void pack_training(const CrossSpatialParameters& p, int64_t c, bool backward,
                          float* packed) {
  const TrainingWeights out(packed, c, backward);
  memset(packed, 0, static_cast<size_t>(out.size) * sizeof(float));
  const int64_t vectors = padded(c) / kLanes, cp = padded(c), depth = words_of_section(c);
  copy_vector(p.gn_weight, 1, c, out.gn_weight);
  copy_vector(p.gn_bias, 1, c, out.gn_bias);
  copy_vector(p.conv3x3_bias, 1, c, out.conv3x3_bias);
  copy_vector(p.attention_bn_weight, 3, c, out.attention_weight);
  copy_vector(p.attention_bn_bias, 3, c, out.attention_bias);
  copy_vector(p.reduce_bn_weight, 1, c, out.reduce_weight);
  copy_vector(p.reduce_bn_bias, 1, c, out.reduce_bias);
  out.alpha[0] = p.alpha[0];
  for (int64_t o = 0; o < c; ++o) {
    copy_vector(p.channel_feat_weight + o * c, 1, c, out.feat + o * cp);
  }
  if (kDirectConv3x3) {
    pack_direct(p.conv3x3_weight, c, 9, out.conv3x3);
  } else {
    pack_winograd(p.conv3x3_weight, c, 3, 3, false, {c, vectors, 0, 0}, out.conv3x3);
  }
  pack_winograd(p.spatial_conv3_weight, c, 3, 5, false, {c, 2 * vectors, 0, 0}, out.spatial);
  pack_winograd(p.spatial_conv5_weight, c, 5, 5, false, {c, 2 * vectors, 0, cp}, out.spatial);
  pack_section(p.spatial_conv1_weight, c, c, 1, {depth, vectors, 0, 0}, out.spatial1);
  for (int64_t from = 0; from < 3; ++from) {
    pack_section(p.reduce_weight + from * c, c, 3 * c, 1, {3 * depth, vectors, from * depth, 0},
                 out.reduce);
    for (int64_t to = 0; to < 3; ++to) {
      pack_section(p.attention_weight + to * c * 3 * c + from * c, c, 3 * c, 1,
                   {3 * depth, 3 * vectors, from * depth, to * cp}, out.attention);
    }
  }
  if (backward) pack_backward(p, c, out);
}
