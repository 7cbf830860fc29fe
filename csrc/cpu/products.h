// Products of a weight with every pixel of a map, for the stages built on them: views of maps, and the
// loop over spans of pixels and blocks of rows. packed_weight.h has the weights.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "../common/checks.h"
#include "../common/layout.h"
#include "elements.h"
#include "isa.h"
#include "packed_weight.h"

namespace ciema::cpu {

// -------------------------------------------------------------------------------------------- maps

// A map that is read where it lies, or a copy of it; keeps the tensor.
class Map {
 public:
  explicit Map(Tensor x) : x_(readable_in_place(x) ? x : torch::stable::contiguous(x)) {
    const Planes planes = planes_of(x_);
    element_ = element_of(x_);
    stride_b_ = planes.stride_b;
    // A single pixel is read along its channels.
    const bool last = planes.layout == Layout::kChannelsLast;
    stride_c_ = last ? 1 : planes.stride_c;
    stride_s_ = last && planes.stride_s == 1 ? planes.channels : planes.stride_s;
    plane_ = planes.plane;
  }

  const Tensor& tensor() const { return x_; }
  int64_t batch() const { return x_.size(0); }
  int64_t channels() const { return x_.size(1); }
  int64_t plane() const { return plane_; }
  int element() const { return static_cast<int>(element_); }
  bool in_rows() const { return stride_s_ == 1; }

  MapView at(int64_t b, int64_t channel, int64_t pixel) const {
    const int64_t offset = b * stride_b_ + channel * stride_c_ + pixel * stride_s_;
    const char* data = static_cast<const char*>(x_.const_data_ptr());
    return {data + offset * element_size(element_), stride_c_, stride_s_};
  }
  MutableMapView mutable_at(int64_t b, int64_t channel, int64_t pixel) {
    const MapView view = at(b, channel, pixel);
    return {const_cast<void*>(view.data), view.stride_c, view.stride_s};
  }

  // Packs all channels of a tile of pixels into a panel for a weight of these words.
  void pack(int64_t b, int64_t pixel, int count, Words words, float* panel,
            const Transform& transform = {}) const {
    products().pack[static_cast<int>(words)][element()](at(b, 0, pixel), channels(), count,
                                                        transform, panel);
  }

