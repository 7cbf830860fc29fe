// A slab (one group of one sample) of cross_spatial in evaluation, start to end on one core:
//
//   x1 = GN(e alpha_h alpha_w), x2 = K3 * e + b3, and for X in {x1, x2}:
//   f = [k1*X; k3*X; k5*X]   A = sigmoid(Wa f + ba)   y = R [A f; X] + r   s = softmax(mean y)
//   w = sigmoid(s1.y2 + s2.y1)
//
// The batch norms and alpha are in Wa, ba, R and r. Only mean(y) = R mean([A f; X]) + r and
// s.y = (R^T s).[A f; X] + s.r are wanted, so R is never multiplied with a pixel (spec.md 5.4).
// Branch 1's rows [A f; X] are kept until s2 is known; branch 2's are read out at once.
//
// Layouts  scratch is pixel-major; see slab_frame_body.h. Pixels of the rows are in the order of
//          tiles (Winograd form) or of the map (direct form).
// Bytes    e is read and w written once; scratch is about 2.6 MB at c = 32, 56x56, of which a chunk
//          of tiles (transformed, product, features) stays in a core's second-level cache.
// Sums     float32, means over pixels as sums of chunks' sums, softmax's kernel vectors likewise.

#include "slab_products_body.h"
#include "winograd_body.h"
#include "cross_spatial_weights_body.h"
#include "slab_frame_body.h"
#include "coordinate_attention_body.h"

constexpr int64_t kChunkTiles = 12;
constexpr int64_t kTilePixels = kOutputs5 * kOutputs5;
constexpr int64_t kChunkPixels = kChunkTiles * kTilePixels;

struct Work {
  Frame frame;
  int64_t pixels;  // rows of a branch, pixels outside the map included
  int64_t stride_in, stride_out;  // from position to position; odd numbers of cache lines
  float* e;        // the map, later x1
  float* x2;
  float* rows1;    // (pixels, 4cp): A f, X of branch 1
  float* rows2;    // (chunk, 4cp)
  float* features; // (chunk, 3cp)
  float* tiles_in;
  float* tiles_out;
  float* gates;
  float* logits;   // (pixels)
  float* plane;    // (H*W)
  float* mean;     // (4cp), of [A f; X]
  float* vector;   // (4cp), R^T s
  float* y;        // (c)
  int64_t size;

  Work(const CrossSpatialShape& shape, float* base)
      : frame(shape.channels, shape.height, shape.width) {
    const Frame& f = frame;
    const bool tiled = shape.form == kWinogradForm;
    pixels = tiled ? f.tiles_y * f.tiles_x * kTilePixels : f.height * f.width;
    stride_in = kChunkTiles * f.cp + 16;
    stride_out = 2 * kChunkTiles * f.cp + 16;
    size = 0;
    const auto take = [&](int64_t count) {
      float* here = base != nullptr ? base + size : nullptr;
      size += rounded_up(count, 16);
      return here;
    };
    e = take(f.size());
    x2 = take(f.size());
    rows1 = take(pixels * 4 * f.cp);
    rows2 = take(kChunkPixels * 4 * f.cp);
    features = take(kChunkPixels * 3 * f.cp);
    tiles_in = take(tiled ? kPositions * stride_in : 0);
    tiles_out = take(tiled ? kPositions * stride_out : 0);
    gates = take(Gates::size(f));
    logits = take(pixels);
    plane = take(f.height * f.width);
    mean = take(4 * f.cp);
    vector = take(4 * f.cp);
    y = take(f.cp);
  }
};

// ---------------------------------------------------------------------------- convolutions

// Transforms tiles [first, first + count), `across` to a row, of `step` outputs along a side whose
// inputs begin `border` pixels before them; then the products with `weights`.
inline void transform_and_multiply(const Work& work, const float* map, int64_t first, int64_t count,
                                   int64_t across, int64_t step, int64_t border,
                                   const float* weights, int64_t vectors) {
  const Frame& f = work.frame;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t y = (first + t) / across * step, x = (first + t) % across * step;
    const float* from = map + f.at(y - border, x - border);
    for (int64_t c = 0; c < f.cp; c += kLanes) {
      input_transform(from + c, f.row(), f.cp, work.tiles_in + t * f.cp + c, work.stride_in);
    }
  }
  for (int64_t p = 0; p < kPositions; ++p) {
    const Operand left = {work.tiles_in + p * work.stride_in, f.cp, kOneTap, f.c};
    const Store store = {work.tiles_out + p * work.stride_out, vectors * kLanes};
    product(left, count, weights + p * f.c * vectors * kLanes, vectors, store);
  }
}

