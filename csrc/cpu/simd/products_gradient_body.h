// The way back through the stages' batch norms, and the moments of a block, for any instruction
// set. Included after products_epilogue_body.h; ends with the table of all functions. All
// arithmetic is float32; sums are those of one tile, which the caller adds up in float64.

void moments(const float* acc, int rows, int count, float* mean, float* square) {
  for (int r = 0; r < rows; ++r) {
    const float* row = acc + r * kPanelPixels;
    Simd::Floats sum = Simd::zero();
    for (int p = 0; p < count; p += Simd::kLanes) {
      const int pixels = smaller(Simd::kLanes, count - p);
      sum = Simd::add(sum, first_lanes(Simd::load(row + p), pixels));
    }
    mean[r] = Simd::reduce_add(sum) / static_cast<float>(count);
    Simd::Floats squares = Simd::zero();
    for (int p = 0; p < count; p += Simd::kLanes) {
      const int pixels = smaller(Simd::kLanes, count - p);
      const Simd::Floats distance = Simd::sub(Simd::load(row + p), Simd::set(mean[r]));
      const Simd::Floats counted = first_lanes(distance, pixels);
      squares = Simd::fma(counted, counted, squares);
    }
    square[r] = Simd::reduce_add(squares);
  }
}

template <class T>
inline void load_view(const MapView& map, int row, int pixel, int rows, int pixels,
                      Simd::Floats* v) {
  const T* x = static_cast<const T*>(map.data) + row * map.stride_c + pixel * map.stride_s;
  load_block(x, map.stride_c, map.stride_s, rows, pixels, v);
}

inline void load_any(const MapView& map, Element element, int row, int pixel, int rows, int pixels,
                     Simd::Floats* v) {
  if (element == Element::kFloat) {
    load_view<float>(map, row, pixel, rows, pixels, v);
  } else if (element == Element::kBFloat16) {
    load_view<BFloat16>(map, row, pixel, rows, pixels, v);
  } else {
    load_view<Half>(map, row, pixel, rows, pixels, v);
  }
}

// Takes the gradient of y from `op.prepare(row, pixel, rows, pixels)` and `op(i, row, pixel, y)`,
// for row i of the prepared block.
template <class T, class Op>
inline void norm_gradient(int rows, int count, const NormGradient& norm, const MapView& z,
                          Element z_element, const MutableMapView& out, Op& op) {
  const bool summing = out.data == nullptr;
  for (int r = 0; summing && r < rows; ++r) norm.sums[r] = norm.products[r] = 0.0f;
  for (int r = 0; r < rows; r += Simd::kLanes) {
    const int block = smaller(Simd::kLanes, rows - r);
    for (int p = 0; p < count; p += Simd::kLanes) {
      const int pixels = smaller(Simd::kLanes, count - p);
      Simd::Floats v[Simd::kLanes];
      load_any(z, z_element, r, p, block, pixels, v);
      op.prepare(r, p, block, pixels);
      for (int i = 0; i < block; ++i) {
        const int row = r + i;
        const Simd::Floats rstd = Simd::set(norm.rstd[row]), weight = Simd::set(norm.weight[row]);
        const Simd::Floats n = Simd::mul(Simd::sub(v[i], Simd::set(norm.mean[row])), rstd);
        const Simd::Floats y = Simd::fma(n, weight, Simd::set(norm.bias[row]));
        Simd::Floats g = op(i, row, p, y);
        if (summing) {
          g = first_lanes(g, pixels);
          norm.sums[row] += Simd::reduce_add(g);
          norm.products[row] += Simd::reduce_add(Simd::mul(g, first_lanes(n, pixels)));
          continue;
        }
        if (norm.sum_share != nullptr) {
          g = Simd::sub(g, Simd::set(norm.sum_share[row]));
          g = Simd::sub(g, Simd::mul(n, Simd::set(norm.product_share[row])));
        }
        v[i] = Simd::mul(Simd::mul(weight, rstd), g);
      }
      if (summing) continue;
      T* to = static_cast<T*>(out.data) + r * out.stride_c + p * out.stride_s;
      store_block(to, out.stride_c, out.stride_s, block, pixels, v);
    }
  }
}

template <class T>
struct ReluGradientOp {
  const MapView& grad;
  Simd::Floats block[Simd::kLanes];