 private:
  Tensor x_;
  Element element_;
  int64_t stride_b_, stride_c_, stride_s_, plane_;
};

// A new map (batch, channels, height, width) with the dtype (or another) and memory format of x.
Tensor empty_map(const Tensor& x, int64_t channels, int64_t height, int64_t width,
                 std::optional<ScalarType> dtype = std::nullopt);

// ---------------------------------------------------------------------------------------- the loop

struct Free {
  void operator()(float* data) const { operator delete(data, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<float[], Free>;
inline Scratch make_scratch(int64_t floats) {
  const size_t bytes = static_cast<size_t>(std::max<int64_t>(floats, 1)) * sizeof(float);
  return Scratch(static_cast<float*>(operator new(bytes, std::align_val_t(64))));
}

// Packs all channels of a span into the second operand of a weight; transform(tile) is done with a
// tile.
template <class Transforms>
void pack_operand(const Map& map, const PackedWeight& weight, const Span& span, float* operand,
                  const Transforms& transform) {
  for (int j = 0; j < span.count; ++j) {
    const Tile& tile = span.tiles[j];
    map.pack(tile.sample, tile.pixel, tile.count, weight.words(),
             operand + j * weight.panel_floats(), transform(tile));
  }
  weight.prepare(span, operand);
}
inline void pack_operand(const Map& map, const PackedWeight& weight, const Span& span,
                         float* operand) {
  pack_operand(map, weight, span, operand, [](const Tile&) { return Transform{}; });
}

inline int64_t tiles_of(int64_t plane) {
  return (plane + products().pixels - 1) / products().pixels;
}

// Products of all pixels of a batch. `work`: multiply-adds a row and pixel. `wide`: two tiles and
// two halves of the rows at a time, which a weight in Strassen's form takes.
struct Blocks {
  int64_t batch, plane, rows, work;
  bool wide;
};

// Calls `visit(rows)` for all rows.
template <class Visit>
void for_each_rows(int64_t rows, bool wide, const Visit& visit) {
  const int64_t half = wide ? rows / 2 : rows;
  for (int64_t row = 0; row < half; row += kBlockRows) visit(Rows::at(row, rows, wide));
}

// Calls `finish(tile, row, rows, acc)` for each block of the sums of a span.
template <class Finish>
void for_each_part(const Span& span, const Rows& rows, float* acc, const Finish& finish) {
  for (int i = 0; i < rows.blocks; ++i) {
    for (int j = 0; j < span.count; ++j) {
      finish(span.tiles[j], rows.first[i], rows.size(i), acc + block_at(i, j));
    }
  }
}

// Calls `begin(span, scratch)` and then `block(span, rows, scratch)` for the blocks of each span. A
// thread takes neighbouring blocks, so that it packs few spans that it does not finish; tiles are
// cut and put together alike for any number of threads.
template <class Begin, class Block>
void for_each_block(const Blocks& all, int64_t scratch_floats, const Begin& begin,
                    const Block& block) {
  constexpr int64_t kWorkPerTask = 1 << 20;  // less is not worth a thread
  const int64_t pixels = products().pixels, tiles = tiles_of(all.plane);
  const int64_t width = all.wide ? 2 : 1;
  const int64_t spans = (tiles + width - 1) / width;
  const int64_t blocks = (all.rows / width + kBlockRows - 1) / kBlockRows;
  const int64_t block_work =
      std::max<int64_t>(1, all.work * std::min<int64_t>(all.plane, width * pixels) *
                               std::min<int64_t>(all.rows, width * kBlockRows));
  const int64_t grain = std::max<int64_t>(1, kWorkPerTask / block_work);
  torch::stable::parallel_for(0, all.batch * spans * blocks, grain, [&](int64_t i, int64_t last) {
    const Scratch scratch = make_scratch(scratch_floats);
    Span span{};
    for (int64_t begun = -1; i < last; ++i) {
      if (i / blocks != begun) {
        begun = i / blocks;
        span = Span::at(begun / spans, begun % spans * width, width, all.plane);
        begin(span, scratch.get());
      }
      block(span, Rows::at(i % blocks * kBlockRows, all.rows, all.wide), scratch.get());
    }
  });
}

// A weight times all of a map, which transform(tile) is done with first; `finish(tile, row, rows,
// acc)` gets the blocks of sums.
template <class Transforms, class Finish>
void multiply_map(const Map& map, const PackedWeight& weight, const Transforms& transform,
                  const Finish& finish) {
  const bool wide = weight.wants_wide(map.plane());
  const int64_t operand_at = sum_floats(wide);
  for_each_block(
      {map.batch(), map.plane(), weight.rows(), map.channels(), wide},
      operand_at + weight.operand_floats(wide),
      [&](const Span& span, float* scratch) {
        pack_operand(map, weight, span, scratch + operand_at, transform);
      },
      [&](const Span& span, const Rows& rows, float* acc) {
        weight.multiply(span, rows, acc + operand_at, false, acc);
        for_each_part(span, rows, acc, finish);
      });
}
template <class Finish>
void multiply_map(const Map& map, const PackedWeight& weight, const Finish& finish) {
  multiply_map(map, weight, [](const Tile&) { return Transform{}; }, finish);
}

// The loop of work without products, `block(tile, row, rows, scratch)`: in the order in which the
// memory of `map` runs, few rows at a time, so that it is read in streams.
template <class Block>
void for_each_strip(const Map& map, int64_t scratch_floats, const Block& block) {
  constexpr int64_t kRows = 16, kElementsPerTask = 32768;
  const int64_t pixels = products().pixels, tiles = tiles_of(map.plane());
  const int64_t strips = (map.channels() + kRows - 1) / kRows;
  const int64_t inner = map.in_rows() ? tiles : strips;
  const int64_t outer = map.in_rows() ? strips : tiles;
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, inner * kRows * pixels));
  torch::stable::parallel_for(0, map.batch() * outer, grain, [&](int64_t first, int64_t last) {
    const Scratch scratch = make_scratch(scratch_floats);
    for (int64_t i = first; i < last; ++i) {
      const int64_t sample = i / outer;
      for (int64_t j = 0; j < inner; ++j) {
        const int64_t t = map.in_rows() ? j : i % outer, strip = map.in_rows() ? i % outer : j;
        const int64_t pixel = t * pixels, row = strip * kRows;
        const Tile tile{sample * tiles + t, sample, pixel,
                        static_cast<int>(std::min(pixels, map.plane() - pixel)), 0};
        block(tile, row, static_cast<int>(std::min(kRows, map.channels() - row)), scratch.get());
      }
    }
  });
}

// Packs the gates of the groups that rows [row, row + rows) belong to; returns the block's first
// row as counted from the first of these groups.
inline int64_t pack_groups(const Map& gate, int64_t group_channels, const Tile& tile, int64_t row,
                           int rows, float* panel) {
  const int64_t first = row / group_channels, last = (row + rows - 1) / group_channels;
  products().pack[static_cast<int>(Words::kFloats)][gate.element()](
      gate.at(tile.sample, first, tile.pixel), last - first + 1, tile.count, Transform{}, panel);
  return row - first * group_channels;
}

// A float32 vector, contiguous, or nothing; keeps the tensor.
class Vector {
 public:
  Vector(const Tensor& value, const char* name, int64_t size);
  Vector(const std::optional<Tensor>& value, const char* name, int64_t size);
  const float* data() const {
    return value_ ? static_cast<const float*>(value_->const_data_ptr()) : nullptr;
  }
  // From element i on; null stays null.
  const float* from(int64_t i) const { return value_ ? data() + i : nullptr; }

 private:
  std::optional<Tensor> value_;
};

// out = act(scale * (weight x map) + shift), a 1x1 convolution with what follows it.
Tensor pointwise_packed(Tensor x, Tensor packed, std::optional<Tensor> scale,
                        std::optional<Tensor> shift, bool relu);

}  // namespace ciema::cpu