inline void conv3x3_tiles(const Work& work, const Packed& weights) {
  const Frame& f = work.frame;
  const int64_t tiles = f.large_y * f.large_x;
  for (int64_t first = 0; first < tiles; first += kChunkTiles) {
    const int64_t count = tiles - first < kChunkTiles ? tiles - first : kChunkTiles;
    transform_and_multiply(work, work.e, first, count, f.large_x, kOutputs3, 1,
                           weights.conv3x3_winograd, f.cp / kLanes);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t y0 = (first + t) / f.large_x * kOutputs3;
      const int64_t x0 = (first + t) % f.large_x * kOutputs3;
      const int64_t ys = f.height - y0 < kOutputs3 ? f.height - y0 : kOutputs3;
      const int64_t xs = f.width - x0 < kOutputs3 ? f.width - x0 : kOutputs3;
      for (int64_t c = 0; c < f.cp; c += kLanes) {
        Floats out[kOutputs3][kOutputs3];
        output_transform<kOutputs3>(work.tiles_out + t * f.cp + c, work.stride_out, out);
        const Floats bias = Simd::load(weights.conv3x3_bias + c);
        for (int64_t y = 0; y < ys; ++y) {
          float* to = work.x2 + f.at(y0 + y, x0) + c;
          for (int64_t x = 0; x < xs; ++x) Simd::store(to + x * f.cp, Simd::add(out[y][x], bias));
        }
      }
    }
  }
}

// f3 and f5 of tiles into features, and X into the rows; zeros where a tile leaves the map.
inline void feature_tiles(const Work& work, const Packed& weights, const float* map, int64_t first,
                          int64_t count, float* rows) {
  const Frame& f = work.frame;
  transform_and_multiply(work, map, first, count, f.tiles_x, kOutputs5, kBorder,
                         weights.spatial_winograd, 2 * f.cp / kLanes);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t y0 = (first + t) / f.tiles_x * kOutputs5;
    const int64_t x0 = (first + t) % f.tiles_x * kOutputs5;
    for (int64_t c = 0; c < 2 * f.cp; c += kLanes) {
      Floats out[kOutputs5][kOutputs5];
      output_transform<kOutputs5>(work.tiles_out + t * 2 * f.cp + c, work.stride_out, out);
      float* to = work.features + t * kTilePixels * 3 * f.cp + f.cp + c;
      for (int64_t y = 0; y < kOutputs5; ++y) {
        for (int64_t x = 0; x < kOutputs5; ++x) {
          const bool inside = y0 + y < f.height && x0 + x < f.width;
          Simd::store(to + (y * kOutputs5 + x) * 3 * f.cp, inside ? out[y][x] : Simd::zero());
        }
      }
    }
    for (int64_t i = 0; i < kTilePixels; ++i) {
      const float* from = map + f.at(y0 + i / kOutputs5, x0 + i % kOutputs5);
      float* to = rows + (t * kTilePixels + i) * 4 * f.cp + 3 * f.cp;
      for (int64_t c = 0; c < f.cp; c += kLanes) Simd::store(to + c, Simd::load(from + c));
    }
  }
}

struct StoreBiased {
  float* out;
  int64_t stride;
  const float* bias;

  template <int M, int N>
  CIEMA_INLINE void operator()(const Floats (&sum)[M][N], int64_t row, int64_t vector) const {
    float* at = out + row * stride + vector * kLanes;
    for (int n = 0; n < N; ++n) {
      const Floats added = Simd::load(bias + (vector + n) * kLanes);
      for (int m = 0; m < M; ++m) {
        Simd::store(at + m * stride + n * kLanes, Simd::add(sum[m][n], added));
      }
    }
  }
};

// The taps of a size x size kernel that can meet the map from row y: those wholly in the frame of
// zeros are left out, which makes narrow maps cheap.
inline Taps direct_taps(const Frame& f, int64_t size, int64_t y, Tap (&taps)[25]) {
  int64_t count = 0;
  const int64_t half = size / 2;
  for (int64_t i = 0; i < size * size; ++i) {
    const int64_t dy = i / size - half, dx = i % size - half;
    const bool meets = y + dy >= 0 && y + dy < f.height && dx < f.width && -dx < f.width;
    if (meets) taps[count++] = {dy * f.row() + dx * f.cp, i};
  }
  return {taps, count, size * size};
}

inline void conv3x3_direct(const Work& work, const Packed& weights) {
  const Frame& f = work.frame;
  for (int64_t y = 0; y < f.height; ++y) {
    Tap taps[25];
    const Operand left = {work.e + f.at(y, 0), f.cp, direct_taps(f, 3, y, taps), f.c};
    product(left, f.width, weights.conv3x3_direct, f.cp / kLanes,
            StoreBiased{work.x2 + f.at(y, 0), f.cp, weights.conv3x3_bias});
  }
}

