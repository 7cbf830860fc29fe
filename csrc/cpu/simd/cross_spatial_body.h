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
// bfloat16 the attention product takes bfloat16 operands where the map is bfloat16 and the
//          processor multiplies it (cross_spatial_bf16_body.h).
// Sums     float32, means over pixels as sums of chunks' sums, softmax's kernel vectors likewise.

#include "slab_products_body.h"
#include "winograd_body.h"
#include "packing_body.h"
#include "cross_spatial_weights_body.h"
#include "slab_frame_body.h"
#include "slab_tiles_body.h"
#include "slab_direct_body.h"
#include "coordinate_attention_body.h"
#include "slab_rows_body.h"
#include "attend_body.h"

struct Work {
  Frame frame;
  int64_t pixels;  // rows of a branch, pixels outside the map included
  Tiles tiles;
  float* e;        // the map, later x1
  float* x2;
  float* rows1;    // (pixels, 4cp): A f, X of branch 1
  float* rows2;    // (chunk, 4cp)
  float* features; // (chunk, 3cp)
  float* halves;   // features in bfloat16
  float* gates;
  float* pooled;
  float* logits;   // (pixels)
  float* plane;    // (H*W)
  float* mean;     // (4cp), of [A f; X]
  float* vector;   // (4cp), R^T s
  float* y;        // (c)
  int64_t size;

  Work(const CrossSpatialShape& shape, float* base)
      : frame(shape.channels, shape.height, shape.width), tiles(frame.cp, 2 * frame.cp) {
    const Frame& f = frame;
    const bool tiled = shape.form == kWinogradForm;
    pixels = tiled ? f.tiles_y * f.tiles_x * kTilePixels : f.height * f.width;
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
    tiles.in = take(tiled ? tiles.size_in() : 0);
    tiles.out = take(tiled ? tiles.size_out() : 0);
    halves = take(shape.bf16 != nullptr ? shape.bf16->scratch_size(f.c, kChunkPixels) : 0);
    gates = take(Gates::size(f));
    pooled = take(Gates::size(f));
    logits = take(pixels);
    plane = take(f.height * f.width);
    mean = take(4 * f.cp);
    vector = take(4 * f.cp);
    y = take(f.cp);
  }
};

// ------------------------------------------------------------------------- attention and readout

inline void attend(const CrossSpatialShape& shape, const Work& work, const Packed& weights,
                   int64_t count, float* rows) {
  const int64_t c = work.frame.c, cp = work.frame.cp;
  product({rows + 3 * cp, 4 * cp, kOneTap, c}, count, weights.spatial1, cp / kLanes,
          Store{work.features, 3 * cp});
  if (shape.bf16 != nullptr) {
    shape.bf16->attend(c, weights.attention_bf16, weights.attention_bias, work.features, count,
                       rows, 4 * cp, work.halves);
    return;
  }
  const Tap sections[3] = {{0, 0}, {cp, 1}, {2 * cp, 2}};
  product({work.features, 3 * cp, {sections, 3, 3}, c}, count, weights.attention, 3 * cp / kLanes,
          Attend{weights.attention_bias, work.features, 3 * cp, rows, 4 * cp});
}

// From work.mean: s = softmax(mean y) and work.vector = R^T s. Returns s . r.
inline float soften(const Work& work, const Packed& weights, float* softmax) {
  const int64_t c = work.frame.c, columns = 4 * work.frame.cp;
  for (int64_t o = 0; o < c; ++o) {
    const float* row = weights.readout + o * columns;
    work.y[o] = dot(row, work.mean, columns) + weights.readout_bias[o];
  }
  take_softmax(work.y, c, softmax);
  float constant = 0.0f;
  memset(work.vector, 0, static_cast<size_t>(columns) * sizeof(float));
  for (int64_t o = 0; o < c; ++o) {
    constant += softmax[o] * weights.readout_bias[o];
    add_scaled(softmax[o], weights.readout + o * columns, columns, work.vector);
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
    const int64_t count = smaller(work.pixels - start, kChunkPixels);
    float* rows = first ? work.rows1 + start * columns : work.rows2;
    const Rows<float> to = {work.features, rows + 3 * f.cp, 3 * f.cp, columns};
    if (shape.form == kWinogradForm) {
      feature_tiles(f, work.tiles, map, weights.spatial_winograd, start / kTilePixels,
                    count / kTilePixels, to);
    } else {
      feature_pixels(f, map, weights.spatial3_direct, weights.spatial5_direct, start, count, to);
    }
    attend(shape, work, weights, count, rows);
    add_rows(rows, columns, count, columns, work.mean);
    if (!first) read_out(rows, count, columns, work.vector, constant, work.logits + start);
  }
  const Floats share = Simd::set(1.0f / static_cast<float>(f.height * f.width));
  for (int64_t i = 0; i < columns; i += kLanes) {
    Simd::store(work.mean + i, Simd::mul(Simd::load(work.mean + i), share));
  }
}

inline void write_gates(const CrossSpatialShape& shape, const Work& work,
                        const CrossSpatialSlab& slab) {
  const Frame& f = work.frame;
  const float* logits = work.logits;
  if (shape.form == kWinogradForm) {
    tiles_to_plane(f, work.logits, work.plane);
    logits = work.plane;
  }
  store_gates(logits, f.height * f.width, slab.map.element, slab.w);
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
    conv3x3_tiles(f, work.tiles, work.e, weights.conv3x3_winograd, weights.conv3x3_bias, work.x2);
  } else {
    conv3x3_direct(f, work.e, weights.conv3x3_direct, weights.conv3x3_bias, work.x2);
  }
  if (slab.gate != nullptr) {
    coordinate_gates(f, work.e, slab.gate, slab.gate_eps, Gates(f, work.pooled), gates);
  } else {
    load_gates(slab.alpha_h, slab.alpha_w, slab.mean, slab.rstd, f, gates);
  }
  normalise_map(gates, weights.gn_weight, weights.gn_bias, f, work.e, work.e);
  memset(work.logits, 0, static_cast<size_t>(work.pixels) * sizeof(float));
  branch(shape, work, weights, work.e, true, 0.0f);
  const float constant1 = soften(work, weights, slab.softmax1);
  branch(shape, work, weights, work.x2, false, constant1);
  const float constant2 = soften(work, weights, slab.softmax2);
  read_out(work.rows1, work.pixels, 4 * f.cp, work.vector, constant2, work.logits);
  write_gates(shape, work, slab);
}

constexpr CrossSpatial kTable = {packed_size, pack, is_packed, scratch_size, prepare, run_slab};
