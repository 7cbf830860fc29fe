// The stage msff on the CPU, with the batch norm as scale and shift (spec.md 1, 5.1):
//
//   out = relu(scale * sum_i up(W_i f_i) + shift)
//
// Maps of less than the target's size are multiplied at their own size into float32 buffers
// [block of 64 rows][pixel][64]; the others are multiplied tile by tile, and the tile's epilogue
// adds the bilinearly resized buffers (align_corners=False): four vectors of channels a pixel, no
// gathers.
//
// Layouts, threads, sums  as in products.cpp.
// Bytes    reads each map once; writes and reads C_out floats a pixel of each small map, which the
//          last-level cache holds; writes out once.
#include "msff.h"

#include "moments.h"
#include "resize.h"

namespace ciema::cpu {
namespace {

// For each pixel of height x width the four pixels of a smaller map's buffer.
std::vector<Taps> taps_of(int64_t height, int64_t width, const Tensor& small) {
  std::vector<Taps> taps;
  taps.reserve(height * width);
  for (int64_t y = 0; y < height; ++y) {
    const Between row(y, height, small.size(2));
    for (int64_t x = 0; x < width; ++x) {
      const Between column(x, width, small.size(3));
      Taps tap;
      for (int t = 0; t < 4; ++t) {
        const int64_t line = t < 2 ? row.low : row.high;
        const double share = t < 2 ? 1.0 - row.share : row.share;
        const bool left = t % 2 == 0;
        const int64_t at = line * small.size(3) + (left ? column.low : column.high);
        tap.offset[t] = at * kBlockRows;
        tap.weight[t] = static_cast<float>(share * (left ? 1.0 - column.share : column.share));
      }
      taps.push_back(tap);
    }
  }
  return taps;
}

struct Native {
  Map map;
  PackedWeight weight;
};

struct Small {
  Tensor product;  // (B, blocks, H_i * W_i, kBlockRows) float32
  std::vector<Taps> taps;
  int64_t plane;
};

Tensor product_of(const Map& map, const PackedWeight& weight) {
  const int64_t rows = weight.rows(), plane = map.plane();
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  Tensor out = torch::stable::empty({map.batch(), blocks, plane, kBlockRows}, ScalarType::Float,
                                    std::nullopt, map.tensor().device());
  float* data = static_cast<float*>(out.mutable_data_ptr());
  multiply_map(map, weight, [&](const Tile& tile, int64_t row, int count, const float* acc) {
    const int64_t block = tile.sample * blocks + row / kBlockRows;
    float* to = data + (block * plane + tile.pixel) * kBlockRows;
    products().affine[static_cast<int>(Element::kFloat)](acc, count, tile.count, Affine{},
                                                         MutableMapView{to, 1, kBlockRows});
  });
  return out;
}

// What is summed, with the maps' products that are needed before.
struct Sum {
  Sum(const std::vector<Tensor>& features, const std::vector<Tensor>& packed);

