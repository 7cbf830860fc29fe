// The stage channel_interaction on the CPU (spec.md 2.1):
//
//   mean, max = over the pixels of x            a = sigmoid(V2 relu(V1 mean) + V2 relu(V1 max))
//   e[b, m, p] = a[b, m] x[b, m, p] + (1 - a[b, m]) sum_k W[m, k] x[b, k, p]
//
// Layouts, threads, sums of the product: products.cpp; of the statistics: channel_statistics.cpp.
// Bytes    reads x once for the statistics, once into panels and once, from the second-level cache,
//          for the gate; writes e once. W x is never stored.
#include "channel_interaction.h"

#include <cmath>

#include "channel_statistics.h"
#include "products.h"

namespace ciema::cpu {
namespace {

float dot(const float* a, const float* b, int64_t count) {
  constexpr int kChains = 16;  // independent sums, which the compiler keeps in vectors
  float sum[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    for (int j = 0; j < kChains; ++j) sum[j] += a[i + j] * b[i + j];
  }
  float total = 0.0f;
  for (; i < count; ++i) total += a[i] * b[i];
  for (int j = 0; j < kChains; ++j) total += sum[j];
  return total;
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
  const int64_t acc_floats = kBlockRows * products().pixels;
  std::vector<float> complement(x.batch() * x.channels());
  for (size_t i = 0; i < complement.size(); ++i) complement[i] = 1.0f - gate[i];
  for_each_block(
      x.batch(), x.plane(), x.channels(), x.channels(), acc_floats + weight.panel_floats(),
      [&](const Tile& tile, float* scratch) {
        x.pack(tile.sample, tile.pixel, tile.count, weight.words(), scratch + acc_floats);
      },
      [&](const Tile& tile, int64_t row, int count, float* acc) {
        weight.multiply(row, acc + acc_floats, tile.count, false, acc);
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

}  // namespace ciema::cpu