  void prepare(int row, int pixel, int rows, int pixels) {
    load_view<T>(grad, row, pixel, rows, pixels, block);
  }
  Simd::Floats operator()(int i, int, int, const Simd::Floats& y) const {
    return Simd::where_positive(y, block[i]);
  }
};

template <class T>
void relu_gradient(int rows, int count, const NormGradient& norm, const MapView& z,
                   Element z_element, const MapView& grad, const MutableMapView& out) {
  ReluGradientOp<T> op{grad, {}};
  norm_gradient<T>(rows, count, norm, z, z_element, out, op);
}

inline Simd::Floats gate_row(const Fusion& fusion, int row, int pixel) {
  const int64_t group = (fusion.first_row + row) / fusion.group_channels;
  return Simd::load(fusion.w + group * kPanelPixels + pixel);
}

template <class T>
struct GateGradientOp {
  const Fusion& fusion;
  const MapView& e;
  const MapView& grad;
  Simd::Floats through[Simd::kLanes];

  void prepare(int row, int pixel, int rows, int pixels) {
    Simd::Floats values[Simd::kLanes];
    load_view<T>(e, row, pixel, rows, pixels, values);
    load_view<T>(grad, row, pixel, rows, pixels, through);
    for (int i = 0; i < rows; ++i) through[i] = Simd::mul(through[i], values[i]);
  }
  Simd::Floats operator()(int i, int row, int pixel, const Simd::Floats& y) const {
    const Simd::Floats one = Simd::set(1.0f), phi = sigmoid(y);
    const Simd::Floats slope = Simd::mul(phi, Simd::sub(one, phi));
    const Simd::Floats open = Simd::sub(one, gate_row(fusion, row, pixel));
    return Simd::mul(Simd::mul(through[i], open), slope);
  }
};

template <class T>
void gate_gradient(int rows, int count, const NormGradient& norm, const Fusion& fusion,
                   const MapView& z, Element z_element, const MapView& e, const MapView& grad,
                   const MutableMapView& out) {
  GateGradientOp<T> op{fusion, e, grad, {}};
  norm_gradient<T>(rows, count, norm, z, z_element, out, op);
}

template <class T>
void fusion_gradient(const float* acc, int rows, int count, const Fusion& fusion, const MapView& z,
                     const MapView& e, const MapView& grad, const MutableMapView& grad_e,
                     float* grad_w) {
  const Simd::Floats one = Simd::set(1.0f);
  for (int r = 0; r < rows; r += Simd::kLanes) {
    const int block = smaller(Simd::kLanes, rows - r);
    for (int p = 0; p < count; p += Simd::kLanes) {
      const int pixels = smaller(Simd::kLanes, count - p);
      Simd::Floats logits[Simd::kLanes], values[Simd::kLanes], back[Simd::kLanes];
      load_view<T>(z, r, p, block, pixels, logits);
      load_view<T>(e, r, p, block, pixels, values);
      load_view<T>(grad, r, p, block, pixels, back);
      for (int i = 0; i < block; ++i) {
        const int row = r + i;
        const int64_t group = (fusion.first_row + row) / fusion.group_channels;
        const Simd::Floats sum = Simd::load(acc + row * kPanelPixels + p);
        const Simd::Floats scaled = Simd::mul(logits[i], Simd::set(fusion.scale[row]));
        const Simd::Floats phi = sigmoid(Simd::add(scaled, Simd::set(fusion.shift[row])));
        const Simd::Floats closed = Simd::sub(one, phi), w = gate_row(fusion, row, p);
        const Simd::Floats pass = Simd::fma(w, closed, phi);
        float* gate = grad_w + group * kPanelPixels + p;
        const Simd::Floats for_w = Simd::mul(values[i], Simd::fma(back[i], closed, sum));
        Simd::store(gate, Simd::add(Simd::load(gate), for_w));
        back[i] = Simd::fma(back[i], pass, Simd::mul(sum, w));
      }
      T* to = static_cast<T*>(grad_e.data) + r * grad_e.stride_c + p * grad_e.stride_s;
      store_block(to, grad_e.stride_c, grad_e.stride_s, block, pixels, back);
    }
  }
}

// ------------------------------------------------------------------------------------------ shrink

