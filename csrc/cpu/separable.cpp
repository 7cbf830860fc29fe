// The backbone of spec.md 4 in evaluation, batch norms folded into weights and biases:
//
//   separable  d[b,y,x,c]   = act( sum_t depthwise[t,c] x[b,..t..,c] + depthwise_bias[c] )
//              out[b,y,x,n] = act( sum_c pointwise[n,c] d[b,y,x,c] + bias[n] )
//              3x3, padding 1, stride 1 or 2
//   stem       out[b,y,x,n] = relu( sum_{i,t} weight[n,i,t] images[b,i,..t..] + bias[n] )
//              3x3, padding 1, stride 2
//
// Layouts  maps are channels_last (neighbouring channels, any other strides; else they are copied
//          so), images of any strides. The rows d of a tile of pixels go into a scratch that fits
//          the second-level cache, where the product reads them.
// Threads  over tiles of output pixels of the whole batch; none shares a result, and every sum is
//          one chain, so the bits depend neither on the threads nor on the tiles.
// Bytes    x is read once (its rows thrice, from cache), the weight once a tile, out written once.
// Sums     float32. With pairs the product's operands are rounded to bfloat16, the sums are not.
#include "separable.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../common/layout.h"
#include "elements.h"
#include "isa.h"

namespace ciema::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kScratchBytes = 256 * 1024;  // of a tile's rows: half of a second-level cache
constexpr int64_t kLine = 64;                  // bytes
constexpr int64_t kTaps = 9;

void check_map(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must have 4 dimensions (B, C, H, W), got ", x.dim());
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, " must be float32, bfloat16 or float16");
}

void check_floats(const Tensor& value, const char* name, int64_t count) {
  STD_TORCH_CHECK(value.scalar_type() == ScalarType::Float && value.is_contiguous() &&
                      value.numel() == count,
                  name, " must be ", count, " contiguous float32, got ", value.numel());
}

// A packed weight and its product; a row of operands is `row` elements apart from the next.
struct Packed {
  const Separable* table;
  RowElement operand;
  int64_t steps, row, size;
  const void* weight;

  Packed(const Tensor& packed, int64_t depth, int64_t columns)
      : table(chosen_instruction_set().separable),
        operand(packed.scalar_type() == ScalarType::BFloat16 ? RowElement::kBFloat16
                                                             : RowElement::kFloat),
        weight(packed.const_data_ptr()) {
    const int64_t width = operand == RowElement::kFloat ? 1 : 2;
    steps = (depth + width - 1) / width;
    size = operand == RowElement::kFloat ? 4 : 2;
    const int64_t line = kLine / size;
    // One line more than the depth needs: rows a power of two apart would share cache sets.
    row = (depth + line - 1) / line * line + line;
    const int64_t panels = (columns + table->columns - 1) / table->columns;
    STD_TORCH_CHECK(packed.is_contiguous() &&
                        packed.numel() == panels * steps * table->columns * width &&
                        table->product[static_cast<int>(operand)][0] != nullptr,
                    "packed was not made by separable_pack for ", depth, " -> ", columns,
                    " channels on this machine");
  }
};

struct Size {
  int64_t batch, channels, height, width;
  int64_t pixels() const { return batch * height * width; }
};

// Runs fill(pixel, count, row of operands) and the product over tiles of output pixels.
template <class Fill>
void product_of_tiles(const Packed& packed, const Size& out, const Tensor& bias, bool relu,
                      const Tensor& result, const Fill& fill) {
  const Element element = element_of(result);
  char* data = static_cast<char*>(result.mutable_data_ptr());
  const PixelProductFunction multiply =
      packed.table->product[static_cast<int>(packed.operand)][static_cast<int>(element)];
  const int64_t block = packed.table->pixels;
  const int64_t row_bytes = packed.row * packed.size;
  const int64_t blocks = (out.pixels() + block - 1) / block;
  const int64_t blocks_a_tile = std::max<int64_t>(1, kScratchBytes / (row_bytes * block));
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t tile = std::min(blocks_a_tile, end - begin) * block;
    std::vector<char> storage(tile * row_bytes + kLine);  // zeros: what is padded stays so
    void* start = storage.data();
    size_t space = storage.size();
    char* rows = static_cast<char*>(std::align(kLine, tile * row_bytes, start, space));
    const int64_t last = std::min(end * block, out.pixels());
    for (int64_t pixel = begin * block; pixel < last; pixel += tile) {
      const int64_t count = std::min(tile, last - pixel);
      fill(pixel, count, rows);
      const PixelProduct product{rows,
                                 packed.row,
                                 packed.steps,
                                 packed.weight,
                                 static_cast<const float*>(bias.const_data_ptr()),
                                 relu,
                                 count,
                                 out.channels,
                                 out.channels};
      multiply(product, data + pixel * out.channels * element_size(element));
    }
  });
}

// Cuts `count` output pixels from `pixel` on into runs of one row: run(b, y, x, length, done).
template <class Run>
void each_run(const Size& out, int64_t pixel, int64_t count, const Run& run) {
  for (int64_t done = 0; done < count;) {
    const int64_t x = (pixel + done) % out.width;
    const int64_t row = (pixel + done) / out.width;
    const int64_t length = std::min(out.width - x, count - done);
    run(row / out.height, row % out.height, x, length, done);
    done += length;
  }
}

