// The 1x1 convolution with the affine map and ReLU that follow it:
//
//   out[b, m, p] = act(scale[m] * sum_k weight[m, k] x[b, k, p] + shift[m])
//
// Layouts  maps with neighbouring pixels or neighbouring channels are read and written where they
//          lie, others are made contiguous first; simd/products.h has the layout of panels.
// Threads  over tiles of pixels and blocks of 64 rows, in Strassen's form two of each.
// Bytes    reads x once (a tile is packed once, twice where two threads share it), the packed
//          weight once a tile (from the last-level cache), writes out once.
// Sums     float32; of bfloat16 maps the products of bfloat16 are exact. Large float32 weights and
//          maps are multiplied in Strassen's form (packed_weight.h).
#include "products.h"

#include "huge_pages.h"

namespace ciema::cpu {

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
  multiply_map(map, weight, [&](const Tile& tile, int64_t row, int count, const float* acc) {
    const Affine affine{scales.from(row), shifts.from(row), nullptr, 0, relu};
    products().affine[out.element()](acc, count, tile.count, affine,
                                     out.mutable_at(tile.sample, row, tile.pixel));
  });
  return out.tensor();
}

}  // namespace ciema::cpu
