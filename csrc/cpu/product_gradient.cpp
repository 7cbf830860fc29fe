// The gradient of a product's weight:
//
//   out[b, m, k] = sum_p grad[b, m, p] * gate[b, g(k), p] * act(scale[k] x[b, k, p] + shift[k])
//
// Layouts  as in products.cpp: packing makes the pixels of both maps the steps of a product.
// Threads  first over rows of grad, which are packed once for all; then over tiles of k and blocks
//          of 64 rows of m. The pixels are taken in chunks, one after another, and the sums wait in
//          a float32 buffer in between: their order never depends on the threads.
// Bytes    reads grad once and x once (twice where two threads share a tile of k); packed, grad is
//          read again for every tile of k, from the last-level cache, where a chunk fits.
// Sums     float32; two bfloat16 maps are multiplied as pairs where the processor can, exactly.
#include "product_gradient.h"

#include <cstring>

#include "products.h"

namespace ciema::cpu {
namespace {

constexpr int64_t kChunkPixels = 784;  // of 1024 rows 3 MiB, of a tile of k 147 KiB

struct Problem {
  const Map &grad, &x;
  const std::optional<Map>& gate;
  const Vector &scale, &shift;
  Words words;
  int64_t rows, padded_rows, columns, tiles, chunk;
};

int64_t steps_of(const Problem& what, int64_t pixels) {
  return what.words == Words::kFloats ? pixels : (pixels + 1) / 2;
}

void pack_grad(const Problem& what, int64_t b, int64_t pixel, int64_t pixels, float* panels) {
  const int64_t blocks = what.padded_rows / kBlockRows;
  const int64_t block_floats = steps_of(what, pixels) * kBlockRows;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i * kBlockRows;
      const int count = static_cast<int>(std::min<int64_t>(kBlockRows, what.rows - row));
      products().pack_rows[static_cast<int>(what.words)][what.grad.element()](
          what.grad.at(b, row, pixel), count, pixels, panels + i * block_floats);
    }
  });
}

// Gates of all groups for a chunk of pixels, [group][chunk] float32.
void unpack_gate(const Problem& what, int64_t b, int64_t pixel, int64_t pixels, float* gates) {
  const int64_t width = products().pixels, groups = what.gate->channels();
  const Scratch panel = make_scratch((groups + 1) * width);
  for (int64_t p = 0; p < pixels; p += width) {
    const int count = static_cast<int>(std::min(width, pixels - p));
    what.gate->pack(b, pixel + p, count, Words::kFloats, panel.get());
    for (int64_t g = 0; g < groups; ++g) {
      std::copy_n(panel.get() + g * width, count, gates + g * what.chunk + p);
    }
  }
}

void add_chunk(const Problem& what, int64_t b, int64_t pixel, int64_t pixels, const float* panels,
               const float* gates, float* sums) {
  const int64_t width = products().pixels, blocks = what.padded_rows / kBlockRows;
  const int64_t steps = steps_of(what, pixels);
  const int words = static_cast<int>(what.words);
  const int64_t group = what.gate ? what.columns / what.gate->channels() : 1;
  const Transform transform{what.scale.data(), what.shift.data(), true, gates, group, what.chunk};
  torch::stable::parallel_for(0, what.tiles * blocks, 1, [&](int64_t first, int64_t last) {
    const Scratch panel = make_scratch(steps * width);
    int64_t packed = -1;
    for (int64_t i = first; i < last; ++i) {
      const int64_t tile = i / blocks, column = tile * width, row = i % blocks * kBlockRows;
      const int count = static_cast<int>(std::min(width, what.columns - column));
      if (tile != packed) {
        products().pack_pixels[words][what.x.element()](what.x.at(b, column, pixel), count, pixels,
                                                        transform, column, panel.get());
        packed = tile;
      }
      const int64_t rows = std::min<int64_t>(kBlockRows, what.rows - row);
      products().multiply[words](panels + row * steps,
                                 (rows + products().rows - 1) / products().rows, panel.get(), steps,
                                 count, true, sums + (tile * what.padded_rows + row) * width);
    }
  });
}

