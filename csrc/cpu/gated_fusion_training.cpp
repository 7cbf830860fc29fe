// The parts of gated fusion that only training needs (spec.md 2.4):
//
//   out = e (phi + w (1 - phi)), phi = sigmoid(scale logits + shift)
//   grad_s = Ws^T grad_logits + W1^T grad_hidden
//   grad_e = grad_out (phi + w (1 - phi)) + w grad_s
//   grad_w = sum over the group's channels of e (grad_out (1 - phi) + grad_s)
//
// Layouts, sums  as in products.cpp; grad_s exists only as sums of a block.
// Threads  over tiles of pixels; a tile's rows stay with one thread, which adds up grad_w in their
//          order.
// Bytes    forward: reads e, logits, w, writes out. Backward: reads grad_out, e, logits,
//          grad_logits, grad_hidden and w once, writes grad_e and grad_w.
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

// The sums of a span's tiles, [group][pixel] each, into the gradient of w.
void store_gate_sums(const Span& span, const float* sums, Map* grad_w) {
  const int64_t groups = grad_w->channels(), width = products().pixels;
  for (int j = 0; j < span.count; ++j) {
    const Tile& tile = span.tiles[j];
    for (int64_t g = 0; g < groups; g += kBlockRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, groups - g));
      products().affine[grad_w->element()](sums + (j * groups + g) * width, rows, tile.count,
                                           Affine{}, grad_w->mutable_at(tile.sample, g, tile.pixel));
    }
  }
}

void check_maps(const Tensor& grad_out, const Tensor& e, const Tensor& w, const Tensor& logits,
                const Tensor& grad_logits) {
  check_x(e);
  check_gate(w, e);
  const int64_t channels = e.size(1);
  check_alike(grad_out, e, "grad_out", channels);
  check_alike(logits, e, "logits", channels);
  check_alike(grad_logits, e, "grad_logits", channels);
  STD_TORCH_CHECK(grad_out.scalar_type() == e.scalar_type() &&
                      logits.scalar_type() == e.scalar_type(),
                  "grad_out and logits must have the dtype of e");
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
  check_maps(grad_out, e, w, logits, grad_logits);
  const int64_t channels = e.size(1), groups = w.size(1), width = products().pixels;
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

  const bool wide =
      of_logits.wants_wide(values.plane()) || of_hidden.wants_wide(values.plane());
  const int64_t gate_at = sum_floats(wide), gate_floats = (groups + 1) * width;
  const int64_t sum_at = gate_at + 2 * gate_floats, sums_of_tile = groups * width;
  const int64_t logits_at = sum_at + 2 * sums_of_tile;
  const int64_t hidden_at = logits_at + of_logits.operand_floats(wide);
  const auto all_rows = [&](const Span& span, const Rows&, float* scratch) {
    std::fill_n(scratch + sum_at, 2 * sums_of_tile, 0.0f);
    for_each_rows(channels, wide, [&](const Rows& which) {
      of_logits.multiply(span, which, scratch + logits_at, false, scratch);
      of_hidden.multiply(span, which, scratch + hidden_at, true, scratch);
      for_each_part(span, which, scratch, [&](const Tile& tile, int64_t row, int rows,
                                              const float* acc) {
        const float* gates = scratch + gate_at + tile.place * gate_floats;
        const Fusion fusion{scales.from(row),  shifts.from(row), gates, row,
                            channels / groups, nullptr};
        products().fusion_gradient[values.element()](
            acc, rows, tile.count, fusion, before.at(tile.sample, row, tile.pixel),
            values.at(tile.sample, row, tile.pixel), back.at(tile.sample, row, tile.pixel),
            grad_e.mutable_at(tile.sample, row, tile.pixel),
            scratch + sum_at + tile.place * sums_of_tile);
      });
    });
    store_gate_sums(span, scratch + sum_at, &grad_w);
  };
  for_each_block(
      {values.batch(), values.plane(), wide ? 2 : 1,  // one block: the rows are walked in it
       channels * (channels + grad_hidden.size(1)), wide},
      hidden_at + of_hidden.operand_floats(wide),
      [&](const Span& span, float* scratch) {
        pack_operand(logit_map, of_logits, span, scratch + logits_at);
        pack_operand(hidden_map, of_hidden, span, scratch + hidden_at);
        for (int j = 0; j < span.count; ++j) {
          const Tile& tile = span.tiles[j];
          gate.pack(tile.sample, tile.pixel, tile.count, Words::kFloats,
                    scratch + gate_at + j * gate_floats);
        }
      },
      all_rows);
  return {grad_e.tensor(), grad_w.tensor()};
}

}  // namespace ciema::cpu
