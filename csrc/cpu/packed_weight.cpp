// Packing of weights, and their products with panels: packed_weight.h has the forms,
// simd/products.h the panels.
#include "packed_weight.h"

#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <vector>

#include "dot.h"
#include "products.h"

namespace ciema::cpu {
namespace {

struct PackedHeader {
  char magic[16];
  int64_t panel_rows, words, rows, columns, strassen, unused;
};
static_assert(sizeof(PackedHeader) == 64);
constexpr char kMagic[16] = "ciema product 3";

int64_t steps_of(Words words, int64_t columns) {
  return words == Words::kFloats ? columns : (columns + 1) / 2;
}

uint32_t rounded_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value != value ? (bits >> 16) | 0x40u : nearest;  // no branch, for the compiler's vectors
}

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

// Smaller weights are not worth the sums of their panels and blocks.
constexpr int64_t kStrassenSize = 256;

std::vector<float> squares_of_rows(const Matrix& weight) {
  std::vector<float> squares(weight.rows);
  if (weight.stride_column == 1) {
    for (int64_t r = 0; r < weight.rows; ++r) {
      const float* row = weight.data + r * weight.stride_row;
      squares[r] = dot(row, row, weight.columns);
    }
    return squares;
  }
  for (int64_t k = 0; k < weight.columns; ++k) {
    const float* column = weight.data + k * weight.stride_column;
    for (int64_t r = 0; r < weight.rows; ++r) {
      const float value = column[r * weight.stride_row];
      squares[r] += value * value;
    }
  }
  return squares;
}

bool fits_strassen(const Matrix& weight) {
  return weight.rows >= kStrassenSize && weight.columns >= kStrassenSize &&
         weight.rows % (2 * kBlockRows) == 0 && weight.columns % 2 == 0;
}

bool halves_alike(const std::vector<float>& squares) {
  const auto half = squares.begin() + squares.size() / 2;
  return std::equal(squares.begin(), half, half, alike);
}

// The least sum of squares of results, of that of the rows times that of the pixels.
constexpr float kLeastSquares = 1.0f / (512.0f * 512.0f);

// Packed weights without their header, in floats.
int64_t packed_floats(int64_t rows, int64_t steps, bool strassen) {
  const int64_t panels = (rows + products().rows - 1) / products().rows;
  const int64_t floats = panels * products().rows * steps;
  return strassen ? 2 * floats + rows / (2 * kBlockRows) : floats;
}

}  // namespace

Span Span::at(int64_t sample, int64_t tile, int64_t width, int64_t plane) {
  const int64_t pixels = products().pixels, tiles = tiles_of(plane);
  Span span{{}, static_cast<int>(std::min(width, tiles - tile))};
  for (int j = 0; j < span.count; ++j) {
    const int64_t pixel = (tile + j) * pixels;
    span.tiles[j] = {sample * tiles + tile + j, sample, pixel,
                     static_cast<int>(std::min(pixels, plane - pixel)), j};
  }
  return span;
}

Tensor pack_product_weight(Tensor weight, bool bfloat16, std::optional<int64_t> plane) {
  const bool flat = weight.dim() == 2;
  STD_TORCH_CHECK(flat || (weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1),
                  "weight must have the shape (M, K) or (M, K, 1, 1)");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weight must be float32");
  const Products& table = products();
  const bool pairs = bfloat16 && table.multiply[static_cast<int>(Words::kBFloat16Pairs)] != nullptr;
  const Words words = pairs ? Words::kBFloat16Pairs : Words::kFloats;
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const Matrix matrix{static_cast<const float*>(weight.const_data_ptr()), rows, columns,
                      weight.stride(0), weight.stride(1)};
  const bool large = plane.value_or(PackedWeight::kStrassenPlane) >= PackedWeight::kStrassenPlane;
  std::vector<float> squares;
  if (!pairs && large && fits_strassen(matrix)) squares = squares_of_rows(matrix);
  const bool parts = !squares.empty() && halves_alike(squares);
  const int64_t header = sizeof(PackedHeader), steps = steps_of(words, columns);
  Tensor packed = torch::stable::empty({header + packed_floats(rows, steps, parts) * 4},
                                       ScalarType::Byte, std::nullopt, weight.device());
  char* out = static_cast<char*>(packed.mutable_data_ptr());
  PackedHeader told{{}, table.rows, static_cast<int64_t>(words), rows, columns, parts, 0};
  std::memcpy(told.magic, kMagic, sizeof(kMagic));
  std::memcpy(out, &told, sizeof(told));
  float* floats = reinterpret_cast<float*>(out + header);
  if (parts) {
    PackedWeight::pack_parts(matrix, squares, floats);
    return packed;
  }
  const int64_t panels = (rows + table.rows - 1) / table.rows, panel_floats = steps * table.rows;
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
  strassen_ = told.strassen != 0;
  steps_ = steps_of(words_, columns_);
  data_ = reinterpret_cast<const float*>(data + sizeof(told));
  STD_TORCH_CHECK(
      told.panel_rows == products().rows &&
          packed.numel() ==
              int64_t{sizeof(told)} + packed_floats(rows_, steps_, strassen_) * 4 &&
          products().multiply[static_cast<int>(words_)] != nullptr,
      name, " was packed for another instruction set: pack it where it is used");
  STD_TORCH_CHECK(columns_ == columns, name, " takes ", columns_, " channels, got ", columns);
  STD_TORCH_CHECK(words_ == Words::kFloats || map.scalar_type() == ScalarType::BFloat16, name,
                  " was packed for bfloat16 maps");
}

