// The kernels of csrc/cuda/channel_statistics.cuh as entries of the emulator, with the choices of
// kernel and grid that the launchers of csrc/cuda/channel_interaction.cu make.
#include "../../cuda/channel_statistics.cuh"

#include "../launch.h"

namespace {

using namespace ciema;
using namespace ciema::channel_statistics;
using emulator::Arguments;

ChannelStatisticsParams params_of(const Arguments& a) {
  ChannelStatisticsParams p{};
  p.x = a.pointer<const void>("x");
  p.grad_x = a.pointer<void>("grad_x");
  p.mean = a.pointer<float>("mean");
  p.max = a.pointer<float>("max");
  p.argmax = a.pointer<int64_t>("argmax");
  p.grad_mean = a.pointer<const float>("grad_mean");
  p.grad_max = a.pointer<const float>("grad_max");
  p.saved_argmax = a.pointer<const int64_t>("saved_argmax");
  p.batch = a.integer("batch");
  p.channels = a.integer("channels");
  p.plane = a.integer("plane");
  p.stride_b = a.integer("stride_b");
  p.stride_c = a.integer("stride_c");
  p.stride_s = a.integer("stride_s");
  return p;
}

template <class T, bool kForward, int kWarpsPerPlane>
void launch_rows(const ChannelStatisticsParams& p) {
  const dim3 blocks{static_cast<unsigned>(rows_blocks(p.batch * p.channels, kWarpsPerPlane))};
  constexpr auto kernel =
      kForward ? forward_rows_kernel<T, kWarpsPerPlane> : backward_rows_kernel<T, kWarpsPerPlane>;
  emulator::launch(kForward ? "forward_rows" : "backward_rows", blocks, dim3{kThreads}, 0, kernel,
                   p);
}

template <class T, bool kForward, int kVector>
void launch_channels_last(const ChannelStatisticsParams& p) {
  const dim3 blocks{static_cast<unsigned>(channels_last_blocks<T, kVector>(p.channels)),
                    static_cast<unsigned>(p.batch)};
  constexpr auto kernel = kForward ? forward_channels_last_kernel<T, kVector>
                                   : backward_channels_last_kernel<T, kVector>;
  emulator::launch(kForward ? "forward_channels_last" : "backward_channels_last", blocks,
                   dim3{kThreads}, 0, kernel, p);
}

// `warps_per_plane` 0 chooses as the launcher does; 1 or 8 (kWarps) asks for that kernel.
template <class T, bool kForward>
void entry(const Arguments& a) {
  const ChannelStatisticsParams p = params_of(a);
  if (a.integer("channels_last") != 0) {
    if (pixels_are_aligned<T>(p)) {
      launch_channels_last<T, kForward, Vector<T>::kElements>(p);
    } else {
      launch_channels_last<T, kForward, 1>(p);
    }
    return;
  }
  int64_t warps = a.integer("warps_per_plane");
  if (warps == 0) warps = warps_per_plane(p.batch * p.channels, p.plane);
  if (warps == 1) {
    launch_rows<T, kForward, 1>(p);
  } else {
    launch_rows<T, kForward, kWarps>(p);
  }
}

const emulator::Entry kEntries[] = {
    {"channel_statistics_float32", entry<float, true>},
    {"channel_statistics_float16", entry<__half, true>},
    {"channel_statistics_bfloat16", entry<__nv_bfloat16, true>},
    {"channel_statistics_backward_float32", entry<float, false>},
    {"channel_statistics_backward_float16", entry<__half, false>},
    {"channel_statistics_backward_bfloat16", entry<__nv_bfloat16, false>},
};

}  // namespace
