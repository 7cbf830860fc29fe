// Entries of the channel statistics: which kernel, on which grid. The kernels and what they compute
// are in channel_statistics.cuh.
#include "channel_statistics.cuh"
#include "launch.cuh"

namespace ciema {
namespace {

using namespace channel_statistics;

// Warps to a plane: a block when planes are large, or too few to fill a GPU with a warp each.
inline int warps_per_plane(int64_t planes, int64_t plane) {
  return plane >= 2048 && (planes < 4096 || plane >= 65536) ? kWarps : 1;
}

// Whether a channels_last kernel may read or write whole vectors of channels.
template <class T>
bool pixels_are_aligned(const ChannelStatisticsParams& p) {
  const auto* address = static_cast<const T*>(p.x != nullptr ? p.x : p.grad_x);
  return p.channels % Vector<T>::kElements == 0 && is_aligned(address, p.stride_b) &&
         is_aligned(address, p.stride_s);
}

ChannelStatisticsParams params_of(const Arguments& a) {
  ChannelStatisticsParams p{};
  p.x = a.pointer<const void>("x");
  p.grad_x = a.pointer<void>("grad_x");
  p.mean = a.pointer<float>("mean");
  p.max = a.pointer<float>("maximum");
  p.argmax = a.pointer<int64_t>("argmax");
  p.grad_mean = a.pointer<const float>("grad_mean");
  p.grad_max = a.pointer<const float>("grad_maximum");
  p.saved_argmax = a.pointer<const int64_t>("saved_argmax");
  p.batch = a.integer("batch");
  p.channels = a.integer("channels");
  p.plane = a.integer("pixels");
  p.stride_b = a.integer("stride_b");
  p.stride_c = a.integer("stride_c");
  p.stride_s = a.integer("stride_s");
  return p;
}

template <class T, bool kForward, int kWarpsPerPlane>
void launch_rows(const Arguments& a, const ChannelStatisticsParams& p) {
  const dim3 grid(grid_size(blocks(p.batch * p.channels, kWarps / kWarpsPerPlane)));
  constexpr auto kernel =
      kForward ? forward_rows_kernel<T, kWarpsPerPlane> : backward_rows_kernel<T, kWarpsPerPlane>;
  launch(a, kForward ? "forward_rows" : "backward_rows", grid, dim3(kThreads), 0, kernel, p);
}

template <class T, bool kForward, int kVector>
void launch_channels_last(const Arguments& a, const ChannelStatisticsParams& p) {
  const dim3 grid(grid_size(blocks(p.channels, ChannelTile<T, kVector>::kChannels)),
                  grid_size(p.batch, kGridY));
  constexpr auto kernel = kForward ? forward_channels_last_kernel<T, kVector>
                                   : backward_channels_last_kernel<T, kVector>;
  launch(a, kForward ? "forward_channels_last" : "backward_channels_last", grid, dim3(kThreads), 0,
         kernel, p);
}

// `warps_per_plane` 0 chooses; 1 or 8 (kWarps) asks for that kernel.
template <class T, bool kForward>
void entry(const Arguments& a) {
  const ChannelStatisticsParams p = params_of(a);
  if (a.integer("channels_last") != 0) {
    if (pixels_are_aligned<T>(p)) {
      launch_channels_last<T, kForward, Vector<T>::kElements>(a, p);
    } else {
      launch_channels_last<T, kForward, 1>(a, p);
    }
    return;
  }
  int64_t warps = a.integer("warps_per_plane");
  if (warps == 0) warps = warps_per_plane(p.batch * p.channels, p.plane);
  if (warps == 1) {
    launch_rows<T, kForward, 1>(a, p);
  } else {
    launch_rows<T, kForward, kWarps>(a, p);
  }
}

const Entry kEntries[] = {
    {"channel_statistics_float32", entry<float, true>},
    {"channel_statistics_float16", entry<__half, true>},
    {"channel_statistics_bfloat16", entry<__nv_bfloat16, true>},
    {"channel_statistics_backward_float32", entry<float, false>},
    {"channel_statistics_backward_float16", entry<__half, false>},
    {"channel_statistics_backward_bfloat16", entry<__nv_bfloat16, false>},
};

}  // namespace
}  // namespace ciema
