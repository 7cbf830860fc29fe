// The backward of a slab of coordinate attention, on one core: with HW pixels and z = u - mean,
//
//   grad_u = grad_mean / HW - grad_rstd rstd^3 z / HW     grad_alpha += sums of grad_u e alpha'
//   grad_q = grad_alpha alpha (1 - alpha)   grad_K = grad_q p^T   grad_b = sum grad_q
//   grad_e = grad_u alpha_h alpha_w + (K^T grad_q)_h / W + (K^T grad_q)_w / H
//
// The slab is copied once and the pools p are taken again; z is formed first, because the factor of
// a tiny variance is so large that the other order would cancel. Sums float32, rows first.
// Included inside the namespace of an instruction-set file, after coordinate_attention_body.h.

inline void pack_gate_backward(const float* weight, int64_t c, float* packed) {
  memset(packed, 0, static_cast<size_t>(c * padded(c)) * sizeof(float));
  for (int64_t i = 0; i < c; ++i) {
    const PackedColumn column(c, padded(c) / kLanes, i);
    for (int64_t o = 0; o < c; ++o) packed[column.start + o * column.step] = weight[o * c + i];
  }
}

// Of a vector of channels: grad_u = level + slope (u - mean).
struct GradientOfU {
  Floats mean, level, slope;

  CIEMA_INLINE Floats at(Floats e, Floats row, Floats column) const {
    return Simd::fma(Simd::sub(gated(e, row, column), mean), slope, level);
  }
};

// Adds to grads.rows and grads.columns what comes through u.
inline void gate_sums(const Frame& f, const float* map, const Gates& gates, int64_t c,
                      const GradientOfU& grad, const Gates& grads) {
  for (int64_t y = 0; y < f.height; ++y) {
    const Floats row = Simd::load(gates.rows + y * f.cp + c);
    Floats sum = Simd::zero();
    for (int64_t x = 0; x < f.width; ++x) {
      const Floats e = Simd::load(map + f.at(y, x) + c);
      const Floats column = Simd::load(gates.columns + x * f.cp + c);
      const Floats through = Simd::mul(grad.at(e, row, column), e);
      sum = Simd::fma(through, column, sum);
      float* to = grads.columns + x * f.cp + c;
      Simd::store(to, Simd::fma(through, row, Simd::load(to)));
    }
    float* to = grads.rows + y * f.cp + c;
    Simd::store(to, Simd::add(Simd::load(to), sum));
  }
}

// map: e becomes grad_e. pooled: gradients of the pools.
inline void map_gradient(const Frame& f, const Gates& gates, int64_t c, const GradientOfU& grad,
                         const Gates& pooled, float* map) {
  const Floats per_row = Simd::set(1.0f / static_cast<float>(f.width));
  const Floats per_column = Simd::set(1.0f / static_cast<float>(f.height));
  for (int64_t y = 0; y < f.height; ++y) {
    const Floats row = Simd::load(gates.rows + y * f.cp + c);
    const Floats along = Simd::mul(Simd::load(pooled.rows + y * f.cp + c), per_row);
    for (int64_t x = 0; x < f.width; ++x) {
      float* to = map + f.at(y, x) + c;
      const Floats column = Simd::load(gates.columns + x * f.cp + c);
      const Floats rest = Simd::fma(Simd::load(pooled.columns + x * f.cp + c), per_column, along);
      const Floats grad_u = grad.at(Simd::load(to), row, column);
      Simd::store(to, Simd::fma(grad_u, Simd::mul(row, column), rest));
    }
  }
}

inline GradientOfU gradient_of_u(const Frame& f, const Gates& gates, const Gates& grads,
                                 int64_t c) {
  const Floats share = Simd::set(1.0f / static_cast<float>(f.height * f.width));
  const Floats rstd = Simd::load(gates.rstd + c);
  const Floats cube = Simd::mul(Simd::mul(rstd, rstd), rstd);
  const Floats slope = Simd::mul(Simd::mul(Simd::load(grads.rstd + c), cube), share);
  return {Simd::load(gates.mean + c), Simd::mul(Simd::load(grads.mean + c), share),
          Simd::sub(Simd::zero(), slope)};
}

inline int64_t backward_scratch_size(const CoordinateShape& shape) {
  const Frame f(shape.channels, shape.height, shape.width);
  return f.size() + 3 * Gates::size(f) + f.c * f.cp;
}

inline void run_backward(const CoordinateShape& shape, const float* packed,
                         const CoordinateBackwardSlab& slab, float* scratch) {
  const Frame f(shape.channels, shape.height, shape.width);
  float* map = scratch;
  const Gates gates(f, map + f.size());
  const Gates grads(f, gates.rows + Gates::size(f));
  const Gates pooled(f, grads.rows + Gates::size(f));
  float* outer = pooled.rows + Gates::size(f);
  pack_map(slab.map, f, map);
  load_gates(slab.alpha_h, slab.alpha_w, slab.mean, slab.rstd, f, gates);
  load_gates(slab.grad_alpha_h, slab.grad_alpha_w, slab.grad_mean, slab.grad_rstd, f, grads);
  pool(f, map, pooled);
  for (int64_t c = 0; c < f.cp; c += kLanes) {
    gate_sums(f, map, gates, c, gradient_of_u(f, gates, grads, c), grads);
  }
  const int64_t places = f.height + f.width;
  for (int64_t i = 0; i < places * f.cp; i += kLanes) {  // grad_q, rows and columns
    const Floats gate = Simd::load(gates.rows + i);
    const Floats slope = Simd::mul(gate, Simd::sub(Simd::set(1.0f), gate));
    Simd::store(grads.rows + i, Simd::mul(Simd::load(grads.rows + i), slope));
  }
  memset(outer, 0, static_cast<size_t>(f.c * f.cp) * sizeof(float));
  add_outer(grads.rows, f.cp, f.c, pooled.rows, f.cp, f.cp / kLanes, places, outer, f.cp);
  for (int64_t o = 0; o < f.c; ++o) {
    memcpy(slab.grad_weight + o * f.c, outer + o * f.cp, static_cast<size_t>(f.c) * sizeof(float));
  }
  memset(outer, 0, static_cast<size_t>(f.cp) * sizeof(float));
  add_rows(grads.rows, f.cp, places, f.cp, outer);
  memcpy(slab.grad_bias, outer, static_cast<size_t>(f.c) * sizeof(float));
  product({grads.rows, f.cp, kOneTap, f.c}, places, packed, f.cp / kLanes,
          Store{pooled.rows, f.cp});
  for (int64_t c = 0; c < f.cp; c += kLanes) {
    map_gradient(f, gates, c, gradient_of_u(f, gates, grads, c), pooled, map);
  }
  unpack_map(map, f, slab.grad_e);
}
