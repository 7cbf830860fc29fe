// Weights of spec.md 2.3 in the order of the products' fragments (Network::Packed), and the vectors
// of its affine maps, in one launch: a block packs one tile, the last one the vectors.
//
//   tiles     c×c, zero past c, in the dtype of the products; channel_feat times α
//   vectors   float32, zero past c; batch norms with running statistics as scale and shift:
//             scale = γ / sqrt(var + eps), shift = β − mean·scale
//
// Bytes       the weights once; the tiles, 57·c²; a thousand times less than the maps.
#pragma once

#include "cross_spatial_tiles.cuh"

namespace ciema {

// All weights of one dtype, contiguous.
struct CrossSpatialPackParams {
  const void *gn_weight, *gn_bias;
  const void *conv3x3_weight, *conv3x3_bias;
  const void *spatial_conv1_weight, *spatial_conv3_weight, *spatial_conv5_weight;
  const void *attention_weight, *attention_bn_weight, *attention_bn_bias;
  const void *attention_running_mean, *attention_running_var;
  const void *reduce_weight, *reduce_bn_weight, *reduce_bn_bias;
  const void *reduce_running_mean, *reduce_running_var;
  const void *channel_feat_weight, *alpha;
  void* packed;
  float* vectors;  // (kVectors, kChannels)
  int* counters;   // (slabs,), zeroed
  int slabs, channels;
  float attention_eps, reduce_eps;
};

namespace cross_spatial {

constexpr int kPackThreads = 256;

// Weight (output, input) of a tile.
template <class W>
__device__ __forceinline__ float weight_of(const CrossSpatialPackParams& p, int tile, int output,
                                           int input) {
  const int c = p.channels, at = output * c + input;
  const auto read = [](const void* weights, int i) {
    return to_float(static_cast<const W*>(weights)[i]);
  };
  if (tile < kSpatial1) return read(p.conv3x3_weight, at * 9 + tile);
  if (tile < kSpatial3) return read(p.spatial_conv1_weight, at);
  if (tile < kSpatial5) return read(p.spatial_conv3_weight, at * 9 + tile - kSpatial3);
  if (tile < kAttention) return read(p.spatial_conv5_weight, at * 25 + tile - kSpatial5);
  if (tile < kReduce) {
    const int row = (tile - kAttention) / 3 * c + output;
    return read(p.attention_weight, row * 3 * c + (tile - kAttention) % 3 * c + input);
  }
  if (tile < kChannelFeat) {
    return read(p.reduce_weight, output * 3 * c + (tile - kReduce) * c + input);
  }
  return read(p.alpha, 0) * read(p.channel_feat_weight, at);
}

template <class W>
__device__ __forceinline__ void pack_vector(float* vector, const void* values, int c, int padded) {
  for (int i = static_cast<int>(threadIdx.x); i < padded; i += kPackThreads) {
    vector[i] = i < c ? to_float(static_cast<const W*>(values)[i]) : 0.0f;
  }
}

// Scale and shift of c channels of a batch norm, from channel `first`.
template <class W>
__device__ __forceinline__ void fold(float* scale, float* shift, const void* weight,
                                     const void* bias, const void* mean, const void* var,
                                     float eps, int first, int c, int padded) {
  const auto read = [](const void* values, int i) {
    return to_float(static_cast<const W*>(values)[i]);
  };
  for (int i = static_cast<int>(threadIdx.x); i < padded; i += kPackThreads) {
    const int at = first + i;
    const float by = i < c ? read(weight, at) / sqrtf(read(var, at) + eps) : 0.0f;
    scale[i] = by;
    shift[i] = i < c ? read(bias, at) - read(mean, at) * by : 0.0f;
  }
}

template <class W>
__device__ void pack_vectors(const CrossSpatialPackParams& p, int padded) {
  const int c = p.channels;
  const auto vector = [&](int which) { return p.vectors + which * padded; };
  pack_vector<W>(vector(kNormWeight), p.gn_weight, c, padded);
  pack_vector<W>(vector(kNormBias), p.gn_bias, c, padded);
  pack_vector<W>(vector(kConv3x3Bias), p.conv3x3_bias, c, padded);
  for (int part = 0; part < 3; ++part) {
    fold<W>(vector(kAttentionScale + part), vector(kAttentionShift + part), p.attention_bn_weight,
            p.attention_bn_bias, p.attention_running_mean, p.attention_running_var,
            p.attention_eps, part * c, c, padded);
  }
  fold<W>(vector(kReduceScale), vector(kReduceShift), p.reduce_bn_weight, p.reduce_bn_bias,
          p.reduce_running_mean, p.reduce_running_var, p.reduce_eps, 0, c, padded);
}

// Grid kTiles + 1. W: the weights' dtype.
template <class N, class W>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(CrossSpatialPackParams p) {
  using T = typename N::T;
  constexpr int kChannels = N::kChannels, kUnits = N::kSteps * (kChannels / 16);
  CIEMA_SHARED(T, weights, [kChannels * N::kPitch]);
  const int tile = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  if (tile == kTiles) {
    pack_vectors<W>(p, kChannels);
    for (int i = thread; i < p.slabs; i += kPackThreads) p.counters[i] = 0;
    return;
  }
  for (int i = thread; i < kChannels * kChannels; i += kPackThreads) {
    const int output = i / kChannels, input = i % kChannels;
    const bool real = output < p.channels && input < p.channels;
    weights[output * N::kPitch + input] =
        from_float<T>(real ? weight_of<W>(p, tile, output, input) : 0.0f);
  }
  __syncthreads();
  const bool chained = tile >= kAttention && tile < kChannelFeat;
  for (int unit = warp_of_block(); unit < kUnits; unit += kPackThreads / kWarp) {
    const int step = unit / (kChannels / 16), pair = unit % (kChannels / 16);
    const T* first = weights + 16 * pair * N::kPitch + step * N::F::kDepth;
    typename N::B b[2];
    if (chained) {
      N::F::load_b_chained(b, first, N::kPitch);
    } else {
      N::F::load_b(b, first, N::kPitch);
    }
    N::Packed::store(p.packed, b, tile, step, pair);
  }
}

}  // namespace cross_spatial
}  // namespace ciema
