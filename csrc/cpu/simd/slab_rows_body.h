// Rows of numbers, one a pixel: sums, products with a vector, softmax, and the way back to a plane.
// Included inside the namespace of an instruction-set file, after slab_tiles_body.h.

// Rows (f, L, R, X) of the pixels of one branch of one sample in training, in the order of tiles.
template <class T>
struct RowsOf {
  int64_t cp, stride;
  T* start;

  T* f(int64_t pixel) const { return start + pixel * stride; }
  T* l(int64_t pixel) const { return f(pixel) + 3 * cp; }
  T* r(int64_t pixel) const { return f(pixel) + 6 * cp; }
  T* x(int64_t pixel) const { return f(pixel) + 7 * cp; }
};

// X of a chunk of pixels, before it is rounded.
struct ExactRows {
  float* at;
  int64_t stride;
};

// sum += all rows
template <class T>
inline void add_rows(const T* rows, int64_t stride, int64_t count, int64_t columns,
                     float* sum) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    Floats even = Simd::zero(), odd = Simd::zero();
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      even = Simd::add(even, Simd::load(rows + i * stride + c));
      odd = Simd::add(odd, Simd::load(rows + (i + 1) * stride + c));
    }
    if (i < count) even = Simd::add(even, Simd::load(rows + i * stride + c));
    Simd::store(sum + c, Simd::add(Simd::load(sum + c), Simd::add(even, odd)));
  }
}

template <class T>
inline float dot(const T* a, const float* b, int64_t columns) {
  Floats sum = Simd::zero();
  for (int64_t c = 0; c < columns; c += kLanes) {
    sum = Simd::fma(Simd::load(a + c), Simd::load(b + c), sum);
  }
  return Simd::reduce_add(sum);
}

// logits[i] += vector . rows[i] + constant
inline void read_out(const float* rows, int64_t count, int64_t columns, const float* vector,
                     float constant, float* logits) {
  for (int64_t i = 0; i < count; ++i) {
    logits[i] += dot(rows + i * columns, vector, columns) + constant;
  }
}

// sum += factor * row
inline void add_scaled(float factor, const float* row, int64_t columns, float* sum) {
  const Floats share = Simd::set(factor);
  for (int64_t i = 0; i < columns; i += kLanes) {
    Simd::store(sum + i, Simd::fma(share, Simd::load(row + i), Simd::load(sum + i)));
  }
}

inline void take_softmax(const float* y, int64_t count, float* softmax) {
  float most = lowest(), total = 0.0f;
  for (int64_t i = 0; i < count; ++i) most = y[i] > most ? y[i] : most;
  for (int64_t i = 0; i < count; ++i) {
    softmax[i] = expf(y[i] - most);
    total += softmax[i];
  }
  for (int64_t i = 0; i < count; ++i) softmax[i] /= total;
}

// Place of pixel (y, x) where pixels come in the order of 4x4 tiles.
inline int64_t tile_place(const Frame& f, int64_t y, int64_t x) {
  const int64_t tile = y / kOutputs5 * f.tiles_x + x / kOutputs5;
  return tile * kTilePixels + y % kOutputs5 * kOutputs5 + x % kOutputs5;
}

inline void tiles_to_plane(const Frame& f, const float* values, float* plane) {
  for (int64_t y = 0; y < f.height; ++y) {
    for (int64_t x = 0; x < f.width; ++x) plane[y * f.width + x] = values[tile_place(f, y, x)];
  }
}

template <class T>
inline void store_gates(const float* logits, int64_t count, T* w) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Simd::store(w + i, sigmoid(Simd::load(logits + i)));
  if (i == count) return;
  const int left = static_cast<int>(count - i);
  Simd::store(w + i, sigmoid(Simd::load(logits + i, left)), left);
}

// w = sigmoid(logits)
inline void store_gates(const float* logits, int64_t count, Element element, void* w) {
  switch (element) {
    case Element::kFloat:
      store_gates(logits, count, static_cast<float*>(w));
      break;
    case Element::kBFloat16:
      store_gates(logits, count, static_cast<BFloat16*>(w));
      break;
    case Element::kHalf:
      store_gates(logits, count, static_cast<Half*>(w));
      break;
  }
}
