// What training keeps of a pixel and multiplies, as float32; slab_bf16_rows_body.h is the twin.
// Included inside the namespace of an instruction-set file, after slab_gradients_body.h.

using Stored = float;
using StoredWords = FloatWords;
constexpr int64_t kPerWord = 1;
// Not by Winograd: alpha's gradient cancels to a thousandth of its terms, each a sum of X.
constexpr bool kDirectConv3x3 = true;

// Words of a section's channels in a product.
inline int64_t words_of_section(int64_t c) { return c; }

// out[row i][column o] = weight[o * stride_out + i * stride_in], as the left operand has its k.
inline void pack_section(const float* weight, int64_t c, int64_t stride_out, int64_t stride_in,
                         const Block& block, float* out) {
  pack_matrix(weight, c, stride_out, stride_in, block, out);
}

inline Floats gate_of(Floats logit) { return sigmoid(logit); }

// X of a chunk is exact where it is kept.
inline int64_t exact_size(int64_t) { return 0; }
inline ExactRows exact_rows(const RowsOf<Stored>& rows, int64_t first, float*) {
  return {rows.x(first), rows.stride};
}
inline void keep_rows(const ExactRows&, int64_t, int64_t, Stored*, int64_t) {}

// Rows as words along the pixels, for products over them.
inline int64_t pixel_words_size(int64_t) { return 0; }
inline PixelWords pixel_words(const Stored* rows, int64_t stride, int64_t, int64_t, float*) {
  return {rows, stride};
}
