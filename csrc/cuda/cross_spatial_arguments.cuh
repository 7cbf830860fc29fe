// From an entry's arguments to the parameters of cross_spatial's training kernels, and from a
// group's width to the network's template.
#pragma once

#include "cross_spatial_training.cuh"
#include "launch.cuh"

namespace ciema::cross_spatial {

template <class T, int kChannels>
using TrainingNetwork = Network<T, Precision::kSplit, kChannels>;

inline CrossSpatialSizes sizes_of(const Arguments& a) {
  CrossSpatialSizes s{};
  s.slabs = static_cast<int>(a.integer("slabs"));
  s.groups = static_cast<int>(a.integer("groups"));
  s.channels = static_cast<int>(a.integer("group_channels"));
  s.height = static_cast<int>(a.integer("height"));
  s.width = static_cast<int>(a.integer("width"));
  s.shares = static_cast<int>(a.integer("shares"));
  s.per_group = a.integer("per_group") != 0;
  return s;
}

template <class T>
CrossSpatialMap map_of(const void* map, int channels, int64_t stride_b, int64_t stride_c,
                       int64_t stride_s, bool channels_last) {
  const auto* address = static_cast<const T*>(map);
  const bool fits = channels_last && channels % Vector<T>::kElements == 0 &&
                    is_aligned(address, stride_b) && is_aligned(address, stride_s);
  return {stride_c, stride_s, channels_last, fits};
}

// Calls run(Network) of the narrower network that holds a group; `padded`: its channels.
template <class T, class Run>
void with_network(const Arguments& a, Run run) {
  if (a.integer("padded") == 32) {
    run(TrainingNetwork<T, 32>{});
  } else {
    run(TrainingNetwork<T, 64>{});
  }
}

}  // namespace ciema::cross_spatial
