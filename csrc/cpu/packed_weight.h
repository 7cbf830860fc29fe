// Weights packed for products with maps, and their product with the panels of a few pixels.
//
// A weight of many rows and columns for float32 words has Strassen's form: seven products of
// half the rows, columns and pixels instead of eight (Winograd's variant of it, one level):
//
//   [C11 C12]   [A11 A12] [B11 B12]      S1 = A21 + A22   S2 = S1 - A11   S3 = A11 - A21
//   [C21 C22] = [A21 A22] [B21 B22]      S4 = A12 - S2    T1 = B12 - B11  T2 = B22 - T1
//                                        T3 = B22 - B12   T4 = T2 - B21
//
//   C11 = A11 B11 + A12 B21              U = A11 B11 + S2 T2   V = U + S3 T3
//   C12 = U + S1 T1 + S4 B22             C21 = V - A22 T4      C22 = V + S1 T1
//
// S is made when the weight is packed, T once for all rows of a span, and the sums of products are
// put together in blocks that stay in the cache: of 1/8 less multiplications almost all is gained.
// Rounding errors double (float32, 1024 columns: 5.8e-7 -> 1.0e-6 of the result's norm), and large
// pixels and rows would leave theirs in the small ones that they are put together with. So a span
// of pixels that are not alike (simd/products.h) is multiplied from A, for which A21 is kept; a
// weight of rows that are not has no such form. Nor do large channels stay by themselves where small
// weights meet them: a block of results that is below 1/512 of its rows' and pixels' norms (of
// independent numbers they are 1/sqrt(columns)) is made anew, as is one that is not finite.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/checks.h"
#include "isa.h"

namespace ciema::cpu {

inline const Products& products() { return *chosen_instruction_set().products; }

// A tile of pixels of one sample; `place` in its span.
struct Tile {
  int64_t index, sample, pixel;
  int count, place;
};

// One tile, or two neighbours of one sample.
struct Span {
  static Span at(int64_t sample, int64_t tile, int64_t width, int64_t plane);
  bool full() const { return count == 2 && tiles[1].count == products().pixels; }

  Tile tiles[2];
  int count;
};

// A block of up to kBlockRows rows, or such a block of each half of the rows.
struct Rows {
  static Rows at(int64_t row, int64_t all, bool wide) {
    return {{row, row + all / 2}, wide ? 2 : 1, all};
  }
  int size(int i) const {
    return static_cast<int>(std::min<int64_t>(kBlockRows, all - first[i]));
  }

  int64_t first[2];
  int blocks;
  int64_t all;
};

// A weight as it lies.
struct Matrix {
  const float* data;
  int64_t rows, columns, stride_row, stride_column;
};

inline int64_t block_floats() { return int64_t{kBlockRows} * products().pixels; }
// Where the sums of block i of Rows and tile j of a Span lie.
inline int64_t block_at(int i, int j) { return (2 * i + j) * block_floats(); }
// Floats of a span's sums; the wide one has room for seven products behind them.
inline int64_t sum_floats(bool wide) { return (wide ? 4 + 7 : 1) * block_floats(); }

// weight (M, K) or (M, K, 1, 1) float32 -> bytes for this process's instruction set. `bfloat16`
// asks for pairs of bfloat16, which is granted if the processor multiplies them: for bfloat16 maps.
// `plane`: pixels of a map to come, if all have as many. Float32 words of large weights and maps get
// Strassen's form, twice the bytes.
Tensor pack_product_weight(Tensor weight, bool bfloat16, std::optional<int64_t> plane);

// What a packed tensor holds; it must outlive this.
class PackedWeight {
 public:
  // Refuses what was not packed in a process like this one, or does not fit the map's channels.
  PackedWeight(const Tensor& packed, const char* name, const Tensor& map, int64_t columns);

  int64_t rows() const { return rows_; }
  Words words() const { return words_; }
  // Whether spans of two tiles and two blocks of rows are wanted; any can be multiplied. Small maps
  // are not: the weight's parts are more to read than what is saved.
  bool wants_wide(int64_t plane) const { return strassen_ && plane >= kStrassenPlane; }
  // Floats of a tile's panel. A span's second panel follows the first.
  int64_t panel_floats() const { return steps_ * products().pixels; }
  // Floats of a span's panels with what `prepare` adds.
  int64_t operand_floats(bool wide) const {
    return wide && strassen_ ? 4 * panel_floats() + 16 : (wide ? 2 : 1) * panel_floats();
  }
  // Completes the second operand once its panels are packed: T, and what strassen_sums returned.
  void prepare(const Span& span, float* operand) const;
  // acc (+)= rows x operand, at block_at; `acc` has sum_floats.
  void multiply(const Span& span, const Rows& rows, const float* operand, bool accumulate,
                float* acc) const;

 private:
  static constexpr int64_t kStrassenPlane = 512;
  // The parts of Strassen's form, in their order.
  enum Part { kA11, kA12, kA22, kA21, kS1, kS2, kS3, kS4, kParts };

  friend Tensor pack_product_weight(Tensor weight, bool bfloat16, std::optional<int64_t> plane);
  static void pack_parts(const Matrix& weight, const std::vector<float>& squares, float* out);
  void multiply_block(int64_t row, const float* panel, int count, bool accumulate,
                      float* acc) const;
  // Sums of squares of every block of rows with its like in the other half, behind the parts.
  const float* block_squares() const { return data_ + kParts * rows_ / 2 * steps_ / 2; }
  bool multiply_in_seven(int64_t row, const float* operand, bool accumulate, float* acc) const;
  const float* part(Part which, int64_t row) const {
    return data_ + (which * rows_ / 2 + row) * steps_ / 2;
  }

  const float* data_;
  int64_t rows_, columns_, steps_;
  Words words_;
  bool strassen_;
};

}  // namespace ciema::cpu