// f3 and f5 of pixels [first, first + count), and X into the rows.
inline void feature_pixels(const Work& work, const Packed& weights, const float* map,
                           int64_t first, int64_t count, float* rows) {
  const Frame& f = work.frame;
  for (int64_t done = 0; done < count;) {
    const int64_t y = (first + done) / f.width, x = (first + done) % f.width;
    const int64_t run = f.width - x < count - done ? f.width - x : count - done;
    const float* from = map + f.at(y, x);
    float* features = work.features + done * 3 * f.cp;
    Tap taps[25];
    product({from, f.cp, direct_taps(f, 3, y, taps), f.c}, run, weights.spatial3_direct,
            f.cp / kLanes, Store{features + f.cp, 3 * f.cp});
    product({from, f.cp, direct_taps(f, 5, y, taps), f.c}, run, weights.spatial5_direct,
            f.cp / kLanes, Store{features + 2 * f.cp, 3 * f.cp});
    float* to = rows + done * 4 * f.cp + 3 * f.cp;
    for (int64_t i = 0; i < run; ++i) {
      for (int64_t c = 0; c < f.cp; c += kLanes) {
        Simd::store(to + i * 4 * f.cp + c, Simd::load(from + i * f.cp + c));
      }
    }
    done += run;
  }
}

// ------------------------------------------------------------------------- attention and readout

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

inline void attend(const Work& work, const Packed& weights, int64_t count, float* rows) {
  const int64_t c = work.frame.c, cp = work.frame.cp;
  product({rows + 3 * cp, 4 * cp, kOneTap, c}, count, weights.spatial1, cp / kLanes,
          Store{work.features, 3 * cp});
  const Tap sections[3] = {{0, 0}, {cp, 1}, {2 * cp, 2}};
  product({work.features, 3 * cp, {sections, 3, 3}, c}, count, weights.attention, 3 * cp / kLanes,
          Attend{weights.attention_bias, work.features, 3 * cp, rows, 4 * cp});
}

inline void add_rows(const float* rows, int64_t count, int64_t columns, float* sum) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    Floats even = Simd::zero(), odd = Simd::zero();
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      even = Simd::add(even, Simd::load(rows + i * columns + c));
      odd = Simd::add(odd, Simd::load(rows + (i + 1) * columns + c));
    }
    if (i < count) even = Simd::add(even, Simd::load(rows + i * columns + c));
    Simd::store(sum + c, Simd::add(Simd::load(sum + c), Simd::add(even, odd)));
  }
}

