// Products with the statistics of their results, and batch norms behind them on the way back:
//
//   out = W x + W' x' + bias      mean, var over samples and pixels of each row
//   g = gradient of y = weight n + bias, n = (z - mean) / sqrt(var + eps)
//   grad_z = weight / sqrt(var + eps) (g - mean(g) - n mean(g n)), without the means in evaluation
//
// Layouts, threads, sums of products  as in products.cpp.
// Statistics of a map that is stored  are those of its rounded values: a norm divides what is read
//          back by their spread, which may be smaller than the rounding.
// Statistics and gradients of vectors  float32 inside a tile, float64 over tiles (moments.h).
// Bytes    the gradients read their maps twice, once for the sums and once for grad_z.
#include "products_training.h"

#include <cmath>

#include "moments.h"

namespace ciema::cpu {
namespace {

Tensor empty_vector(const Tensor& like, int64_t size) {
  return torch::stable::empty({size}, ScalarType::Float, std::nullopt, like.device());
}

float* floats_of(Tensor& value) { return static_cast<float*>(value.mutable_data_ptr()); }

struct Operand {
  Operand(const Tensor& x, const Tensor& packed, const char* name)
      : map(x), weight(packed, name, x, x.size(1)) {}
  Map map;
  PackedWeight weight;
};

void check_same_pixels(const Tensor& a, const Tensor& b, const char* name) {
  check_x(b);
  STD_TORCH_CHECK(a.size(0) == b.size(0) && a.size(2) == b.size(2) && a.size(3) == b.size(3), name,
                  " must have the samples and pixels of the first map");
}

// One or two operands, their transforms, and where a thread's floats hold what: the sums of a
// block, the gates, the panels.
struct Product {
  Product(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& gate,
          const std::optional<Tensor>& second, const std::optional<Tensor>& second_packed,
          const std::optional<Tensor>& scale, const std::optional<Tensor>& shift);

  int64_t rows() const { return operands[0].weight.rows(); }
  void pack(const Span& span, float* scratch) const;
  void multiply(const Span& span, const Rows& which, float* acc) const {
    for (size_t i = 0; i < operands.size(); ++i) {
      operands[i].weight.multiply(span, which, acc + places[i], i > 0, acc);
    }
  }

  std::vector<Operand> operands;
  std::optional<Map> gates;
  std::optional<Vector> scales, shifts;  // of the last operand
  std::vector<int64_t> places;
  int64_t gate_at = 0, gate_floats = 0, floats = 0, work = 0;
  bool wide = false;
};

Product::Product(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& gate,
                 const std::optional<Tensor>& second, const std::optional<Tensor>& second_packed,
                 const std::optional<Tensor>& scale, const std::optional<Tensor>& shift) {
  check_x(x);
  operands.emplace_back(x, packed, "packed");
  if (second) {
    check_same_pixels(x, *second, "second");
    STD_TORCH_CHECK(second_packed.has_value(), "second needs second_packed");
    operands.emplace_back(*second, *second_packed, "second_packed");
    STD_TORCH_CHECK(operands[1].weight.rows() == rows(), "both weights must have ", rows(),
                    " rows");
  }
  if (gate) {
    check_same_pixels(x, *gate, "gate");
    STD_TORCH_CHECK(gate->size(1) > 0 && x.size(1) % gate->size(1) == 0,
                    "gate must have a divisor of x's channels");
    gates.emplace(*gate);
  }
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift come together");
  scales.emplace(scale, "scale", operands.back().map.channels());
  shifts.emplace(shift, "shift", operands.back().map.channels());
  for (const Operand& operand : operands) {
    wide = wide || operand.weight.wants_wide(operand.map.plane());
  }
  gate_at = sum_floats(wide);
  gate_floats = gates ? (gates->channels() + 1) * products().pixels : 0;
  floats = gate_at + 2 * gate_floats;
  for (const Operand& operand : operands) {
    places.push_back(floats);
    floats += operand.weight.operand_floats(wide);
    work += operand.map.channels();
  }
}

void Product::pack(const Span& span, float* scratch) const {
  for (size_t i = 0; i < operands.size(); ++i) {
    const auto transform = [&](const Tile& tile) {
      Transform how{};
      if (i + 1 == operands.size()) how = {scales->data(), shifts->data(), true, nullptr, 1, 0};
      if (i == 0 && gates) {
        float* gate = scratch + gate_at + tile.place * gate_floats;
        gates->pack(tile.sample, tile.pixel, tile.count, Words::kFloats, gate);
        how.gate = gate;
        how.group_channels = operands[0].map.channels() / gates->channels();
        how.gate_stride = products().pixels;
      }
      return how;
    };
    pack_operand(operands[i].map, operands[i].weight, span, scratch + places[i], transform);
  }
}

// The batch norm's vectors on the way back.
struct Norm {
  Norm(const Tensor& mean, const Tensor& var, const Tensor& weight, const Tensor& bias, double eps,
       int64_t rows)
      : mean(mean, "mean", rows), weight(weight, "weight", rows), bias(bias, "bias", rows) {
    const Vector variance(var, "var", rows);
    for (int64_t r = 0; r < rows; ++r) {
      rstd.push_back(static_cast<float>(1.0 / std::sqrt(variance.data()[r] + eps)));
    }
  }

