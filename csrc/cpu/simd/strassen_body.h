// The sums around Strassen's seven products (packed_weight.h). Included after products_body.h.

inline float sum_of_lanes(const Simd::Floats& a) {
  float lanes[Simd::kLanes], sum = 0.0f;
  Simd::store(lanes, a);
  for (int i = 0; i < Simd::kLanes; ++i) sum += lanes[i];
  return sum;
}

inline bool all_lanes_alike(const Simd::Floats& a, const Simd::Floats& b) {
  float lanes[2][Simd::kLanes];
  Simd::store(lanes[0], a);
  Simd::store(lanes[1], b);
  for (int i = 0; i < Simd::kLanes; ++i) {
    if (!alike(lanes[0][i], lanes[1][i])) return false;
  }
  return true;
}

float strassen_sums(const float* panels, int64_t half, float* sums) {
  const float *b11 = panels, *b21 = b11 + half, *b12 = b21 + half, *b22 = b12 + half;
  Simd::Floats squares[kPanelVectors][2];  // of each pixel of the one tile and the other
  for (int v = 0; v < kPanelVectors; ++v) squares[v][0] = squares[v][1] = Simd::zero();
  for (int64_t k = 0; k < half; k += kPanelPixels) {
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t i = k + v * Simd::kLanes;
      const Simd::Floats first = Simd::load(b11 + i), below = Simd::load(b21 + i);
      const Simd::Floats right = Simd::load(b12 + i), last = Simd::load(b22 + i);
      const Simd::Floats t1 = Simd::sub(right, first), t2 = Simd::sub(last, t1);
      Simd::store(sums + i, t1);
      Simd::store(sums + half + i, t2);
      Simd::store(sums + 2 * half + i, Simd::sub(last, right));
      Simd::store(sums + 3 * half + i, Simd::sub(t2, below));
      squares[v][0] = Simd::fma(first, first, Simd::fma(below, below, squares[v][0]));
      squares[v][1] = Simd::fma(right, right, Simd::fma(last, last, squares[v][1]));
    }
  }
  Simd::Floats all = Simd::zero();
  for (int v = 0; v < kPanelVectors; ++v) {
    if (!all_lanes_alike(squares[v][0], squares[v][1])) return -1.0f;
    all = Simd::add(all, Simd::add(squares[v][0], squares[v][1]));
  }
  return sum_of_lanes(all);
}

bool strassen_blocks(float* products, float least, bool accumulate, float* acc) {
  constexpr int kBlock = kBlockRows * kPanelPixels;
  // Sums that will be added wait where the products were, until all are known to be good.
  float* out = accumulate ? products : acc;
  Simd::Floats squares = Simd::zero();
  for (int i = 0; i < kBlock; i += Simd::kLanes) {
    Simd::Floats p[7];
    for (int j = 0; j < 7; ++j) p[j] = Simd::load(products + j * kBlock + i);
    const Simd::Floats u = Simd::add(p[0], p[5]), v = Simd::add(u, p[6]);
    const Simd::Floats c[4] = {Simd::add(p[0], p[1]), Simd::add(Simd::add(u, p[4]), p[2]),
                               Simd::sub(v, p[3]), Simd::add(v, p[4])};
    for (int j = 0; j < 4; ++j) {
      squares = Simd::fma(c[j], c[j], squares);
      Simd::store(out + j * kBlock + i, c[j]);
    }
  }
  const float sum = sum_of_lanes(squares);
  if (!(sum >= least && sum <= std::numeric_limits<float>::max())) return false;
  for (int i = 0; accumulate && i < 4 * kBlock; i += Simd::kLanes) {
    Simd::store(acc + i, Simd::add(Simd::load(acc + i), Simd::load(products + i)));
  }
  return true;
}
