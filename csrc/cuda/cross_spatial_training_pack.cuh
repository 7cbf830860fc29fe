// Weights of spec.md 2.3 as fragments for training (cross_spatial_pack.cuh), and for the backward
// a second set after the first, transposed: tile (i, o) of W as (o, i), taps mirrored,
// so that the same products give the gradients of their inputs.
//
// Grid        58 blocks, or 58 + 57 with the transposed set; weights are float32.
// Bytes       the weights once or twice; the tiles.
#pragma once

#include "cross_spatial_pack.cuh"

namespace ciema::cross_spatial {

// The tile whose transpose takes the place of `tile`.
__device__ __forceinline__ int mirrored(int tile) {
  if (tile < kSpatial1) return kSpatial1 - 1 - tile;
  if (tile < kSpatial3) return tile;
  if (tile < kSpatial5) return kSpatial3 + kSpatial5 - 1 - tile;
  if (tile < kAttention) return kSpatial5 + kAttention - 1 - tile;
  if (tile < kReduce) return kAttention + (tile - kAttention) % 3 * 3 + (tile - kAttention) / 3;
  return tile;
}

template <class N>
__global__ void __launch_bounds__(kPackThreads) training_pack_kernel(CrossSpatialPackParams p) {
  using T = typename N::T;
  constexpr int kChannels = N::kChannels, kPairs = kChannels / 16;
  CIEMA_SHARED(T, weights, [kChannels * N::kPitch]);
  const int thread = static_cast<int>(threadIdx.x);
  if (blockIdx.x == kTiles) {
    pack_vector<float>(p.vectors + kNormWeight * kChannels, p.gn_weight, p.channels, kChannels);
    pack_vector<float>(p.vectors + kNormBias * kChannels, p.gn_bias, p.channels, kChannels);
    pack_vector<float>(p.vectors + kConv3x3Bias * kChannels, p.conv3x3_bias, p.channels, kChannels);
    for (int i = thread; i < p.slabs; i += kPackThreads) p.counters[i] = 0;
    return;
  }
  const bool transposed = blockIdx.x > kTiles;
  const int tile = static_cast<int>(blockIdx.x) - (transposed ? kTiles + 1 : 0);
  const int source = transposed ? mirrored(tile) : tile;
  for (int i = thread; i < kChannels * kChannels; i += kPackThreads) {
    const int output = i / kChannels, input = i % kChannels;
    const bool real = output < p.channels && input < p.channels;
    const float weight = !real        ? 0.0f
                         : transposed ? weight_of<float>(p, source, input, output)
                                      : weight_of<float>(p, source, output, input);
    weights[output * N::kPitch + input] = from_float<T>(weight);
  }
  __syncthreads();
  const bool chained = tile >= kAttention && tile < kChannelFeat;
  for (int unit = warp_of_block(); unit < N::kSteps * kPairs; unit += kPackThreads / kWarp) {
    const int step = unit / kPairs, pair = unit % kPairs;
    const T* first = weights + 16 * pair * N::kPitch + step * N::F::kDepth;
    typename N::B b[2];
    if (chained) {
      N::F::load_b_chained(b, first, N::kPitch);
    } else {
      N::F::load_b(b, first, N::kPitch);
    }
    N::Packed::store(static_cast<char*>(p.packed) + (transposed ? N::Packed::kBytes : 0), b, tile,
                     step, pair);
  }
}

}  // namespace ciema::cross_spatial
