// Weights of cross_spatial as its kernels read them: batch norms folded, the convolutions' kernels
// transformed in float64, everything padded to whole vectors and cut into panels.
// Included inside the namespace of an instruction-set file, after packing_body.h.

constexpr float kPackedMark = 5150.0f;  // first number of packed weights

// Where everything lies; a part that no wanted form reads is null, and without a base only `size`
// means something.
struct Packed {
  float* gn_weight;
  float* gn_bias;
  float* conv3x3_bias;
  float* conv3x3_winograd;  // (64, c, c)
  float* spatial_winograd;  // (64, c, 2c): k3, k5
  float* conv3x3_direct;    // (9, c, c)
  float* spatial3_direct;   // (9, c, c)
  float* spatial5_direct;   // (25, c, c)
  float* spatial1;          // (c, c)
  float* attention;         // (3c, 3c), batch norm in it
  float* attention_bias;    // (3c)
  float* attention_bf16;    // the same product's, in bfloat16
  float* readout;           // (c, 4c), rows of y: of A*f, batch norm in it, then of X, times alpha
  float* readout_bias;      // (c)
  int64_t size;

  Packed(float* base, int64_t c, int forms) {
    size = kLanes;  // behind the mark
    const int64_t square = c * padded(c);
    const auto take = [&](int64_t count, bool wanted = true) {
      float* here = base != nullptr && wanted ? base + size : nullptr;
      size += wanted ? count : 0;
      return here;
    };
    const bool winograd = (forms & kWinogradForm) != 0, direct = (forms & kDirectForm) != 0;
    gn_weight = take(padded(c));
    gn_bias = take(padded(c));
    conv3x3_bias = take(padded(c));
    conv3x3_winograd = take(kPositions * square, winograd);
    spatial_winograd = take(kPositions * 2 * square, winograd);
    conv3x3_direct = take(9 * square, direct);
    spatial3_direct = take(9 * square, direct);
    spatial5_direct = take(25 * square, direct);
    spatial1 = take(square);
    attention = take(9 * square);
    attention_bias = take(3 * padded(c));
    attention_bf16 = take(9 * padded(c) * padded(c) / 2, (forms & kBf16Form) != 0);
    readout = take(4 * square);
    readout_bias = take(padded(c));
  }
};

inline int64_t packed_size(int64_t channels, int forms) {
  return Packed(nullptr, channels, forms).size;
}

inline bool is_packed(const float* packed, int64_t size, int64_t channels, int form) {
  if (size < 4 || packed[0] != kPackedMark || packed[1] != static_cast<float>(kLanes)) return false;
  const int forms = static_cast<int>(packed[3]);
  return packed[2] == static_cast<float>(channels) && (forms & form) == form &&
         size == packed_size(channels, forms);
}

inline double norm_scale(const float* weight, const float* var, int64_t i, double eps) {
  return weight[i] / sqrt(static_cast<double>(var[i]) + eps);
}

inline void pack_attention(const CrossSpatialParameters& p, int64_t c, const Packed& out) {
  const int64_t cp = padded(c);
  if (out.attention_bf16 != nullptr) {  // the plain matrix lies where its packed form goes next
    float* matrix = out.attention;
    for (int64_t i = 0; i < 9 * c * c; ++i) {
      const double scale = norm_scale(p.attention_bn_weight, p.attention_running_var, i / (3 * c),
                                      p.attention_eps);
      matrix[i] = static_cast<float>(scale * p.attention_weight[i]);
    }
    p.bf16->pack(matrix, c, out.attention_bf16);
    memset(matrix, 0, static_cast<size_t>(9 * c * cp) * sizeof(float));
  }
  for (int64_t o = 0; o < 3 * c; ++o) {
    const int64_t column = o / c * cp + o % c;
    const double scale = norm_scale(p.attention_bn_weight, p.attention_running_var, o,
                                    p.attention_eps);
    out.attention_bias[column] =
        static_cast<float>(p.attention_bn_bias[o] - scale * p.attention_running_mean[o]);
    const PackedColumn place(3 * c, 3 * cp / kLanes, column);
    for (int64_t i = 0; i < 3 * c; ++i) {
      out.attention[place.start + i * place.step] =
          static_cast<float>(scale * p.attention_weight[o * 3 * c + i]);
    }
  }
}

inline void pack_readout(const CrossSpatialParameters& p, int64_t c, const Packed& out) {
  const int64_t cp = padded(c);
  for (int64_t o = 0; o < c; ++o) {
    const double scale = norm_scale(p.reduce_bn_weight, p.reduce_running_var, o, p.reduce_eps);
    out.readout_bias[o] =
        static_cast<float>(p.reduce_bn_bias[o] - scale * p.reduce_running_mean[o]);
    float* row = out.readout + o * 4 * cp;
    for (int64_t i = 0; i < 3 * c; ++i) {
      row[i / c * cp + i % c] = static_cast<float>(scale * p.reduce_weight[o * 3 * c + i]);
    }
    for (int64_t i = 0; i < c; ++i) row[3 * cp + i] = p.alpha[0] * p.channel_feat_weight[o * c + i];
  }
}

inline void pack(const CrossSpatialParameters& p, int64_t c, int forms, float* packed) {
  const Packed out(packed, c, forms);
  memset(packed, 0, static_cast<size_t>(out.size) * sizeof(float));
  packed[0] = kPackedMark;
  packed[1] = static_cast<float>(kLanes);
  packed[2] = static_cast<float>(c);
  packed[3] = static_cast<float>(forms);
  const size_t bytes = static_cast<size_t>(c) * sizeof(float);
  memcpy(out.gn_weight, p.gn_weight, bytes);
  memcpy(out.gn_bias, p.gn_bias, bytes);
  memcpy(out.conv3x3_bias, p.conv3x3_bias, bytes);
  const int64_t vectors = padded(c) / kLanes;
  if ((forms & kWinogradForm) != 0) {
    pack_winograd(p.conv3x3_weight, c, 3, 3, false, {c, vectors, 0, 0}, out.conv3x3_winograd);
    pack_winograd(p.spatial_conv3_weight, c, 3, 5, false, {c, 2 * vectors, 0, 0},
                  out.spatial_winograd);
    pack_winograd(p.spatial_conv5_weight, c, 5, 5, false, {c, 2 * vectors, 0, padded(c)},
                  out.spatial_winograd);
  }
  if ((forms & kDirectForm) != 0) {
    pack_direct(p.conv3x3_weight, c, 9, out.conv3x3_direct);
    pack_direct(p.spatial_conv3_weight, c, 9, out.spatial3_direct);
    pack_direct(p.spatial_conv5_weight, c, 25, out.spatial5_direct);
  }
  pack_direct(p.spatial_conv1_weight, c, 1, out.spatial1);
  pack_attention(p, c, out);
  pack_readout(p, c, out);
}
