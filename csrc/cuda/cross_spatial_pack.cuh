// Weights of spec.md 2.3 in the order of the products' fragments (Network::Packed), and the vectors
// of its affine maps: a block packs one tile, the last one the vectors. For the backward a second
// set follows, transposed: tile (i, o) of W as (o, i), taps mirrored, so that the same products give
// the gradients of their inputs.
//
//   tiles     c×c, zero past c, in the dtype of the products; channel_feat times α
//   vectors   float32, zero past c; batch norms with running statistics as scale and shift:
//             scale = γ / sqrt(var + eps), shift = β − mean·scale
//
// Grid        58 blocks, or 58 + 57 with the transposed set; a launch of their own, or the last ones
//             of coordinate attention's.
// Bytes       the weights once or twice; the tiles, 57·c² a set; a thousand times less than the maps.
// The width is a number here, not a template's argument: every kernel of another width would be
// compiled for work that takes no time. For the same reason no loop is unrolled: coordinate
// attention's kernels all have this code in them.
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
  float* vectors;                   // (kVectors, padded)
  int* counters;                    // (counts,), zeroed
  int counts, channels, padded;     // padded: a group's channels as the kernels hold them
  float attention_eps, reduce_eps;
  bool float32_weights;             // else they have the maps' dtype
  bool tf32, training;              // training: no batch norms are folded
};

namespace cross_spatial {

constexpr int kPackThreads = 256;

template <class T>
__device__ __forceinline__ float read_weight(const CrossSpatialPackParams& p, const void* weights,
                                             int i) {
  return p.float32_weights ? static_cast<const float*>(weights)[i]
                           : to_float(static_cast<const T*>(weights)[i]);
}

// Weight (output, input) of a tile.
template <class T>
__device__ __forceinline__ float weight_of(const CrossSpatialPackParams& p, int tile, int output,
                                           int input) {
  const int c = p.channels, at = output * c + input;
  const auto read = [&](const void* weights, int i) { return read_weight<T>(p, weights, i); };
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

// The tile whose transpose takes the place of `tile`.
__device__ __forceinline__ int mirrored(int tile) {
  if (tile < kSpatial1) return kSpatial1 - 1 - tile;
  if (tile < kSpatial3) return tile;
  if (tile < kSpatial5) return kSpatial3 + kSpatial5 - 1 - tile;
  if (tile < kAttention) return kSpatial5 + kAttention - 1 - tile;
  if (tile < kReduce) return kAttention + (tile - kAttention) % 3 * 3 + (tile - kAttention) / 3;
  return tile;
}

template <class T>
__device__ __forceinline__ void pack_vector(const CrossSpatialPackParams& p, int which,
                                            const void* values) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < p.padded; i += kPackThreads) {
    p.vectors[which * p.padded + i] = i < p.channels ? read_weight<T>(p, values, i) : 0.0f;
  }
}

// Scale and shift of c channels of a batch norm, from channel `first`.
template <class T>
__device__ __forceinline__ void fold(const CrossSpatialPackParams& p, int scale, int shift,
                                     const void* weight, const void* bias, const void* mean,
                                     const void* var, float eps, int first) {
  const auto read = [&](const void* values, int i) { return read_weight<T>(p, values, i); };
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < p.padded; i += kPackThreads) {
    const int at = first + i;
    const bool real = i < p.channels;
    const float by = real ? read(weight, at) / sqrtf(read(var, at) + eps) : 0.0f;
    p.vectors[scale * p.padded + i] = by;
    p.vectors[shift * p.padded + i] = real ? read(bias, at) - read(mean, at) * by : 0.0f;
  }
}

template <class T>
__device__ void pack_vectors(const CrossSpatialPackParams& p) {
  pack_vector<T>(p, kNormWeight, p.gn_weight);
  pack_vector<T>(p, kNormBias, p.gn_bias);
  pack_vector<T>(p, kConv3x3Bias, p.conv3x3_bias);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < p.counts; i += kPackThreads) p.counters[i] = 0;
  if (p.training) return;
#pragma unroll 1
  for (int part = 0; part < 3; ++part) {
    fold<T>(p, kAttentionScale + part, kAttentionShift + part, p.attention_bn_weight,
            p.attention_bn_bias, p.attention_running_mean, p.attention_running_var,
            p.attention_eps, part * p.channels);
  }
  fold<T>(p, kReduceScale, kReduceShift, p.reduce_bn_weight, p.reduce_bn_bias,
          p.reduce_running_mean, p.reduce_running_var, p.reduce_eps, 0);
}

// Elements from output to output of a tile in shared memory, as Network::kPitch; bytes of a tile.
template <class T>
__host__ __device__ constexpr int pack_pitch(int padded) {
  return padded + 16 / static_cast<int>(sizeof(T));
}
template <class T>
__host__ __device__ constexpr int pack_bytes(int padded) {
  return padded * pack_pitch<T>(padded) * static_cast<int>(sizeof(T));
}

// Block `block` of the grid above; `weights`: pack_bytes of shared memory.
template <class T, Precision kPrecision>
__device__ void pack_block(const CrossSpatialPackParams& p, int block, T* weights) {
  using F = Fragments<T, kPrecision>;
  if (block == kTiles) {
    pack_vectors<T>(p);
    return;
  }
  const bool transposed = block > kTiles;
  const int tile = block - (transposed ? kTiles + 1 : 0);
  const int source = transposed ? mirrored(tile) : tile;
  const int pitch = pack_pitch<T>(p.padded), pairs = p.padded / 16;
  const int units = p.padded / F::kDepth * pairs;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < p.padded * p.padded; i += kPackThreads) {
    const int output = i / p.padded, input = i % p.padded;
    const bool real = output < p.channels && input < p.channels;
    const float weight = !real        ? 0.0f
                         : transposed ? weight_of<T>(p, source, input, output)
                                      : weight_of<T>(p, source, output, input);
    weights[output * pitch + input] = from_float<T>(weight);
  }
  __syncthreads();
  const bool chained = tile >= kAttention && tile < kChannelFeat;
  const int before = (tile + (transposed ? kTiles : 0)) * units;
#pragma unroll 1
  for (int unit = warp_of_block(); unit < units; unit += kPackThreads / kWarp) {
    const T* first = weights + 16 * (unit % pairs) * pitch + unit / pairs * F::kDepth;
    typename F::B b[2];
    if (chained) {
      F::load_b_chained(b, first, pitch);
    } else {
      F::load_b(b, first, pitch);
    }
    PackedUnit<F>::store(p.packed, b, before + unit);
  }
}

// float32's precision as a number.
template <class T>
__device__ __forceinline__ void pack_block(const CrossSpatialPackParams& p, int block,
                                           T* weights) {
  if (sizeof(T) == 4 && p.tf32) {
    pack_block<T, Precision::kTf32>(p, block, weights);
  } else {
    pack_block<T, Precision::kSplit>(p, block, weights);
  }
}

template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(CrossSpatialPackParams p) {
  CIEMA_DYNAMIC_SHARED(T, weights);
  pack_block<T>(p, static_cast<int>(blockIdx.x), weights);
}

}  // namespace cross_spatial
}  // namespace ciema