  std::vector<Native> natives;
  std::vector<Small> smalls;
  int64_t rows = 0, height = 0, width = 0;
  bool wide = false;
};

Sum::Sum(const std::vector<Tensor>& features, const std::vector<Tensor>& packed) {
  STD_TORCH_CHECK(!features.empty() && features.size() == packed.size(),
                  "msff needs a packed weight for each of its maps, got ", features.size(),
                  " maps and ", packed.size(), " weights");
  for (const Tensor& feature : features) {
    check_x(feature);
    STD_TORCH_CHECK(feature.size(0) == features[0].size(0) &&
                        feature.scalar_type() == features[0].scalar_type(),
                    "the maps must have one batch size and one dtype");
    height = std::max(height, feature.size(2));
    width = std::max(width, feature.size(3));
  }
  for (size_t i = 0; i < features.size(); ++i) {
    const Tensor& feature = features[i];
    const PackedWeight weight(packed[i], "packed", feature, feature.size(1));
    if (i == 0) rows = weight.rows();
    STD_TORCH_CHECK(weight.rows() == rows, "packed[", i, "] has ", weight.rows(),
                    " rows, packed[0] has ", rows);
    const Map map(feature);
    if (feature.size(2) == height && feature.size(3) == width) {
      natives.push_back({map, weight});
      wide = wide || weight.wants_wide(map.plane());
    } else {
      smalls.push_back({product_of(map, weight), taps_of(height, width, feature), map.plane()});
    }
  }
}

// out = act(scale * sum + shift), vectors may be missing; the moments are those of the sum alone.
void fuse(const Sum& sum, const float* scale, const float* shift, bool relu, Moments* moments,
          Map* out) {
  const int64_t rows = sum.rows, blocks = (rows + kBlockRows - 1) / kBlockRows;
  int64_t floats = sum_floats(sum.wide), work = 4 * static_cast<int64_t>(sum.smalls.size()) + 1;
  std::vector<int64_t> operands;
  for (const Native& native : sum.natives) {
    operands.push_back(floats);
    floats += native.weight.operand_floats(sum.wide);
    work += native.map.channels();
  }
  const auto finish = [&](const Tile& tile, int64_t row, int count, float* acc) {
    std::vector<Resized> resized;
    for (const Small& small : sum.smalls) {
      const float* data = static_cast<const float*>(small.product.const_data_ptr());
      const int64_t block = tile.sample * blocks + row / kBlockRows;
      resized.push_back({data + block * small.plane * kBlockRows, small.taps.data() + tile.pixel});
    }
    Affine affine{scale == nullptr ? nullptr : scale + row,
                  shift == nullptr ? nullptr : shift + row, resized.data(),
                  static_cast<int>(resized.size()), relu};
    if (moments != nullptr) {  // they are taken of complete sums
      products().add_resized(acc, count, tile.count, affine);
      affine.resized_count = 0;
      moments->take(tile, row, count, acc);
    }
    products().affine[out->element()](acc, count, tile.count, affine,
                                      out->mutable_at(tile.sample, row, tile.pixel));
  };
  for_each_block(
      {out->batch(), out->plane(), rows, work, sum.wide}, floats,
      [&](const Span& span, float* scratch) {
        for (size_t i = 0; i < operands.size(); ++i) {
          const Native& native = sum.natives[i];
          pack_operand(native.map, native.weight, span, scratch + operands[i]);
        }
      },
      [&](const Span& span, const Rows& which, float* acc) {
        if (operands.empty()) std::fill_n(acc, block_floats(), 0.0f);
        for (size_t i = 0; i < operands.size(); ++i) {
          sum.natives[i].weight.multiply(span, which, acc + operands[i], i > 0, acc);
        }
        for_each_part(span, which, acc, finish);
      });
}

}  // namespace

Tensor msff_packed(std::vector<Tensor> features, std::vector<Tensor> packed, Tensor scale,
                   Tensor shift) {
  const Sum sum(features, packed);
  const Vector scales(scale, "scale", sum.rows), shifts(shift, "shift", sum.rows);
  Map out(empty_map(features[0], sum.rows, sum.height, sum.width));
  fuse(sum, scales.data(), shifts.data(), true, nullptr, &out);
  return out.tensor();
}

std::tuple<Tensor, Tensor, Tensor> msff_sum(std::vector<Tensor> features,
                                            std::vector<Tensor> packed, bool moments) {
  const Sum sum(features, packed);
  Map out(empty_map(features[0], sum.rows, sum.height, sum.width, ScalarType::Float));
  const auto vector = [&] {
    return torch::stable::empty({moments ? sum.rows : 0}, ScalarType::Float, std::nullopt,
                                features[0].device());
  };
  Tensor mean = vector(), var = vector();
  std::optional<Moments> statistics;
  if (moments) statistics.emplace(out.batch(), out.plane(), sum.rows);
  fuse(sum, nullptr, nullptr, false, statistics ? &*statistics : nullptr, &out);
  if (statistics) {
    statistics->finish(nullptr, static_cast<float*>(mean.mutable_data_ptr()),
                       static_cast<float*>(var.mutable_data_ptr()));
  }
  return {out.tensor(), mean, var};
}

}  // namespace ciema::cpu