// sums [tile][row][column of the tile] -> out [row][column]
void unpack(const Problem& what, const float* sums, float* out) {
  const int64_t width = products().pixels;
  for (int64_t tile = 0; tile < what.tiles; ++tile) {
    const int64_t column = tile * width, count = std::min(width, what.columns - column);
    for (int64_t row = 0; row < what.rows; ++row) {
      std::copy_n(sums + (tile * what.padded_rows + row) * width, count,
                  out + row * what.columns + column);
    }
  }
}

}  // namespace

Tensor product_gradient(Tensor grad, Tensor x, std::optional<Tensor> gate,
                        std::optional<Tensor> scale, std::optional<Tensor> shift,
                        bool per_sample) {
  check_x(grad);
  check_x(x);
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(2) == x.size(2) &&
                      grad.size(3) == x.size(3),
                  "grad and x must have the same samples and pixels");
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift come together");
  const int64_t columns = x.size(1), rows = grad.size(1);
  const Vector scales(scale, "scale", columns), shifts(shift, "shift", columns);
  std::optional<Map> gates;
  if (gate) {
    check_x(*gate);
    STD_TORCH_CHECK(gate->size(1) > 0 && columns % gate->size(1) == 0,
                    "gate must have a divisor of x's channels");
    STD_TORCH_CHECK(gate->size(0) == x.size(0) && gate->size(2) == x.size(2) &&
                        gate->size(3) == x.size(3),
                    "gate and x must have the same samples and pixels");
    gates.emplace(*gate);
  }
  const Map back(grad), map(x);
  const bool pairs = grad.scalar_type() == ScalarType::BFloat16 &&
                     x.scalar_type() == ScalarType::BFloat16 &&
                     products().multiply[static_cast<int>(Words::kBFloat16Pairs)] != nullptr;
  const int64_t width = products().pixels, plane = map.plane();
  const int64_t chunks = (plane + kChunkPixels - 1) / kChunkPixels;
  const int64_t even = (plane + chunks - 1) / chunks;
  const Problem what{back,
                     map,
                     gates,
                     scales,
                     shifts,
                     pairs ? Words::kBFloat16Pairs : Words::kFloats,
                     rows,
                     (rows + kBlockRows - 1) / kBlockRows * kBlockRows,
                     columns,
                     (columns + width - 1) / width,
                     (even + 63) / 64 * 64};
  const int64_t results = per_sample ? map.batch() : 1;
  Tensor out = torch::stable::empty({results, rows, columns}, ScalarType::Float, std::nullopt,
                                    x.device());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t sum_floats = what.tiles * what.padded_rows * width;
  const Scratch sums = make_scratch(sum_floats);
  const Scratch panels = make_scratch(what.padded_rows * what.chunk);
  const Scratch gate_rows = make_scratch(gates ? gates->channels() * what.chunk : 0);
  std::fill_n(sums.get(), sum_floats, 0.0f);  // also what there is of no samples
  for (int64_t b = 0; b < map.batch(); ++b) {
    if (b > 0 && per_sample) std::fill_n(sums.get(), sum_floats, 0.0f);
    for (int64_t p = 0; p < plane; p += what.chunk) {
      const int64_t pixels = std::min(what.chunk, plane - p);
      if (gates) unpack_gate(what, b, p, pixels, gate_rows.get());
      pack_grad(what, b, p, pixels, panels.get());
      add_chunk(what, b, p, pixels, panels.get(), gates ? gate_rows.get() : nullptr, sums.get());
    }
    if (per_sample) unpack(what, sums.get(), to + b * rows * columns);
  }
  if (!per_sample) unpack(what, sums.get(), to);
  return out;
}

}  // namespace ciema::cpu
