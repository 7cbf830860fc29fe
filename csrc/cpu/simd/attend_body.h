// What becomes of the attention product's sums.
// Included inside the namespace of an instruction-set file, after slab_products_body.h.

// rows = sigmoid(sum + bias) * features
struct Attend {
  const float* bias;
  const float* features;
  int64_t stride_features;
  float* rows;
  int64_t stride_rows;

  template <int M, int N>
  CIEMA_INLINE void operator()(const Floats (&sum)[M][N], int64_t row, int64_t vector) const {
    for (int m = 0; m < M; ++m) {
      const float* f = features + (row + m) * stride_features + vector * kLanes;
      float* out = rows + (row + m) * stride_rows + vector * kLanes;
      for (int n = 0; n < N; ++n) {
        const Floats logit = Simd::add(sum[m][n], Simd::load(bias + (vector + n) * kLanes));
        Simd::store(out + n * kLanes, Simd::mul(sigmoid(logit), Simd::load(f + n * kLanes)));
      }
    }
  }
};
