// What each instruction set offers the products acc[m, p] = sum_k weight[m, k] * map[k, p]: packing
// of a map's pixels into a panel, the product of packed weights with a panel, and what is done with
// a block of sums (the epilogues). One table of functions to a file.
//
// Weight panel  `rows` rows of the weight, [step][row] words, rows past the last are zero
// Map panel     `pixels` pixels of the map, [step][pixel] words
// Word          a float (a step is one k), or two bfloat16 (a step is k and k + 1, the last k
//               padded)
// Block         up to kBlockRows sums a pixel, float [row][pixel]
#pragma once

#include <limits>

#include "channel_statistics.h"  // Element
#include "target.h"

namespace ciema::cpu {

enum class Words : int { kFloats, kBFloat16Pairs };
constexpr int kWordKinds = 2;
constexpr int kBlockRows = 64;  // a multiple of every `rows`

// A map's elements: channel c, pixel p at data + c * stride_c + p * stride_s; one stride is 1.
struct MapView {
  const void* data;
  int64_t stride_c, stride_s;
};
struct MutableMapView {
  void* data;
  int64_t stride_c, stride_s;
};

// What is done with a map's elements while they are packed, all of it optional:
// act(scale[c] * x + shift[c]), then times gate [c / group_channels][pixel].
struct Transform {
  const float* scale;
  const float* shift;  // only with a scale
  bool relu;           // only with a scale
  const float* gate;
  int64_t group_channels, gate_stride;
};

// Packs `channels` channels of `count` pixels.
using PackFunction = void (*)(const MapView& map, int64_t channels, int count,
                              const Transform& transform, void* panel);
// The same with channels and pixels changing their places: a panel whose `pixels` are the map's
// channels (count of them) and whose steps are the map's pixels; and weight panels of `channels`
// rows, for sums over pixels.
using PackPixelsFunction = void (*)(const MapView& map, int count, int64_t pixels,
                                    const Transform& transform, int64_t first_channel, void* panel);
using PackRowsFunction = void (*)(const MapView& map, int channels, int64_t pixels, void* panels);

// acc (+)= weight panels x map panel, for `panels` weight panels of `steps` steps and the vectors
// that `count` pixels need.
using MultiplyFunction = void (*)(const void* weight, int64_t panels, const void* panel,
                                  int64_t steps, int count, bool accumulate, float* acc);

// Whether sums of squares are so alike (a factor of 64 between their roots) that of two pixels or
// rows put together in Strassen's form the smaller keeps 1e-4 of its own size. False for NaN and
// sums past float32, which tell nothing; values below 1e-23 pass for zeros.
inline bool alike(float a, float b) {
  return a <= 4096.0f * b && b <= 4096.0f * a && a + b <= std::numeric_limits<float>::max();
}
// The sums T1 to T4 of two panels (packed_weight.h), each of two halves of `half` floats, one after
// another; the pixels' sum of squares, negative if those of the tiles are not alike.
using StrassenSumsFunction = float (*)(const float* panels, int64_t half, float* sums);
// Puts seven blocks of products together to the four blocks acc, which they are added to or not;
// the products are written over. False if the sums' squares come to less than `least`, or to what
// is not finite: then nothing has been added.
using StrassenBlocksFunction = bool (*)(float* products, float least, bool accumulate, float* acc);

// One pixel of a resized map: four pixels, as offsets in elements, and their weights.
struct Taps {
  int64_t offset[4];
  float weight[4];
};
// A map in blocks of kBlockRows neighbouring channels, all of them readable, through `taps`
// [pixel].
struct Resized {
  const float* data;
  const Taps* taps;
};

// out = act(scale * (acc + sum of the resized maps) + shift); scale, shift, out may be missing.
struct Affine {
  const float* scale;
  const float* shift;
  const Resized* resized;
  int resized_count;
  bool relu;
};
using AffineFunction = void (*)(const float* acc, int rows, int count, const Affine& affine,
                                const MutableMapView& out);
// The same into the words of a map panel, as the second operand of a product; rows are padded even.
using AffineToPanelFunction = void (*)(const float* acc, int rows, int count, const Affine& affine,
                                       void* panel);

// acc += the resized maps, for statistics of the whole.
using AddResizedFunction = void (*)(float* acc, int rows, int count, const Affine& affine);

// out = acc_scale * acc + map_scale * map + shift, vectors [row]
struct Combination {
  const float* acc_scale;
  const float* map_scale;
  const float* shift;
};
using CombineFunction = void (*)(const float* acc, int rows, int count, const Combination& how,
                                 const MapView& map, const MutableMapView& out);

// Mean and sum of squared distances from it of each row's `count` sums.
using MomentsFunction = void (*)(const float* acc, int rows, int count, float* mean, float* square);

// phi = sigmoid(scale * acc + shift), out = e * (phi + w * (1 - phi)); w as rows of a gate, of
// which the block's row r has number (first_row + r) / group_channels. Without out.data the sums
// over the pixels go to sums [row].
struct Fusion {
  const float* scale;
  const float* shift;
  const float* w;
  int64_t first_row, group_channels;
  float* sums;
};
using FusionFunction = void (*)(const float* acc, int rows, int count, const Fusion& fusion,
                                const MapView& e, const MutableMapView& out);

// A batch norm y = weight * n + bias, n = rstd * (z - mean), on the way back, vectors [row]. Of the
// gradient g for y and n the sums over the pixels go to sums and products if out has no data; else
// out = weight * rstd * (g - sum_share - n * product_share), shares may be missing.
struct NormGradient {
  const float* mean;
  const float* rstd;
  const float* weight;
  const float* bias;
  const float* sum_share;
  const float* product_share;
  float* sums;
  float* products;
};
// g = grad where y > 0; z may have another element type than the other maps
using ReluGradientFunction = void (*)(int rows, int count, const NormGradient& norm,
                                      const MapView& z, Element z_element, const MapView& grad,
                                      const MutableMapView& out);
// g = grad * e * (1 - w) * phi * (1 - phi), phi = sigmoid(y); of `fusion` w and its groups are read
using GateGradientFunction = void (*)(int rows, int count, const NormGradient& norm,
                                      const Fusion& fusion, const MapView& z, Element z_element,
                                      const MapView& e, const MapView& grad,
                                      const MutableMapView& out);
// grad_e = grad * (phi + w * (1 - phi)) + w * acc, grad_w [group][pixel] += e * (acc + grad * (1 -
// phi)), with phi = sigmoid(scale * z + shift)
using FusionGradientFunction = void (*)(const float* acc, int rows, int count, const Fusion& fusion,
                                        const MapView& z, const MapView& e, const MapView& grad,
                                        const MutableMapView& grad_e, float* grad_w);

// Which places of an axis a smaller one gets sums from: place i from first[i] on, count[i] of them,
// with the weights from weights + start[i] on.
struct Axis {
  int64_t from_size, size;
  const int32_t* first;
  const int32_t* count;
  const int32_t* start;
  const float* weights;
};
// Sums of a map's pixels into those of a smaller map, one vector of `channels` channels; scratch
// holds vectors: (columns.from_size + lanes) + rows.from_size * columns.size.
using ShrinkFunction = void (*)(const MapView& map, int channels, const Axis& rows,
                                const Axis& columns, float* scratch, const MutableMapView& out);

struct Products {
  int rows, pixels, lanes;
  PackFunction pack[kWordKinds][kElementKinds];
  MultiplyFunction multiply[kWordKinds];  // null where the instruction set has no pairs
  AffineFunction affine[kElementKinds];
  AffineToPanelFunction affine_to_panel[kWordKinds];
  CombineFunction combine[kElementKinds];
  FusionFunction fusion[kElementKinds];
  PackPixelsFunction pack_pixels[kWordKinds][kElementKinds];
  PackRowsFunction pack_rows[kWordKinds][kElementKinds];
  MomentsFunction moments;
  AddResizedFunction add_resized;
  ReluGradientFunction relu_gradient[kElementKinds];
  GateGradientFunction gate_gradient[kElementKinds];
  FusionGradientFunction fusion_gradient[kElementKinds];
  ShrinkFunction shrink[kElementKinds];
  StrassenSumsFunction strassen_sums;
  StrassenBlocksFunction strassen_blocks;
};

extern const Products kPortableProducts;
#ifdef CIEMA_X86_SIMD
extern const Products kAvx2Products;
extern const Products kAvx512Products;
extern const Products kAvx512bf16Products;  // the only one with pairs
#endif

}  // namespace ciema::cpu
