// What each instruction set offers the backbone: depthwise 3x3 runs, and the product of rows of
// pixels with a packed weight. One table of functions to a file.
//
// RowElement    what the product multiplies: floats, or pairs of bfloat16 where the table has them
// Weight panel  `columns` output channels, [step][column], columns past the last are zero; a step
//               is one k, or with pairs k and k + 1 beside each other
#pragma once

#include "channel_statistics.h"  // Element
#include "target.h"

namespace ciema::cpu {

enum class RowElement : int { kFloat, kBFloat16 };
constexpr int kRowElementKinds = 2;

// Output pixels first..first+count of one row of a depthwise 3x3 convolution with padding 1.
struct DepthwiseRun {
  const void* rows[3];  // the three input rows, null outside the map
  int64_t pixel;        // elements from pixel to pixel of a row; channels are neighbours
  int64_t width;        // of the input
  int64_t first, count, stride, channels;
  const float* weight;  // [tap][channels]
  const float* bias;    // [channels]
  bool relu;
  int64_t out_pixel;  // elements from pixel to pixel of the output
};
using DepthwiseFunction = void (*)(const DepthwiseRun& run, void* out);

// out[pixel][column] = act(sum_k a[pixel][k] weight[k][column] + bias[column]). All rows of a to
// the next multiple of the table's `pixels` are read.
struct PixelProduct {
  const void* a;
  int64_t a_pixel, steps;
  const void* weight;
  const float* bias;
  bool relu;
  int64_t pixels, columns, out_pixel;
};
using PixelProductFunction = void (*)(const PixelProduct& product, void* out);

struct Separable {
  int pixels, columns;
  DepthwiseFunction depthwise[kElementKinds][kRowElementKinds];  // element read, operand written
  PixelProductFunction product[kRowElementKinds][kElementKinds];  // null without pairs
};

extern const Separable kPortableSeparable;
#ifdef CIEMA_X86_SIMD
extern const Separable kAvx2Separable;
extern const Separable kAvx512Separable;
extern const Separable kAvx512bf16Separable;  // the only one with pairs
#endif

}  // namespace ciema::cpu
