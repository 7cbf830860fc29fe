// rows = sigmoid(Wa f + ba) f with Wa and f rounded to bfloat16 in the product; everything else as
// in cross_spatial_body.h. vdpbf16ps takes pairs of neighbouring k: weights lie (panel, k / 2,
// column, 2), k counts the padded channels of the three sections.
// Included inside the namespace of an instruction-set file.

#include "slab_products_body.h"
#include "attend_body.h"
#include "bf16_words_body.h"

inline int64_t pairs_of(int64_t channels) { return 3 * padded(channels) / 2; }

inline int64_t bf16_packed_size(int64_t channels) {
  return pairs_of(channels) * 3 * padded(channels);  // one pair takes a float's place
}

inline void bf16_pack(const float* matrix, int64_t c, void* packed) {
  const int64_t cp = padded(c), pairs = pairs_of(c);
  BFloat16* out = static_cast<BFloat16*>(packed);
  memset(out, 0, static_cast<size_t>(bf16_packed_size(c)) * sizeof(float));
  for (int64_t o = 0; o < 3 * c; ++o) {
    const PackedColumn column(pairs, 3 * cp / kLanes, o / c * cp + o % c);
    for (int64_t i = 0; i < 3 * c; ++i) {
      const int64_t k = i / c * cp + i % c;
      from_float(matrix[o * 3 * c + i], out + 2 * (column.start + k / 2 * column.step) + k % 2);
    }
  }
}

inline int64_t bf16_scratch_size(int64_t channels, int64_t pixels) {
  return pixels * pairs_of(channels);
}

inline void bf16_attend(int64_t channels, const void* packed, const float* bias,
                        const float* features, int64_t count, float* rows, int64_t stride_rows,
                        void* scratch) {
  const int64_t columns = 3 * padded(channels), pairs = pairs_of(channels);
  BFloat16* rounded = static_cast<BFloat16*>(scratch);
  for (int64_t i = 0; i < count * columns; i += kLanes) {
    const __m256bh half = _mm512_cvtneps_pbh(Simd::load(features + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + i),
                        reinterpret_cast<__m256i>(half));
  }
  const Operand left = {static_cast<const float*>(scratch), pairs, kOneTap, pairs};
  product<Bf16Words>(left, count, static_cast<const float*>(packed), columns / kLanes,
                     Attend{bias, features, columns, rows, stride_rows});
}

constexpr CrossSpatialBf16 kTable = {bf16_packed_size, bf16_pack, bf16_scratch_size, bf16_attend};
