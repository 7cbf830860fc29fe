// What each instruction set offers the products acc[m, p] = sum_k weight[m, k] * map[k, p]: packing of
// a map's pixels into a panel, the product of packed weights with a panel, and what is done with a
// block of sums (the epilogues). One table of functions to a file.
//
// Weight panel  `rows` rows of the weight, [step][row] words, rows past the last are zero
// Map panel     `pixels` pixels of the map, [step][pixel] words
// Word          a float (a step is one k), or two bfloat16 (a step is k and k + 1, the last k padded)
// Block         up to kBlockRows sums a pixel, float [row][pixel]
#pragma once

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

// Packs `channels` channels of `count` pixels. With `gate`, rows [group][pixels] of floats, channel c
// is multiplied by the row c / group_channels.
using PackFunction = void (*)(const MapView& map, int64_t channels, int count, const float* gate,
                              int64_t group_channels, void* panel);

// acc (+)= weight panels x map panel, for `panels` weight panels of `steps` steps and the vectors that
// `count` pixels need.
using MultiplyFunction = void (*)(const void* weight, int64_t panels, const void* panel,
                                  int64_t steps, int count, bool accumulate, float* acc);

// One pixel of a resized map: four pixels, as offsets in elements, and their weights.
struct Taps {
  int64_t offset[4];
  float weight[4];
};
// A map whose channels are neighbours, read through `taps` [pixel].
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

// out = gate * map + (1 - gate) * acc, gate [row]
using InterpolateFunction = void (*)(const float* acc, int rows, int count, const float* gate,
                                     const MapView& map, const MutableMapView& out);

// phi = sigmoid(scale * acc + shift), out = e * (phi + w * (1 - phi)); w as rows of a gate, of which
// the block's row r has number (first_row + r) / group_channels. Without out.data the sums over the
// pixels go to sums [row].
struct Fusion {
  const float* scale;
  const float* shift;
  const float* w;
  int64_t first_row, group_channels;
  float* sums;
};
using FusionFunction = void (*)(const float* acc, int rows, int count, const Fusion& fusion,
                                const MapView& e, const MutableMapView& out);

struct Products {
  int rows, pixels;
  PackFunction pack[kWordKinds][kElementKinds];
  MultiplyFunction multiply[kWordKinds];  // null where the instruction set has no pairs
  AffineFunction affine[kElementKinds];
  AffineToPanelFunction affine_to_panel[kWordKinds];
  InterpolateFunction interpolate[kElementKinds];
  FusionFunction fusion[kElementKinds];
};

extern const Products kPortableProducts;
#ifdef CIEMA_X86_SIMD
extern const Products kAvx2Products;
extern const Products kAvx512Products;
extern const Products kAvx512bf16Products;  // the only one with pairs
#endif

}  // namespace ciema::cpu
