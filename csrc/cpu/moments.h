// Statistics of the rows of a product over samples and pixels, from those of its tiles.
#pragma once

#include <vector>

#include "products.h"

namespace ciema::cpu {

// Mean and biased variance of each row: two passes inside a tile (float32), and two over the tiles
// (float64), so that no large mean cancels. The order of the sums depends on no thread.
class Moments {
 public:
  Moments(int64_t batch, int64_t plane, int64_t rows)
      : batch_(batch),
        plane_(plane),
        rows_(rows),
        means_(batch * tiles_of(plane) * rows),
        squares_(means_.size()) {}

  // Takes a block of sums.
  void take(const Tile& tile, int64_t row, int rows, const float* acc) {
    const int64_t at = tile.index * rows_ + row;
    products().moments(acc, rows, tile.count, means_.data() + at, squares_.data() + at);
  }

  // -> mean + bias, biased variance; float32 (rows)
  void finish(const float* bias, float* mean, float* var) const {
    const int64_t tiles = tiles_of(plane_);
    const double all = static_cast<double>(batch_) * static_cast<double>(plane_);
    std::vector<double> center(rows_), spread(rows_);
    const auto each = [&](const auto& visit) {
      for (int64_t t = 0; t < batch_ * tiles; ++t) {
        const int64_t start = t % tiles * products().pixels;
        const double count = static_cast<double>(std::min<int64_t>(products().pixels,
                                                                   plane_ - start));
        for (int64_t r = 0; r < rows_; ++r) visit(t * rows_ + r, r, count);
      }
    };
    each([&](int64_t i, int64_t r, double count) { center[r] += count * means_[i] / all; });
    each([&](int64_t i, int64_t r, double count) {
      const double distance = means_[i] - center[r];
      spread[r] += (squares_[i] + count * distance * distance) / all;
    });
    for (int64_t r = 0; r < rows_; ++r) {
      mean[r] = static_cast<float>(center[r] + (bias == nullptr ? 0.0f : bias[r]));
      var[r] = static_cast<float>(spread[r]);
    }
  }

 private:
  int64_t batch_, plane_, rows_;
  std::vector<float> means_, squares_;
};

// Sums of the rows over samples and pixels, from those of the tiles, added in float64 in their
// order.
class RowSums {
 public:
  RowSums(int64_t batch, int64_t plane, int64_t rows)
      : rows_(rows), sums_(batch * tiles_of(plane) * rows) {}

  float* at(const Tile& tile, int64_t row) { return sums_.data() + tile.index * rows_ + row; }

  void finish(float* out) const {
    std::vector<double> total(rows_);
    for (size_t i = 0; i < sums_.size(); i += rows_) {
      for (int64_t r = 0; r < rows_; ++r) total[r] += sums_[i + r];
    }
    for (int64_t r = 0; r < rows_; ++r) out[r] = static_cast<float>(total[r]);
  }

 private:
  int64_t rows_;
  std::vector<float> sums_;
};

}  // namespace ciema::cpu
