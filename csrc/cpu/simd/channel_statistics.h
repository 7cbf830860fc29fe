// What each instruction set offers the channel statistics: one table of functions to a file.
#pragma once

#include "target.h"

namespace ciema::cpu {

enum class Element : int { kFloat, kBFloat16, kHalf };
constexpr int kElementKinds = 3;

// Mean, maximum and first position of the maximum of `count` neighbouring elements.
using PlaneFunction = void (*)(const void* x, int64_t count, float* mean, float* max,
                               int64_t* argmax);

// The same for each of `channels` neighbouring channels of `count` pixels, stride_s elements apart.
// sum and position are scratch of `channels` elements; count is below 2^31.
using ChannelsFunction = void (*)(const void* x, int64_t count, int64_t stride_s, int64_t channels,
                                  double* sum, int32_t* position, float* mean, float* max,
                                  int64_t* argmax);

struct ChannelStatistics {
  PlaneFunction plane[kElementKinds];        // indexed by Element
  ChannelsFunction channels[kElementKinds];  // indexed by Element
};

extern const ChannelStatistics kPortableChannelStatistics;
#ifdef CIEMA_X86_SIMD
extern const ChannelStatistics kAvx2ChannelStatistics;
extern const ChannelStatistics kAvx512ChannelStatistics;
#endif

}  // namespace ciema::cpu