// The parts one after another, each packed as a weight of its own.
void PackedWeight::pack_parts(const Matrix& weight, const std::vector<float>& squares,
                              float* out) {
  const int64_t half_rows = weight.rows / 2, half = weight.columns / 2, rows = products().rows;
  const int64_t panel_floats = half * rows, part_floats = half_rows * half;
  const auto quarter = [&](int64_t i, int64_t j) {
    const float* data =
        weight.data + i * half_rows * weight.stride_row + j * half * weight.stride_column;
    return Matrix{data, half_rows, half, weight.stride_row, weight.stride_column};
  };
  const Matrix quarters[] = {quarter(0, 0), quarter(0, 1), quarter(1, 1), quarter(1, 0)};
  torch::stable::parallel_for(0, half_rows / rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float* panels[kParts];
      for (int p = 0; p < kParts; ++p) panels[p] = out + p * part_floats + i * panel_floats;
      for (int p = kA11; p <= kA21; ++p) pack_floats(quarters[p], i * rows, rows, panels[p]);
      for (int64_t k = 0; k < panel_floats; ++k) {
        const float s1 = panels[kA21][k] + panels[kA22][k], s2 = s1 - panels[kA11][k];
        panels[kS1][k] = s1;
        panels[kS2][k] = s2;
        panels[kS3][k] = panels[kA11][k] - panels[kA21][k];
        panels[kS4][k] = panels[kA12][k] - s2;
      }
    }
  });
  float* of_blocks = out + kParts * part_floats;
  for (int64_t r = 0; r < half_rows; r += kBlockRows) {
    float sum = 0.0f;
    for (int64_t i = r; i < r + kBlockRows; ++i) sum += squares[i] + squares[half_rows + i];
    of_blocks[r / kBlockRows] = sum;
  }
}

void PackedWeight::prepare(const Span& span, float* operand) const {
  if (strassen_ && span.full()) {
    operand[4 * panel_floats()] =
        products().strassen_sums(operand, panel_floats() / 2, operand + 2 * panel_floats());
  }
}

void PackedWeight::multiply(const Span& span, const Rows& rows, const float* operand,
                            bool accumulate, float* acc) const {
  if (strassen_ && rows.blocks == 2 && span.full() && operand[4 * panel_floats()] >= 0.0f &&
      multiply_in_seven(rows.first[0], operand, accumulate, acc)) {
    return;
  }
  for (int i = 0; i < rows.blocks; ++i) {
    for (int j = 0; j < span.count; ++j) {
      multiply_block(rows.first[i], operand + j * panel_floats(), span.tiles[j].count, accumulate,
                     acc + block_at(i, j));
    }
  }
}

void PackedWeight::multiply_block(int64_t row, const float* panel, int count, bool accumulate,
                                  float* acc) const {
  const auto multiply = products().multiply[static_cast<int>(words_)];
  const int64_t panel_rows = products().rows;
  if (strassen_) {  // the same chain of sums as below, in two parts
    const bool low = row >= rows_ / 2;
    const int64_t from = low ? row - rows_ / 2 : row, panels = kBlockRows / panel_rows;
    multiply(part(low ? kA21 : kA11, from), panels, panel, steps_ / 2, count, accumulate, acc);
    multiply(part(low ? kA22 : kA12, from), panels, panel + panel_floats() / 2, steps_ / 2, count,
             true, acc);
    return;
  }
  const int64_t first = row / panel_rows, all = (rows_ + panel_rows - 1) / panel_rows;
  const int64_t panels = std::min<int64_t>(kBlockRows / panel_rows, all - first);
  multiply(data_ + first * panel_rows * steps_, panels, panel, steps_, count, accumulate, acc);
}

bool PackedWeight::multiply_in_seven(int64_t row, const float* operand, bool accumulate,
                                     float* acc) const {
  const int64_t half = panel_floats() / 2;
  const float *b11 = operand, *b21 = b11 + half, *b22 = b21 + 2 * half;
  const float *t1 = b22 + half, *t2 = t1 + half, *t3 = t2 + half, *t4 = t3 + half;
  const struct {
    Part part;
    const float* panel;
  } factors[] = {{kA11, b11}, {kA12, b21}, {kS4, b22}, {kA22, t4}, {kS1, t1}, {kS2, t2}, {kS3, t3}};
  float* sums = acc + block_at(2, 0);
  for (int i = 0; i < 7; ++i) {
    products().multiply[static_cast<int>(Words::kFloats)](
        part(factors[i].part, row), kBlockRows / products().rows, factors[i].panel, steps_ / 2,
        products().pixels, false, sums + i * block_floats());
  }
  const float least = kLeastSquares * block_squares()[row / kBlockRows] * operand[4 * panel_floats()];
  return products().strassen_blocks(sums, least, accumulate, acc);
}

}  // namespace ciema::cpu
