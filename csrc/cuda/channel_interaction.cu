// Launchers of the stage channel_interaction: checks, outputs, Params, grid, current stream. The
// kernels and what they compute are in channel_statistics.cuh. Nothing here synchronises.
#include "channel_interaction.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "../common/checks.h"
#include "../common/layout.h"
#include "channel_statistics.cuh"

namespace ciema::cuda {
namespace {

using namespace channel_statistics;

enum class Direction { kForward, kBackward };

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Blocks along a grid dimension, refused past its limit.
unsigned grid_size(int64_t blocks, int64_t limit, const char* what) {
  STD_TORCH_CHECK(blocks <= limit, what, " is too large for one launch: ", blocks,
                  " blocks, limit ", limit);
  return static_cast<unsigned>(blocks);
}

constexpr int64_t kGridX = 2147483647;
constexpr int64_t kGridY = 65535;

template <class T, Direction kDirection>
void launch_rows(const ChannelStatisticsParams& p, cudaStream_t stream) {
  const int64_t planes = p.batch * p.channels;
  const int warps = warps_per_plane(planes, p.plane);
  const unsigned blocks = grid_size(rows_blocks(planes, warps), kGridX, "B*C");
  if constexpr (kDirection == Direction::kForward) {
    if (warps == 1) {
      forward_rows_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(p);
    } else {
      forward_rows_kernel<T, kWarps><<<blocks, kThreads, 0, stream>>>(p);
    }
  } else {
    if (warps == 1) {
      backward_rows_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(p);
    } else {
      backward_rows_kernel<T, kWarps><<<blocks, kThreads, 0, stream>>>(p);
    }
  }
}

template <class T, Direction kDirection, int kVector>
void launch_channels_last(const ChannelStatisticsParams& p, cudaStream_t stream) {
  const dim3 blocks(grid_size(channels_last_blocks<T, kVector>(p.channels), kGridX, "C"),
                    grid_size(p.batch, kGridY, "B"));
  if constexpr (kDirection == Direction::kForward) {
    forward_channels_last_kernel<T, kVector><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    backward_channels_last_kernel<T, kVector><<<blocks, kThreads, 0, stream>>>(p);
  }
}

template <class T, Direction kDirection>
void launch(const ChannelStatisticsParams& p, Layout layout, cudaStream_t stream) {
  constexpr int kVector = Vector<T>::kElements;
  if (layout == Layout::kRows) {
    launch_rows<T, kDirection>(p, stream);
  } else if (pixels_are_aligned<T>(p)) {
    launch_channels_last<T, kDirection, kVector>(p, stream);
  } else {
    launch_channels_last<T, kDirection, 1>(p, stream);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <Direction kDirection>
void launch_for(ScalarType dtype, const ChannelStatisticsParams& p, Layout layout,
                const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  if (dtype == ScalarType::Float) {
    launch<float, kDirection>(p, layout, stream);
  } else if (dtype == ScalarType::BFloat16) {
    launch<__nv_bfloat16, kDirection>(p, layout, stream);
  } else {
    launch<__half, kDirection>(p, layout, stream);
  }
}

ChannelStatisticsParams params_of(const Planes& planes) {
  ChannelStatisticsParams p{};
  p.batch = planes.batch;
  p.channels = planes.channels;
  p.plane = planes.plane;
  p.stride_b = planes.stride_b;
  p.stride_c = planes.stride_c;
  p.stride_s = planes.stride_s;
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> channel_statistics(Tensor x) {
  check_x(x);
  Tensor mean = empty_per_channel(x, ScalarType::Float);
  Tensor max = empty_per_channel(x, ScalarType::Float);
  Tensor argmax = empty_per_channel(x, ScalarType::Long);
  if (x.numel() > 0) {
    if (!readable_in_place(x)) x = torch::stable::contiguous(x);
    const Planes planes = planes_of(x);
    ChannelStatisticsParams p = params_of(planes);
    p.x = x.const_data_ptr();
    p.mean = static_cast<float*>(mean.mutable_data_ptr());
    p.max = static_cast<float*>(max.mutable_data_ptr());
    p.argmax = static_cast<int64_t*>(argmax.mutable_data_ptr());
    launch_for<Direction::kForward>(x.scalar_type(), p, planes.layout, x);
  }
  return {mean, max, argmax};
}

Tensor channel_statistics_backward(Tensor grad_mean, Tensor grad_max, Tensor argmax, Tensor x) {
  check_backward(grad_mean, grad_max, argmax, x);
  const MemoryFormat format = memory_format_of(x);
  Tensor grad_x = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(),
                                       std::nullopt, format);
  if (x.numel() == 0) return grad_x;
  grad_mean = torch::stable::contiguous(grad_mean);
  grad_max = torch::stable::contiguous(grad_max);
  argmax = torch::stable::contiguous(argmax);
  const Planes planes = planes_of(grad_x);
  ChannelStatisticsParams p = params_of(planes);
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_mean = static_cast<const float*>(grad_mean.const_data_ptr());
  p.grad_max = static_cast<const float*>(grad_max.const_data_ptr());
  p.saved_argmax = static_cast<const int64_t*>(argmax.const_data_ptr());
  launch_for<Direction::kBackward>(x.scalar_type(), p, planes.layout, x);
  return grad_x;
}

}  // namespace ciema::cuda