// Weighted sum of the vectors that `axis` takes for place i, `step` floats apart.
inline Simd::Floats gather(const Axis& axis, int64_t i, const float* from, int64_t step) {
  Simd::Floats sum = Simd::zero();
  const float* weight = axis.weights + axis.start[i];
  for (int t = 0; t < axis.count[i]; ++t) {
    const Simd::Floats value = Simd::load(from + (axis.first[i] + t) * step);
    sum = Simd::fma(value, Simd::set(weight[t]), sum);
  }
  return sum;
}

template <class T>
void shrink(const MapView& map, int channels, const Axis& rows, const Axis& columns,
            float* scratch, const MutableMapView& out) {
  const int64_t width = columns.from_size, step = columns.size * Simd::kLanes;
  float* line = scratch;  // [column][channel]
  float* narrow = scratch + (width + Simd::kLanes) * Simd::kLanes;  // [row][column][channel]
  const T* x = static_cast<const T*>(map.data);
  const Transform none{};
  for (int64_t y = 0; y < rows.from_size; ++y) {
    for (int64_t p = 0; p < width; p += Simd::kLanes) {
      Simd::Floats v[Simd::kLanes];
      const int pixels = smaller(Simd::kLanes, width - p);
      load_pixels(x + (y * width + p) * map.stride_s, map, channels, pixels, none, 0, 0, v);
      for (int i = 0; i < Simd::kLanes; ++i) Simd::store(line + (p + i) * Simd::kLanes, v[i]);
    }
    for (int64_t q = 0; q < columns.size; ++q) {
      Simd::store(narrow + y * step + q * Simd::kLanes, gather(columns, q, line, Simd::kLanes));
    }
  }
  T* to = static_cast<T*>(out.data);
  for (int64_t y = 0; y < rows.size; ++y) {
    for (int64_t p = 0; p < columns.size; p += Simd::kLanes) {
      const int pixels = smaller(Simd::kLanes, columns.size - p);
      Simd::Floats v[Simd::kLanes];
      for (int i = 0; i < pixels; ++i) {
        v[i] = gather(rows, y, narrow + (p + i) * Simd::kLanes, step);
      }
      for (int i = pixels; i < Simd::kLanes; ++i) v[i] = Simd::zero();
      Simd::transpose(v);
      store_block(to + (y * columns.size + p) * out.stride_s, out.stride_c, out.stride_s, channels,
                  pixels, v);
    }
  }
}

// ------------------------------------------------------------------------------------------- table

template <class W>
constexpr void add_words(Products* table, Words words) {
  const int i = static_cast<int>(words);
  table->pack[i][0] = pack<W, float>;
  table->pack[i][1] = pack<W, BFloat16>;
  table->pack[i][2] = pack<W, Half>;
  table->multiply[i] = multiply<W>;
  table->affine_to_panel[i] = affine_to_panel<W>;
  table->pack_pixels[i][0] = pack_pixels<W, float>;
  table->pack_pixels[i][1] = pack_pixels<W, BFloat16>;
  table->pack_pixels[i][2] = pack_pixels<W, Half>;
  table->pack_rows[i][0] = pack_rows<W, float>;
  table->pack_rows[i][1] = pack_rows<W, BFloat16>;
  table->pack_rows[i][2] = pack_rows<W, Half>;
}

constexpr Products table_of_floats() {
  Products table{kPanelRows,
                 kPanelPixels,
                 Simd::kLanes,
                 {},
                 {},
                 {store_affine<float>, store_affine<BFloat16>, store_affine<Half>},
                 {},
                 {combine<float>, combine<BFloat16>, combine<Half>},
                 {fuse<float>, fuse<BFloat16>, fuse<Half>},
                 {},
                 {},
                 moments,
                 add_resized,
                 {relu_gradient<float>, relu_gradient<BFloat16>, relu_gradient<Half>},
                 {gate_gradient<float>, gate_gradient<BFloat16>, gate_gradient<Half>},
                 {fusion_gradient<float>, fusion_gradient<BFloat16>, fusion_gradient<Half>},
                 {shrink<float>, shrink<BFloat16>, shrink<Half>},
                 strassen_sums,
                 strassen_blocks};
  add_words<Floats>(&table, Words::kFloats);
  return table;
}