Tensor empty_map(const Size& out, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty({out.batch, out.channels, out.height, out.width}, dtype, std::nullopt,
                              like.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

// Row [pixel][i, tap] of the images' 3x3 surroundings at stride 2.
template <class T>
void gather(const Tensor& images, const Size& out, const Packed& packed, int64_t pixel,
            int64_t count, float* rows) {
  const T* data = static_cast<const T*>(images.const_data_ptr());
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t stride_y = images.stride(2), stride_x = images.stride(3);
  each_run(out, pixel, count, [&](int64_t b, int64_t y, int64_t x, int64_t length, int64_t done) {
    for (int64_t i = 0; i < channels; ++i) {
      const T* plane = data + b * images.stride(0) + i * images.stride(1);
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        const int64_t from_y = 2 * y - 1 + tap / 3;
        float* to = rows + done * packed.row + i * kTaps + tap;
        for (int64_t p = 0; p < length; ++p, to += packed.row) {
          const int64_t from_x = 2 * (x + p) - 1 + tap % 3;
          const bool inside = from_y >= 0 && from_y < height && from_x >= 0 && from_x < width;
          *to = inside ? static_cast<float>(plane[from_y * stride_y + from_x * stride_x]) : 0.0f;
        }
      }
    }
  });
}

}  // namespace

Tensor separable_pack(Tensor weight, bool pairs) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float,
                  "weight must be float32 (N, K)");
  weight = torch::stable::contiguous(weight);
  const Separable* table = chosen_instruction_set().separable;
  pairs = pairs && table->product[static_cast<int>(RowElement::kBFloat16)][0] != nullptr;
  const int64_t columns = weight.size(0), depth = weight.size(1), wide = table->columns;
  const int64_t width = pairs ? 2 : 1, steps = (depth + width - 1) / width;
  const int64_t panels = (columns + wide - 1) / wide;
  Tensor packed = torch::stable::empty({panels, steps, wide * width},
                                       pairs ? ScalarType::BFloat16 : ScalarType::Float,
                                       std::nullopt, weight.device());
  const float* from = static_cast<const float*>(weight.const_data_ptr());
  void* to = packed.mutable_data_ptr();
  for (int64_t i = 0; i < packed.numel(); ++i) {
    const int64_t column = i / (steps * wide * width) * wide + i / width % wide;
    const int64_t k = i / (wide * width) % steps * width + i % width;
    const float value = column < columns && k < depth ? from[column * depth + k] : 0.0f;
    if (pairs) {
      static_cast<BFloat16*>(to)[i] = static_cast<BFloat16>(value);
    } else {
      static_cast<float*>(to)[i] = value;
    }
  }
  return packed;
}

Tensor separable_block(Tensor x, Tensor depthwise, Tensor depthwise_bias, Tensor packed,
                       Tensor bias, int64_t stride, bool inner_relu, bool relu) {
  check_map(x, "x");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  check_floats(depthwise, "depthwise", kTaps * channels);
  check_floats(depthwise_bias, "depthwise_bias", channels);
  check_floats(bias, "bias", bias.size(0));
  const Packed weights(packed, channels, bias.size(0));
  const Size out{x.size(0), bias.size(0), (height - 1) / stride + 1, (width - 1) / stride + 1};
  Tensor result = empty_map(out, x.scalar_type(), x);
  if (x.numel() == 0) return result;
  if (x.stride(1) != 1 && channels > 1) {
    x = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  }
  const Element element = element_of(x);
  const DepthwiseFunction convolve =
      weights.table->depthwise[static_cast<int>(element)][static_cast<int>(weights.operand)];
  const int64_t size = element_size(element);
  const char* data = static_cast<const char*>(x.const_data_ptr());
  const auto fill = [&](int64_t pixel, int64_t count, char* rows) {
    each_run(out, pixel, count, [&](int64_t b, int64_t y, int64_t at, int64_t length, int64_t to) {
      DepthwiseRun run{{},
                       x.stride(3),
                       width,
                       at,
                       length,
                       stride,
                       channels,
                       static_cast<const float*>(depthwise.const_data_ptr()),
                       static_cast<const float*>(depthwise_bias.const_data_ptr()),
                       inner_relu,
                       weights.row};
      for (int64_t row = 0; row < 3; ++row) {
        const int64_t from = y * stride - 1 + row;
        if (from < 0 || from >= height) continue;
        run.rows[row] = data + (b * x.stride(0) + from * x.stride(2)) * size;
      }
      convolve(run, rows + to * weights.row * weights.size);
    });
  };
  product_of_tiles(weights, out, bias, relu, result, fill);
  return result;
}

Tensor stem(Tensor images, Tensor packed, Tensor bias, ScalarType dtype) {
  check_map(images, "images");
  const int64_t depth = kTaps * images.size(1);
  check_floats(bias, "bias", bias.size(0));
  const Packed weights(packed, depth, bias.size(0));
  STD_TORCH_CHECK(weights.operand == RowElement::kFloat, "the stem needs a weight of floats");
  const Size out{images.size(0), bias.size(0), (images.size(2) - 1) / 2 + 1,
                 (images.size(3) - 1) / 2 + 1};
  Tensor result = empty_map(out, dtype, images);
  if (images.numel() == 0) return result;
  const auto fill = [&](int64_t pixel, int64_t count, char* rows) {
    float* to = reinterpret_cast<float*>(rows);
    switch (element_of(images)) {
      case Element::kFloat:
        return gather<float>(images, out, weights, pixel, count, to);
      case Element::kBFloat16:
        return gather<BFloat16>(images, out, weights, pixel, count, to);
      case Element::kHalf:
        return gather<Half>(images, out, weights, pixel, count, to);
    }
  };
  product_of_tiles(weights, out, bias, true, result, fill);
  return result;
}

}  // namespace ciema::cpu
