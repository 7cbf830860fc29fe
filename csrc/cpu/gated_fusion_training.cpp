// The parts of gated fusion that only training needs (spec.md 2.4):
//
//   out = e (phi + w (1 - phi)), phi = sigmoid(scale logits + shift)
//   grad_s = Ws^T grad_logits + W1^T grad_hidden
//   grad_e = grad_out (phi + w (1 - phi)) + w grad_s
//   grad_w = sum over the group's channels of e (grad_out (1 - phi) + grad_s)
//
// Layouts, sums  as in products.cpp; grad_s exists only as sums of a block.
// Threads  over tiles of pixels; a tile's rows stay with one thread, which adds up grad_w in their order.
// Bytes    forward: reads e, logits, w, writes out. Backward: reads grad_out, e, logits, grad_logits,
//          grad_hidden and w once, writes grad_e and grad_w.
#include "gated_fusion.h"
#include "products.h"

namespace ciema::cpu {
namespace {

void check_alike(const Tensor& value, const Tensor& e, const char* name, int64_t channels) {
  check_x(value);
  STD_TORCH_CHECK(value.size(0) == e.size(0) && value.size(1) == channels &&
                      value.size(2) == e.size(2) && value.size(3) == e.size(3),
                  name, " must have ", channels, " channels, and the samples and pixels of e");
}

void check_gate(const Tensor& w, const Tensor& e) {
  STD_TORCH_CHECK(w.dim() == 4 && w.size(1) > 0 && e.size(1) % w.size(1) == 0,
                  "w must be (B, G, H, W), G a divisor of C");
  check_alike(w, e, "w", w.size(1));
}

}  // namespace

Tensor gated_fusion_apply(Tensor e, Tensor w, Tensor logits, Tensor scale, Tensor shift) {
  check_x(e);
  check_gate(w, e);
  const int64_t channels = e.size(1);
  check_alike(logits, e, "logits", channels);
  STD_TORCH_CHECK(logits.scalar_type() == e.scalar_type(), "logits must have the dtype of e");
  const Vector scales(scale, "scale", channels), shifts(shift, "shift", channels);
  const Map map(e), gate(w), before(logits);
  Map out(empty_map(e, channels, e.size(2), e.size(3)));
  const int64_t acc_floats = kBlockRows * products().pixels;
  for_each_strip(
      map, acc_floats + (w.size(1) + 1) * products().pixels,
      [&](const Tile& tile, int64_t row, int rows, float* acc) {
        const int64_t group = channels / w.size(1);
        const int64_t first = pack_groups(gate, group, tile, row, rows, acc + acc_floats);
        products().pack[static_cast<int>(Words::kFloats)][before.element()](
            before.at(tile.sample, row, tile.pixel), rows, tile.count, Transform{}, acc);
        const Fusion fusion{scales.from(row), shifts.from(row), acc + acc_floats,
                            first,            group,            nullptr};
        products().fusion[map.element()](acc, rows, tile.count, fusion,
                                         map.at(tile.sample, row, tile.pixel),
                                         out.mutable_at(tile.sample, row, tile.pixel));
      });
  return out.tensor();
}

std::tuple<Tensor, Tensor> gated_fusion_input_backward(
    Tensor grad_out, Tensor e, Tensor w, Tensor logits, Tensor scale, Tensor shift,
    Tensor grad_logits, Tensor fusion_packed, Tensor grad_hidden, Tensor squeeze_packed) {
  check_x(e);
  check_gate(w, e);
  const int64_t channels = e.size(1), groups = w.size(1), width = products().pixels;
  check_alike(grad_out, e, "grad_out", channels);
  check_alike(logits, e, "logits", channels);
  check_alike(grad_logits, e, "grad_logits", channels);
  STD_TORCH_CHECK(grad_out.scalar_type() == e.scalar_type() &&
                      logits.scalar_type() == e.scalar_type(),
                  "grad_out and logits must have the dtype of e");
  const PackedWeight of_logits(fusion_packed, "fusion_packed", grad_logits, channels);
  check_alike(grad_hidden, e, "grad_hidden", grad_hidden.size(1));
  const PackedWeight of_hidden(squeeze_packed, "squeeze_packed", grad_hidden, grad_hidden.size(1));
  STD_TORCH_CHECK(of_logits.rows() == channels && of_hidden.rows() == channels,
                  "both weights must have ", channels, " rows");
  const Vector scales(scale, "scale", channels), shifts(shift, "shift", channels);
  const Map values(e), gate(w), before(logits), back(grad_out), logit_map(grad_logits);
  const Map hidden_map(grad_hidden);
  Map grad_e(empty_map(e, channels, e.size(2), e.size(3)));
  Map grad_w(empty_map(w, groups, w.size(2), w.size(3)));

  const int64_t gate_at = kBlockRows * width, sum_at = gate_at + (groups + 1) * width;
  const int64_t logits_at = sum_at + groups * width;
  const int64_t hidden_at = logits_at + of_logits.panel_floats();
  const auto rows_of_tile = [&](const Tile& tile, int64_t, int, float* scratch) {
    float* sums = scratch + sum_at;
    std::fill_n(sums, groups * width, 0.0f);
    for (int64_t row = 0; row < channels; row += kBlockRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, channels - row));
      of_logits.multiply(row, scratch + logits_at, tile.count, false, scratch);
      of_hidden.multiply(row, scratch + hidden_at, tile.count, true, scratch);
      const Fusion fusion{scales.from(row), shifts.from(row),  scratch + gate_at,
                          row,              channels / groups, nullptr};
      products().fusion_gradient[values.element()](
          scratch, rows, tile.count, fusion, before.at(tile.sample, row, tile.pixel),
          values.at(tile.sample, row, tile.pixel), back.at(tile.sample, row, tile.pixel),
          grad_e.mutable_at(tile.sample, row, tile.pixel), sums);
    }
    for (int64_t g = 0; g < groups; g += kBlockRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, groups - g));
      products().affine[grad_w.element()](sums + g * width, rows, tile.count, Affine{},
                                          grad_w.mutable_at(tile.sample, g, tile.pixel));
    }
  };
  for_each_block(
      values.batch(), values.plane(), 1, channels * (channels + grad_hidden.size(1)),
      hidden_at + of_hidden.panel_floats(),
      [&](const Tile& tile, float* scratch) {
        gate.pack(tile.sample, tile.pixel, tile.count, Words::kFloats, scratch + gate_at);
        logit_map.pack(tile.sample, tile.pixel, tile.count, of_logits.words(),
                       scratch + logits_at);
        hidden_map.pack(tile.sample, tile.pixel, tile.count, of_hidden.words(),
                        scratch + hidden_at);
      },
      rows_of_tile);
  return {grad_e.tensor(), grad_w.tensor()};
}

}  // namespace ciema::cpu