  NormGradient at(int64_t row) const {
    return {mean.from(row), rstd.data() + row, weight.from(row), bias.from(row),
            nullptr,        nullptr,           nullptr,          nullptr};
  }

  Vector mean, weight, bias;
  std::vector<float> rstd;
};

// Both passes over the maps; `run(tile, row, rows, norm, out, scratch)` works on a block.
template <class Run>
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Map& z, ScalarType dtype, const Norm& norm,
                                                 bool training, int64_t scratch_floats,
                                                 const Run& run) {
  const int64_t rows = z.channels();
  RowSums sums(z.batch(), z.plane(), rows), products_of(z.batch(), z.plane(), rows);
  for_each_strip(z, scratch_floats,
                 [&](const Tile& tile, int64_t row, int count, float* scratch) {
                   NormGradient how = norm.at(row);
                   how.sums = sums.at(tile, row);
                   how.products = products_of.at(tile, row);
                   run(tile, row, count, how, MutableMapView{}, scratch);
                 });
  Tensor grad_bias = empty_vector(z.tensor(), rows), grad_weight = empty_vector(z.tensor(), rows);
  sums.finish(floats_of(grad_bias));
  products_of.finish(floats_of(grad_weight));
  std::vector<float> shares(floats_of(grad_bias), floats_of(grad_bias) + rows);
  std::vector<float> product_shares(floats_of(grad_weight), floats_of(grad_weight) + rows);
  const float all = static_cast<float>(z.batch() * z.plane());
  for (float& share : shares) share /= all;
  for (float& share : product_shares) share /= all;
  Map out(empty_map(z.tensor(), rows, z.tensor().size(2), z.tensor().size(3), dtype));
  for_each_strip(z, scratch_floats,
                 [&](const Tile& tile, int64_t row, int count, float* scratch) {
                   NormGradient how = norm.at(row);
                   how.sum_share = training ? shares.data() + row : nullptr;
                   how.product_share = training ? product_shares.data() + row : nullptr;
                   run(tile, row, count, how, out.mutable_at(tile.sample, row, tile.pixel),
                       scratch);
                 });
  return {out.tensor(), grad_weight, grad_bias};
}

void check_alike(const Tensor& value, const Tensor& z, const char* name) {
  check_same_pixels(z, value, name);
  STD_TORCH_CHECK(value.size(1) == z.size(1), name, " must have the shape of z");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> product_moments(
    Tensor x, Tensor packed, std::optional<Tensor> gate, std::optional<Tensor> second,
    std::optional<Tensor> second_packed, std::optional<Tensor> scale, std::optional<Tensor> shift,
    std::optional<Tensor> bias, bool store, bool moments) {
  const Product product(x, packed, gate, second, second_packed, scale, shift);
  const Map& map = product.operands[0].map;
  const int64_t rows = product.rows();
  const Vector biases(bias, "bias", rows);
  std::optional<Map> out;
  if (store) out.emplace(empty_map(x, rows, x.size(2), x.size(3)));
  std::optional<Moments> statistics;
  if (moments) statistics.emplace(map.batch(), map.plane(), rows);
  const bool rounded = out && out->element() != static_cast<int>(Element::kFloat);
  const auto finish = [&](const Tile& tile, int64_t row, int count, float* acc) {
    if (statistics && !rounded) statistics->take(tile, row, count, acc);
    if (!out) return;
    const Affine affine{nullptr, biases.from(row), nullptr, 0, false};
    products().affine[out->element()](acc, count, tile.count, affine,
                                      out->mutable_at(tile.sample, row, tile.pixel));
    if (!statistics || !rounded) return;
    products().pack[static_cast<int>(Words::kFloats)][out->element()](
        out->at(tile.sample, row, tile.pixel), count, tile.count, Transform{}, acc);
    statistics->take(tile, row, count, acc);
  };
  for_each_block(
      {map.batch(), map.plane(), rows, product.work, product.wide}, product.floats,
      [&](const Span& span, float* scratch) { product.pack(span, scratch); },
      [&](const Span& span, const Rows& which, float* acc) {
        product.multiply(span, which, acc);
        for_each_part(span, which, acc, finish);
      });
  Tensor mean = empty_vector(x, moments ? rows : 0), var = empty_vector(x, moments ? rows : 0);
  if (statistics) {
    statistics->finish(rounded ? nullptr : biases.data(), floats_of(mean), floats_of(var));
  }
  const Tensor nothing = torch::stable::empty({0}, x.scalar_type(), std::nullopt, x.device());
  return {out ? out->tensor() : nothing, mean, var};
}

Tensor norm_relu(Tensor z, Tensor scale, Tensor shift, Tensor like) {
  check_x(z);
  const int64_t rows = z.size(1);
  const Vector scales(scale, "scale", rows), shifts(shift, "shift", rows);
  const Map map(z);
  Map out(empty_map(z, rows, z.size(2), z.size(3), like.scalar_type()));
  for_each_strip(
      map, kBlockRows * products().pixels,
      [&](const Tile& tile, int64_t row, int count, float* acc) {
        products().pack[static_cast<int>(Words::kFloats)][map.element()](
            map.at(tile.sample, row, tile.pixel), count, tile.count, Transform{}, acc);
        const Affine affine{scales.from(row), shifts.from(row), nullptr, 0, true};
        products().affine[out.element()](acc, count, tile.count, affine,
                                         out.mutable_at(tile.sample, row, tile.pixel));
      });
  return out.tensor();
}

std::tuple<Tensor, Tensor, Tensor> norm_relu_backward(Tensor grad, Tensor z, Tensor mean,
                                                      Tensor var, Tensor weight, Tensor bias,
                                                      double eps, bool training) {
  check_x(z);
  check_alike(grad, z, "grad");
  const Map back(grad), map(z);
  const Norm norm(mean, var, weight, bias, eps, z.size(1));
  return norm_backward(
      map, grad.scalar_type(), norm, training, 1,
      [&](const Tile& tile, int64_t row, int count, const NormGradient& how,
          const MutableMapView& out, float*) {
        products().relu_gradient[back.element()](
            count, tile.count, how, map.at(tile.sample, row, tile.pixel),
            static_cast<Element>(map.element()), back.at(tile.sample, row, tile.pixel), out);
      });
}

std::tuple<Tensor, Tensor, Tensor> norm_gate_backward(Tensor grad, Tensor e, Tensor w, Tensor z,
                                                      Tensor mean, Tensor var, Tensor weight,
                                                      Tensor bias, double eps, bool training) {
  check_x(z);
  check_alike(grad, z, "grad");
  check_alike(e, z, "e");
  STD_TORCH_CHECK(e.scalar_type() == grad.scalar_type(), "e must have the dtype of grad");
  check_same_pixels(z, w, "w");
  STD_TORCH_CHECK(w.size(1) > 0 && z.size(1) % w.size(1) == 0,
                  "w must have a divisor of z's channels");
  const Map back(grad), map(z), values(e), gate(w);
  const Norm norm(mean, var, weight, bias, eps, z.size(1));
  return norm_backward(
      map, grad.scalar_type(), norm, training, (w.size(1) + 1) * products().pixels,
      [&](const Tile& tile, int64_t row, int count, const NormGradient& how,
          const MutableMapView& out, float* scratch) {
        const int64_t group = z.size(1) / w.size(1);
        const int64_t first = pack_groups(gate, group, tile, row, count, scratch);
        const Fusion fusion{nullptr, nullptr, scratch, first, group, nullptr};
        products().gate_gradient[back.element()](
            count, tile.count, how, fusion, map.at(tile.sample, row, tile.pixel),
            static_cast<Element>(map.element()), values.at(tile.sample, row, tile.pixel),
            back.at(tile.sample, row, tile.pixel), out);
      });
}

}  // namespace ciema::cpu
