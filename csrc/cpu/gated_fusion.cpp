// The stage gated_fusion on the CPU, with batch norms as scales and shifts (spec.md 2.4, 5.2, 5.3):
//
//   s = e w    r = relu(scale1 (W1 s) + shift1)    phi = sigmoid(scale3 (Ws s + Wr r) + shift3)
//   out = e (phi + w (1 - phi))
//
// W1 is the squeezing convolution, Ws the part of the last one that sees s, Wr the product of its
// other part with the expanding one. s and r exist only as panels of a tile of pixels.
//
// Layouts, sums  as in products.cpp; w is multiplied in while e is packed.
// Threads  over tiles of pixels and blocks of 64 rows; two threads that share a tile both compute
//          its r.
// Bytes    reads e once into panels and once, from the second-level cache, for out; reads w once;
//          writes out once, or C floats a tile for its mean.
#include "gated_fusion.h"

#include "products.h"

namespace ciema::cpu {
namespace {

struct Weights {
  const PackedWeight &squeeze, &of_s, &of_r;
  const Vector &scale1, &shift1, &scale3, &shift3;
};

// A thread's floats, one part after another.
struct Parts {
  Parts(const Weights& weights, int64_t plane, int64_t groups)
      : wide(weights.of_s.wants_wide(plane) || weights.of_r.wants_wide(plane)),
        squeeze_wide(wide && weights.squeeze.wants_wide(plane)),
        gate_floats((groups + groups % 2) * products().pixels),
        gate(sum_floats(wide)),
        s(gate + 2 * gate_floats),
        r(s + std::max(weights.of_s.operand_floats(wide), weights.squeeze.operand_floats(wide))),
        all(r + weights.of_r.operand_floats(wide)) {}

  bool wide, squeeze_wide;
  int64_t gate_floats, gate, s, r, all;
};

void begin_span(const Map& e, const Map& w, const Weights& weights, const Parts& parts,
                const Span& span, float* scratch) {
  float* s = scratch + parts.s;
  const auto gated = [&](const Tile& tile) {
    float* gate = scratch + parts.gate + tile.place * parts.gate_floats;
    w.pack(tile.sample, tile.pixel, tile.count, Words::kFloats, gate);
    return Transform{nullptr, nullptr, false, gate, e.channels() / w.channels(),
                     products().pixels};
  };
  // What `prepare` adds to s depends on its channels alone, so both weights can read it.
  pack_operand(e, parts.squeeze_wide ? weights.squeeze : weights.of_s, span, s, gated);
  const int words = static_cast<int>(weights.of_r.words());
  const int64_t steps = words == 0 ? 1 : 2, hidden = weights.squeeze.rows();
  const auto activate = [&](const Tile& tile, int64_t row, int rows, const float* acc) {
    const Affine affine{weights.scale1.data() + row, weights.shift1.data() + row, nullptr, 0, true};
    float* r = scratch + parts.r + tile.place * weights.of_r.panel_floats();
    products().affine_to_panel[words](acc, rows, tile.count, affine,
                                      r + row / steps * products().pixels);
  };
  for_each_rows(hidden, parts.squeeze_wide, [&](const Rows& rows) {
    weights.squeeze.multiply(span, rows, s, false, scratch);
    for_each_part(span, rows, scratch, activate);
  });
  weights.of_r.prepare(span, scratch + parts.r);
}

// Adds the tiles' sums up in their order.
void mean_of_sums(const float* sums, int64_t batch, int64_t plane, int64_t channels, float* mean) {
  const int64_t tiles = tiles_of(plane);
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> total(channels);
    for (int64_t t = 0; t < tiles; ++t) {
      const float* row = sums + (b * tiles + t) * channels;
      for (int64_t c = 0; c < channels; ++c) total[c] += row[c];
    }
    for (int64_t c = 0; c < channels; ++c) {
      mean[b * channels + c] = static_cast<float>(total[c] / static_cast<double>(plane));
    }
  }
}

}  // namespace

Tensor gated_fusion_packed(Tensor e, Tensor w, Tensor squeeze_packed, Tensor squeeze_scale,
                           Tensor squeeze_shift, Tensor fusion_of_s_packed,
                           Tensor fusion_of_r_packed, Tensor fusion_scale, Tensor fusion_shift,
                           bool mean_only) {
  check_x(e);
  check_x(w);
  const int64_t channels = e.size(1), groups = w.size(1);
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0 && w.size(0) == e.size(0) &&
                      w.size(2) == e.size(2) && w.size(3) == e.size(3),
                  "w must be (B, G, H, W) for e (B, C, H, W), G a divisor of C");
  const PackedWeight squeeze(squeeze_packed, "squeeze_packed", e, channels);
  const PackedWeight of_s(fusion_of_s_packed, "fusion_of_s_packed", e, channels);
  const PackedWeight of_r(fusion_of_r_packed, "fusion_of_r_packed", e, squeeze.rows());
  STD_TORCH_CHECK(of_s.rows() == channels && of_r.rows() == channels,
                  "the fusion's weights must have ", channels, " rows");
  STD_TORCH_CHECK(squeeze.words() == of_s.words() && squeeze.words() == of_r.words(),
                  "the three weights must be packed alike");
  const Vector scale1(squeeze_scale, "squeeze_scale", squeeze.rows());
  const Vector shift1(squeeze_shift, "squeeze_shift", squeeze.rows());
  const Vector scale3(fusion_scale, "fusion_scale", channels);
  const Vector shift3(fusion_shift, "fusion_shift", channels);
  const Weights weights{squeeze, of_s, of_r, scale1, shift1, scale3, shift3};
  const Map map(e), gate(w);
  const Parts parts(weights, map.plane(), groups);

  std::optional<Map> out;
  std::vector<float> sums;
  if (mean_only) {
    sums.resize(map.batch() * tiles_of(map.plane()) * channels);
  } else {
    out.emplace(empty_map(e, channels, e.size(2), e.size(3)));
  }
  for_each_block(
      {map.batch(), map.plane(), channels, channels + squeeze.rows(), parts.wide}, parts.all,
      [&](const Span& span, float* scratch) {
        begin_span(map, gate, weights, parts, span, scratch);
      },
      [&](const Span& span, const Rows& which, float* scratch) {
        of_s.multiply(span, which, scratch + parts.s, false, scratch);
        of_r.multiply(span, which, scratch + parts.r, true, scratch);
        for_each_part(span, which, scratch, [&](const Tile& tile, int64_t row, int rows,
                                                const float* acc) {
          const float* gates = scratch + parts.gate + tile.place * parts.gate_floats;
          float* sum = mean_only ? sums.data() + tile.index * channels + row : nullptr;
          const Fusion fusion{scale3.data() + row, shift3.data() + row, gates, row,
                              channels / groups,   sum};
          const MutableMapView to =
              mean_only ? MutableMapView{} : out->mutable_at(tile.sample, row, tile.pixel);
          products().fusion[map.element()](acc, rows, tile.count, fusion,
                                           map.at(tile.sample, row, tile.pixel), to);
        });
      });
  if (!mean_only) return out->tensor();
  Tensor mean = empty_per_channel(e, ScalarType::Float);
  mean_of_sums(sums.data(), map.batch(), map.plane(), channels,
               static_cast<float*>(mean.mutable_data_ptr()));
  return mean;
}

}  // namespace ciema::cpu
