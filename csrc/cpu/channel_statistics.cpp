// The channel statistics of the stage channel_interaction on the CPU (spec.md 2.1: mu and m):
//
//   mean[b,c] = 1/(HW) sum_s x[b,c,s]   max[b,c] = max_s x[b,c,s]   argmax[b,c] = first s at max
//   grad_x[b,c,s] = grad_mean[b,c]/(HW) + (s == argmax[b,c] ? grad_max[b,c] : 0)
//
// Layouts  rows (planes of neighbouring elements) and channels_last are read where they lie, other
//          strides are made contiguous first.
// Threads  rows: over the B*C planes. channels_last: over B and tiles of channels. No result is
//          shared between threads, so the bits depend neither on their number nor on the tiles.
// Bytes    forward reads x once, and again the block that holds a plane's maximum (from cache);
//          backward writes grad_x once.
#include "channel_statistics.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/checks.h"
#include "../common/layout.h"
#include "elements.h"
#include "isa.h"

namespace ciema::cpu {
namespace {

constexpr int64_t kElementsPerTask = 32768;  // less work than this is not worth a thread
constexpr int64_t kSmallestTile = 64;        // channels; a few cache lines of each pixel
constexpr int64_t kLargestTile = 512;        // channels; running statistics stay in the L1 cache

int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_item));
}

struct Statistics {
  float* mean;
  float* max;
  int64_t* argmax;
};

void rows_forward(const char* x, Element element, const Planes& planes, const Statistics& out) {
  const PlaneFunction run =
      chosen_instruction_set().channel_statistics->plane[static_cast<int>(element)];
  const int64_t size = element_size(element);
  torch::stable::parallel_for(
      0, planes.batch * planes.channels, grain(planes.plane), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t offset = i / planes.channels * planes.stride_b +
                                 i % planes.channels * planes.stride_c;
          run(x + offset * size, planes.plane, out.mean + i, out.max + i, out.argmax + i);
        }
      });
}

void channels_last_forward(const char* x, Element element, const Planes& planes,
                           const Statistics& out) {
  const ChannelsFunction run =
      chosen_instruction_set().channel_statistics->channels[static_cast<int>(element)];
  const int64_t size = element_size(element);
  // Wide tiles read longer runs of memory; narrow ones keep all threads busy when B is small.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles_wanted = (2 * threads + planes.batch - 1) / planes.batch;
  const int64_t even = (planes.channels + tiles_wanted - 1) / tiles_wanted;
  const int64_t rounded = (even + kSmallestTile - 1) / kSmallestTile * kSmallestTile;
  const int64_t tile = std::min(rounded, kLargestTile);
  const int64_t tiles = (planes.channels + tile - 1) / tile;
  torch::stable::parallel_for(
      0, planes.batch * tiles, grain(planes.plane * tile), [&](int64_t begin, int64_t end) {
        double sum[kLargestTile];
        int32_t position[kLargestTile];
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / tiles;
          const int64_t c = i % tiles * tile;
          const int64_t channels = std::min(tile, planes.channels - c);
          const int64_t at = b * planes.channels + c;
          run(x + (b * planes.stride_b + c) * size, planes.plane, planes.stride_s, channels, sum,
              position, out.mean + at, out.max + at, out.argmax + at);
        }
      });
}

struct Gradients {
  const float* mean;
  const float* max;
  const int64_t* argmax;
};

template <class T>
T usual_gradient(const Gradients& grad, int64_t i, int64_t plane) {
  return static_cast<T>(grad.mean[i] / static_cast<float>(plane));
}

template <class T>
T peak_gradient(const Gradients& grad, int64_t i, int64_t plane) {
  return static_cast<T>(grad.mean[i] / static_cast<float>(plane) + grad.max[i]);
}

template <class T>
void rows_backward(const Gradients& grad, int64_t planes, int64_t plane, T* grad_x) {
  torch::stable::parallel_for(0, planes, grain(plane), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::fill_n(grad_x + i * plane, plane, usual_gradient<T>(grad, i, plane));
      grad_x[i * plane + grad.argmax[i]] = peak_gradient<T>(grad, i, plane);
    }
  });
}

template <class T>
void channels_last_backward(const Gradients& grad, int64_t batch, int64_t channels, int64_t plane,
                            T* grad_x) {
  std::vector<T> usual(batch * channels);
  for (int64_t i = 0; i < batch * channels; ++i) usual[i] = usual_gradient<T>(grad, i, plane);
  torch::stable::parallel_for(0, batch * plane, grain(channels), [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      std::memcpy(grad_x + pixel * channels, usual.data() + pixel / plane * channels,
                  channels * sizeof(T));
    }
  });
  for (int64_t i = 0; i < batch * channels; ++i) {
    const int64_t pixel = i / channels * plane + grad.argmax[i];
    grad_x[pixel * channels + i % channels] = peak_gradient<T>(grad, i, plane);
  }
}

template <class T>
void backward(const Gradients& grad, const Tensor& grad_x, MemoryFormat format) {
  T* out = static_cast<T*>(grad_x.mutable_data_ptr());
  const int64_t batch = grad_x.size(0), channels = grad_x.size(1);
  const int64_t plane = grad_x.size(2) * grad_x.size(3);
  if (format == MemoryFormat::ChannelsLast) {
    channels_last_backward<T>(grad, batch, channels, plane, out);
  } else {
    rows_backward<T>(grad, batch * channels, plane, out);
  }
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
    const char* data = static_cast<const char*>(x.const_data_ptr());
    const Statistics out{static_cast<float*>(mean.mutable_data_ptr()),
                         static_cast<float*>(max.mutable_data_ptr()),
                         static_cast<int64_t*>(argmax.mutable_data_ptr())};
    if (planes.layout == Layout::kRows) {
      rows_forward(data, element_of(x), planes, out);
    } else {
      channels_last_forward(data, element_of(x), planes, out);
    }
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
  const Gradients grad{static_cast<const float*>(grad_mean.const_data_ptr()),
                       static_cast<const float*>(grad_max.const_data_ptr()),
                       static_cast<const int64_t*>(argmax.const_data_ptr())};
  const int64_t plane = x.size(2) * x.size(3);
  for (int64_t i = 0; i < x.size(0) * x.size(1); ++i) {
    STD_TORCH_CHECK(grad.argmax[i] >= 0 && grad.argmax[i] < plane, "argmax must lie in [0, ",
                    plane, "), got ", grad.argmax[i]);
  }
  switch (element_of(x)) {
    case Element::kFloat:
      backward<float>(grad, grad_x, format);
      break;
    case Element::kBFloat16:
      backward<torch::headeronly::BFloat16>(grad, grad_x, format);
      break;
    case Element::kHalf:
      backward<torch::headeronly::Half>(grad, grad_x, format);
      break;
  }
  return grad_x;
}

std::string cpu_isa() { return chosen_instruction_set().name; }

std::string cpu_isa_available() { return available_instruction_sets(); }

}  // namespace ciema::cpu
