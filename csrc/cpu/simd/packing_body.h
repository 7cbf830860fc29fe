// Weights of products and convolutions, packed. A matrix may be one of several that are stacked in
// rows (sections of the input) and columns.
// Included inside the namespace of an instruction-set file, after winograd_body.h.

// Where a c x c block goes in a packed matrix of `rows` rows and `vectors` vectors of columns.
struct Block {
  int64_t rows, vectors, first_row, first_column;
};

// out[row i][column o] = weight[o * stride_out + i * stride_in], i and o below c.
inline void pack_matrix(const float* weight, int64_t c, int64_t stride_out, int64_t stride_in,
                        const Block& block, float* out) {
  for (int64_t o = 0; o < c; ++o) {
    const PackedColumn column(block.rows, block.vectors, block.first_column + o);
    float* to = out + column.start + block.first_row * column.step;
    for (int64_t i = 0; i < c; ++i) to[i * column.step] = weight[o * stride_out + i * stride_in];
  }
}

// A size x size convolution (c, c, size, size), framed to r x r and transformed; or the one that is
// its gradient for the input: channels exchanged, mirrored.
inline void pack_winograd(const float* weight, int64_t c, int size, int r, bool gradient,
                          const Block& block, float* out) {
  double kernels[kMostTaps][kKernels], transformed[kPositions][kKernels];
  const int64_t stride = block.rows * block.vectors * kLanes, taps = size * size;
  for (int64_t o = 0; o < c; o += kKernels) {  // kKernels divides the lanes: one panel has them all
    const PackedColumn column(block.rows, block.vectors, block.first_column + o);
    const int64_t count = c - o < kKernels ? c - o : kKernels;
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t k = 0; k < kKernels; ++k) {
          const int64_t from = gradient ? (i * c + o + k) * taps + taps - 1 - tap
                                        : ((o + k) * c + i) * taps + tap;
          kernels[tap][k] = k < count ? weight[from] : 0.0;
        }
      }
      kernel_transform(kernels, size, r, transformed);
      float* at = out + column.start + (block.first_row + i) * column.step;
      for (int p = 0; p < kPositions; ++p) {
        for (int64_t k = 0; k < kKernels; ++k) {
          at[p * stride + k] = static_cast<float>(transformed[p][k]);
        }
      }
    }
  }
}

inline void pack_direct(const float* weight, int64_t c, int64_t taps, float* out) {
  for (int64_t tap = 0; tap < taps; ++tap) {
    pack_matrix(weight + tap, c, c * taps, taps, {taps * c, padded(c) / kLanes, tap * c, 0}, out);
  }
}
