// Packed weights, and the 1x1 convolution with the affine map and ReLU that follow it:
//
//   out[b, m, p] = act(scale[m] * sum_k weight[m, k] x[b, k, p] + shift[m])
//
// Layouts  maps with neighbouring pixels or neighbouring channels are read and written where they
//          lie, others are made contiguous first; simd/products.h has the layout of panels.
// Threads  over tiles of pixels and blocks of 64 rows.
// Bytes    reads x once (a tile is packed once, twice where two threads share it), the packed
//          weight once a tile (from the last-level cache), writes out once.
// Sums     float32; of bfloat16 maps the products of bfloat16 are exact.
#include "products.h"

#include <cstring>

#include "huge_pages.h"

namespace ciema::cpu {
namespace {

struct PackedHeader {
  char magic[16];
  int64_t panel_rows, words, rows, columns, unused[2];
};
static_assert(sizeof(PackedHeader) == 64);
constexpr char kMagic[16] = "ciema product 1";

int64_t steps_of(Words words, int64_t columns) {
  return words == Words::kFloats ? columns : (columns + 1) / 2;
}

uint32_t rounded_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value != value ? (bits >> 16) | 0x40u : nearest;  // no branch, for the compiler's vectors
}

// A weight as it lies.
struct Matrix {
  const float* data;
  int64_t rows, columns, stride_row, stride_column;
};

// A panel of floats: [column][row], rows past the last are zero.
void pack_floats(const Matrix& weight, int64_t row, int64_t panel_rows, float* panel) {
  const int64_t rows = std::min(panel_rows, weight.rows - row);
  const float* from = weight.data + row * weight.stride_row;
  if (rows < panel_rows) std::fill_n(panel, weight.columns * panel_rows, 0.0f);
  if (weight.stride_row == 1) {
    for (int64_t k = 0; k < weight.columns; ++k) {
      std::copy_n(from + k * weight.stride_column, rows, panel + k * panel_rows);
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < weight.columns; ++k) {
      panel[k * panel_rows + r] = from[r * weight.stride_row + k * weight.stride_column];
    }
  }
}

// The same in words of two columns, from a panel of floats.
void round_to_pairs(const float* floats, int64_t columns, int64_t panel_rows, float* panel) {
  for (int64_t k = 0; k < columns; k += 2) {
    for (int64_t r = 0; r < panel_rows; ++r) {
      const uint32_t even = rounded_bfloat16(floats[k * panel_rows + r]);
      const uint32_t odd =
          k + 1 < columns ? rounded_bfloat16(floats[(k + 1) * panel_rows + r]) : 0;
      const uint32_t word = even | (odd << 16);
      std::memcpy(panel + k / 2 * panel_rows + r, &word, sizeof(word));
    }
  }
}

}  // namespace

Tensor pack_product_weight(Tensor weight, bool bfloat16) {
  const bool flat = weight.dim() == 2;
  STD_TORCH_CHECK(flat || (weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1),
                  "weight must have the shape (M, K) or (M, K, 1, 1)");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weight must be float32");
  const Products& table = products();
  const bool pairs = bfloat16 && table.multiply[static_cast<int>(Words::kBFloat16Pairs)] != nullptr;
  const Words words = pairs ? Words::kBFloat16Pairs : Words::kFloats;
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const int64_t panels = (rows + table.rows - 1) / table.rows;
  const int64_t panel_floats = steps_of(words, columns) * table.rows;
  const int64_t header = sizeof(PackedHeader);
  Tensor packed = torch::stable::empty({header + panels * panel_floats * 4}, ScalarType::Byte,
                                       std::nullopt, weight.device());
  char* out = static_cast<char*>(packed.mutable_data_ptr());
  PackedHeader told{{}, table.rows, static_cast<int64_t>(words), rows, columns, {}};
  std::memcpy(told.magic, kMagic, sizeof(kMagic));
  std::memcpy(out, &told, sizeof(told));
  const Matrix matrix{static_cast<const float*>(weight.const_data_ptr()), rows, columns,
                      weight.stride(0), weight.stride(1)};
  float* floats = reinterpret_cast<float*>(out + header);
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, panel_floats));
  torch::stable::parallel_for(0, panels, grain, [&](int64_t first, int64_t last) {
    const Scratch scratch = make_scratch(pairs ? columns * table.rows : 0);
    for (int64_t i = first; i < last; ++i) {
      float* panel = floats + i * panel_floats;
      pack_floats(matrix, i * table.rows, table.rows, pairs ? scratch.get() : panel);
      if (pairs) round_to_pairs(scratch.get(), columns, table.rows, panel);
    }
  });
  return packed;
}

