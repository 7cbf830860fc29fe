// The stage channel_interaction on the CPU (spec.md 2.1):
//
//   mean, max = over the pixels of x            a = sigmoid(V2 relu(V1 mean) + V2 relu(V1 max))
//   e[b, m, p] = a[b, m] x[b, m, p] + (1 - a[b, m]) sum_k W[m, k] x[b, k, p]
//
//   grad_x[b, m, p] = a[b, m] grad_e[b, m, p] + sum_k W[k, m] (1 - a[b, k]) grad_e[b, k, p]
//                     + grad_mean[b, m] / HW + (p == argmax[b, m] ? grad_max[b, m] : 0)
//
// Layouts, threads, sums of the product: products.cpp; of the statistics: channel_statistics.cpp.
// Bytes    reads x once for the statistics, once into panels and once, from the second-level cache,
//          for the gate; writes e once. W x is never stored.
#include "channel_interaction.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "channel_statistics.h"
#include "dot.h"
#include "products.h"

namespace ciema::cpu {
namespace {

template <class T>
void add_to(void* element, float value) {
  T* to = static_cast<T*>(element);
  *to = static_cast<T>(static_cast<float>(*to) + value);
}

void add_to_element(Element kind, void* element, float value) {
  if (kind == Element::kFloat) {
    add_to<float>(element, value);
  } else if (kind == Element::kBFloat16) {
    add_to<torch::headeronly::BFloat16>(element, value);
  } else {
    add_to<torch::headeronly::Half>(element, value);
  }
}

float relu(float value) { return value > 0.0f || value != value ? value : 0.0f; }

// One sample's gate.
void gate_of(const float* mean, const float* maximum, const float* squeeze, const float* excite,
             int64_t channels, int64_t hidden, float* gate) {
  std::vector<float> sum(hidden);
  for (int64_t j = 0; j < hidden; ++j) {
    const float* row = squeeze + j * channels;
    sum[j] = relu(dot(row, mean, channels)) + relu(dot(row, maximum, channels));
  }
  for (int64_t c = 0; c < channels; ++c) {
    gate[c] = 1.0f / (1.0f + std::exp(-dot(excite + c * hidden, sum.data(), hidden)));
  }
}

Tensor interpolate_with_product(const Map& x, const PackedWeight& weight, const float* gate) {
  Map out(empty_map(x.tensor(), x.channels(), x.tensor().size(2), x.tensor().size(3)));
  std::vector<float> complement(x.batch() * x.channels());
  for (size_t i = 0; i < complement.size(); ++i) complement[i] = 1.0f - gate[i];
  multiply_map(x, weight, [&](const Tile& tile, int64_t row, int count, const float* acc) {
    const int64_t at = tile.sample * x.channels() + row;
    const Combination how{complement.data() + at, gate + at, nullptr};
    products().combine[x.element()](acc, count, tile.count, how,
                                    x.at(tile.sample, row, tile.pixel),
                                    out.mutable_at(tile.sample, row, tile.pixel));
  });
  return out.tensor();
}

// Copies: an op's outputs may not be its inputs.
std::tuple<Tensor, Tensor, Tensor> known_statistics(const Tensor& mean, const Tensor& maximum,
                                                    const Tensor& argmax, const Tensor& x) {
  check_per_channel(mean, "x_mean", ScalarType::Float, "float32", x);
  check_per_channel(maximum, "x_maximum", ScalarType::Float, "float32", x);
  check_per_channel(argmax, "x_argmax", ScalarType::Long, "int64", x);
  return {torch::stable::clone(torch::stable::contiguous(mean)),
          torch::stable::clone(torch::stable::contiguous(maximum)),
          torch::stable::clone(torch::stable::contiguous(argmax))};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_interaction_packed(
    Tensor x, Tensor squeeze_weight, Tensor excite_weight, Tensor interaction_packed,
    std::optional<Tensor> x_mean, std::optional<Tensor> x_maximum,
    std::optional<Tensor> x_argmax) {
  check_x(x);
  const int64_t batch = x.size(0), channels = x.size(1);
  const int64_t hidden = squeeze_weight.size(0);
  const Vector squeeze(squeeze_weight, "squeeze_weight", hidden * channels);
  const Vector excite(excite_weight, "excite_weight", channels * hidden);
  const PackedWeight weight(interaction_packed, "interaction_packed", x, channels);
  STD_TORCH_CHECK(weight.rows() == channels, "interaction_packed must be square");
  const Map map(x);
  auto [mean, maximum, argmax] = x_mean && x_maximum && x_argmax
                                     ? known_statistics(*x_mean, *x_maximum, *x_argmax, x)
                                     : channel_statistics(map.tensor());
  Tensor gate = empty_per_channel(x, ScalarType::Float);
  float* gates = static_cast<float*>(gate.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t at = b * channels;
    gate_of(static_cast<const float*>(mean.const_data_ptr()) + at,
            static_cast<const float*>(maximum.const_data_ptr()) + at, squeeze.data(),
            excite.data(), channels, hidden, gates + at);
  }
  Tensor e = interpolate_with_product(map, weight, gates);
  return {e, gate, mean, maximum, argmax};
}

Tensor channel_interaction_input_backward(Tensor grad_e, Tensor gate, Tensor interaction_packed,
                                          Tensor grad_mean, Tensor grad_maximum, Tensor argmax) {
  check_backward(grad_mean, grad_maximum, argmax, grad_e);
  const int64_t channels = grad_e.size(1), all = grad_e.size(0) * channels;
  const PackedWeight weight(interaction_packed, "interaction_packed", grad_e, channels);
  STD_TORCH_CHECK(weight.rows() == channels, "interaction_packed must be square");
  const Vector gates(gate, "gate", all), maxima(grad_maximum, "grad_maximum", all);
  const Vector means(grad_mean, "grad_mean", all);
  const Map map(grad_e);
  Map out(empty_map(grad_e, channels, grad_e.size(2), grad_e.size(3)));
  std::vector<float> complement(all), shift(all);
  for (int64_t i = 0; i < all; ++i) {
    complement[i] = 1.0f - gates.data()[i];
    shift[i] = means.data()[i] / static_cast<float>(map.plane());
  }
  multiply_map(
      map, weight,
      [&](const Tile& tile) {
        const float* scale = complement.data() + tile.sample * channels;
        return Transform{scale, nullptr, false, nullptr, 1, 0};
      },
      [&](const Tile& tile, int64_t row, int count, const float* acc) {
        const int64_t at = tile.sample * channels + row;
        const Combination how{nullptr, gates.data() + at, shift.data() + at};
        products().combine[map.element()](acc, count, tile.count, how,
                                          map.at(tile.sample, row, tile.pixel),
                                          out.mutable_at(tile.sample, row, tile.pixel));
      });
  const Tensor places = torch::stable::contiguous(argmax);
  const int64_t* place = static_cast<const int64_t*>(places.const_data_ptr());
  for (int64_t i = 0; i < all; ++i) {
    STD_TORCH_CHECK(place[i] >= 0 && place[i] < map.plane(), "argmax must lie in [0, ",
                    map.plane(), "), got ", place[i]);
    void* peak = out.mutable_at(i / channels, i % channels, place[i]).data;
    add_to_element(static_cast<Element>(out.element()), peak, maxima.data()[i]);
  }
  return out.tensor();
}

}  // namespace ciema::cpu