inline float dot(const float* a, const float* b, int64_t columns) {
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

// From work.mean: s = softmax(mean y) and work.vector = R^T s. Returns s . r.
inline float soften(const Work& work, const Packed& weights, float* softmax) {
  const int64_t c = work.frame.c, columns = 4 * work.frame.cp;
  float* y = work.y;
  float most = lowest(), total = 0.0f, constant = 0.0f;
  for (int64_t o = 0; o < c; ++o) {
    y[o] = dot(weights.readout + o * columns, work.mean, columns) + weights.readout_bias[o];
    most = y[o] > most ? y[o] : most;
  }
  for (int64_t o = 0; o < c; ++o) {
    softmax[o] = expf(y[o] - most);
    total += softmax[o];
  }
  memset(work.vector, 0, static_cast<size_t>(columns) * sizeof(float));
  for (int64_t o = 0; o < c; ++o) {
    softmax[o] /= total;
    constant += softmax[o] * weights.readout_bias[o];
    const Floats share = Simd::set(softmax[o]);
    for (int64_t i = 0; i < columns; i += kLanes) {
      const Floats row = Simd::load(weights.readout + o * columns + i);
      Simd::store(work.vector + i, Simd::fma(share, row, Simd::load(work.vector + i)));
    }
  }
  return constant;
}

// One branch: its mean into work.mean. Branch 1 (`first`) keeps its rows; branch 2 reads them out.
inline void branch(const CrossSpatialShape& shape, const Work& work, const Packed& weights,
                   const float* map, bool first, float constant) {
  const Frame& f = work.frame;
  const int64_t columns = 4 * f.cp;
  memset(work.mean, 0, static_cast<size_t>(columns) * sizeof(float));
  for (int64_t start = 0; start < work.pixels; start += kChunkPixels) {
    const int64_t left = work.pixels - start;
    const int64_t count = left < kChunkPixels ? left : kChunkPixels;
    float* rows = first ? work.rows1 + start * columns : work.rows2;
    if (shape.form == kWinogradForm) {
      feature_tiles(work, weights, map, start / kTilePixels, count / kTilePixels, rows);
    } else {
      feature_pixels(work, weights, map, start, count, rows);
    }
    attend(work, weights, count, rows);
    add_rows(rows, count, columns, work.mean);
    if (!first) read_out(rows, count, columns, work.vector, constant, work.logits + start);
  }
  const Floats share = Simd::set(1.0f / static_cast<float>(f.height * f.width));
  for (int64_t i = 0; i < columns; i += kLanes) {
    Simd::store(work.mean + i, Simd::mul(Simd::load(work.mean + i), share));
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

inline void write_gates(const CrossSpatialShape& shape, const Work& work,
                        const CrossSpatialSlab& slab) {
  const Frame& f = work.frame;
  const float* logits = work.logits;
  if (shape.form == kWinogradForm) {
    for (int64_t y = 0; y < f.height; ++y) {
      for (int64_t x = 0; x < f.width; ++x) {
        const int64_t tile = y / kOutputs5 * f.tiles_x + x / kOutputs5;
        const int64_t inside = y % kOutputs5 * kOutputs5 + x % kOutputs5;
        work.plane[y * f.width + x] = work.logits[tile * kTilePixels + inside];
      }
    }
    logits = work.plane;
  }
  const int64_t count = f.height * f.width;
  switch (slab.map.element) {
    case Element::kFloat:
      store_gates(logits, count, static_cast<float*>(slab.w));
      break;
    case Element::kBFloat16:
      store_gates(logits, count, static_cast<BFloat16*>(slab.w));
      break;
    case Element::kHalf:
      store_gates(logits, count, static_cast<Half*>(slab.w));
      break;
  }
}

// Gates and statistics as the ops pass them, (c, H), (c, W) and (c), pixel-major.
inline void load_gates(const CrossSpatialSlab& slab, const Frame& f, const Gates& gates) {
  memset(gates.rows, 0, static_cast<size_t>(Gates::size(f)) * sizeof(float));
  for (int64_t c = 0; c < f.c; ++c) {
    for (int64_t y = 0; y < f.height; ++y) gates.rows[y * f.cp + c] = slab.alpha_h[c * f.height + y];
    for (int64_t x = 0; x < f.width; ++x) gates.columns[x * f.cp + c] = slab.alpha_w[c * f.width + x];
    gates.mean[c] = slab.mean[c];
    gates.rstd[c] = slab.rstd[c];
  }
}

// e becomes x1 = GN(e alpha_h alpha_w), in place. gn_weight and gn_bias are zero in the padding.
inline void normalise_map(const Gates& gates, const float* gn_weight, const float* gn_bias,
                          const Frame& f, float* map) {
  for (int64_t c = 0; c < f.cp; c += kLanes) {
    const Floats slope = Simd::mul(Simd::load(gates.rstd + c), Simd::load(gn_weight + c));
    const Floats start = Simd::sub(Simd::load(gn_bias + c),
                                   Simd::mul(Simd::load(gates.mean + c), slope));
    for (int64_t y = 0; y < f.height; ++y) {
      const Floats row = Simd::mul(Simd::load(gates.rows + y * f.cp + c), slope);
      float* pixel = map + f.at(y, 0) + c;
      const float* column = gates.columns + c;
      for (int64_t x = 0; x < f.width; ++x, pixel += f.cp, column += f.cp) {
        const Floats gate = Simd::mul(row, Simd::load(column));
        Simd::store(pixel, Simd::fma(Simd::load(pixel), gate, start));
      }
    }
  }
}

inline int64_t scratch_size(const CrossSpatialShape& shape) {
  return Work(shape, nullptr).size;
}

inline void prepare(const CrossSpatialShape& shape, float* scratch) {
  const Work work(shape, scratch);
  memset(work.e, 0, static_cast<size_t>(work.frame.size()) * sizeof(float));
  memset(work.x2, 0, static_cast<size_t>(work.frame.size()) * sizeof(float));
}

inline void run_slab(const CrossSpatialShape& shape, const float* packed,
                     const CrossSpatialSlab& slab, float* scratch) {
  const Work work(shape, scratch);
  const Frame& f = work.frame;
  const int forms = static_cast<int>(packed[3]);
  const Packed weights(const_cast<float*>(packed), f.c, forms);
  const Gates gates(f, work.gates);
  pack_map(slab.map, f, work.e);
  if (shape.form == kWinogradForm) {
    conv3x3_tiles(work, weights);
  } else {
    conv3x3_direct(work, weights);
  }
  load_gates(slab, f, gates);
  normalise_map(gates, weights.gn_weight, weights.gn_bias, f, work.e);
  memset(work.logits, 0, static_cast<size_t>(work.pixels) * sizeof(float));
  branch(shape, work, weights, work.e, true, 0.0f);
  const float constant1 = soften(work, weights, slab.softmax1);
  branch(shape, work, weights, work.x2, false, constant1);
  const float constant2 = soften(work, weights, slab.softmax2);
  read_out(work.rows1, work.pixels, 4 * f.cp, work.vector, constant2, work.logits);
  write_gates(shape, work, slab);
}

constexpr CrossSpatial kTable = {packed_size, pack, is_packed, scratch_size, prepare, run_slab};