PackedWeight::PackedWeight(const Tensor& packed, const char* name, const Tensor& map,
                           int64_t columns) {
  PackedHeader told{};
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 &&
                      packed.is_contiguous() && packed.numel() >= int64_t{sizeof(told)},
                  name, " must be a tensor that pack_product_weight returned");
  const char* data = static_cast<const char*>(packed.const_data_ptr());
  std::memcpy(&told, data, sizeof(told));
  STD_TORCH_CHECK(std::memcmp(told.magic, kMagic, sizeof(kMagic)) == 0, name,
                  " must be a tensor that pack_product_weight returned");
  words_ = static_cast<Words>(told.words);
  rows_ = told.rows;
  columns_ = told.columns;
  steps_ = steps_of(words_, columns_);
  data_ = reinterpret_cast<const float*>(data + sizeof(told));
  const int64_t all = (rows_ + told.panel_rows - 1) / std::max<int64_t>(told.panel_rows, 1);
  STD_TORCH_CHECK(
      told.panel_rows == products().rows &&
          packed.numel() == int64_t{sizeof(told)} + all * told.panel_rows * steps_ * 4 &&
          products().multiply[static_cast<int>(words_)] != nullptr,
      name, " was packed for another instruction set: pack it where it is used");
  STD_TORCH_CHECK(columns_ == columns, name, " takes ", columns_, " channels, got ", columns);
  STD_TORCH_CHECK(words_ == Words::kFloats || map.scalar_type() == ScalarType::BFloat16, name,
                  " was packed for bfloat16 maps");
}

Vector::Vector(const Tensor& value, const char* name, int64_t size)
    : value_(torch::stable::contiguous(value)) {
  STD_TORCH_CHECK(value.scalar_type() == ScalarType::Float && value.numel() == size, name,
                  " must be float32 of ", size, " elements, got ", value.numel());
}

Vector::Vector(const std::optional<Tensor>& value, const char* name, int64_t size) {
  if (value) *this = Vector(*value, name, size);
}

Tensor empty_map(const Tensor& x, int64_t channels, int64_t height, int64_t width,
                 std::optional<ScalarType> dtype) {
  const Tensor out = torch::stable::empty({x.size(0), channels, height, width},
                                          dtype.value_or(x.scalar_type()), std::nullopt,
                                          x.device(), std::nullopt, memory_format_of(x));
  ask_for_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  return out;
}

Tensor pointwise_packed(Tensor x, Tensor packed, std::optional<Tensor> scale,
                        std::optional<Tensor> shift, bool relu) {
  check_x(x);
  const PackedWeight weight(packed, "packed", x, x.size(1));
  const int64_t rows = weight.rows();
  const Vector scales(scale, "scale", rows), shifts(shift, "shift", rows);
  const Map map(x);
  Map out(empty_map(x, rows, x.size(2), x.size(3)));
  const int64_t acc_floats = kBlockRows * products().pixels;
  for_each_block(
      map.batch(), map.plane(), rows, map.channels(), acc_floats + weight.panel_floats(),
      [&](const Tile& tile, float* scratch) {
        map.pack(tile.sample, tile.pixel, tile.count, weight.words(), scratch + acc_floats);
      },
      [&](const Tile& tile, int64_t row, int count, float* acc) {
        weight.multiply(row, acc + acc_floats, tile.count, false, acc);
        const Affine affine{scales.from(row), shifts.from(row), nullptr, 0, relu};
        products().affine[out.element()](acc, count, tile.count, affine,
                                         out.mutable_at(tile.sample, row, tile.pixel));
      });
  return out.tensor();
}

}  // namespace ciema::cpu
