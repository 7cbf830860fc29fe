// A map (B, C, H, W) as B*G slabs of C/G channels, shared out to threads with scratch for each.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../common/layout.h"
#include "huge_pages.h"
#include "simd/slab.h"

namespace ciema::cpu {

inline void check_slabs(const Tensor& e, int64_t groups) {
  STD_TORCH_CHECK(e.dim() == 4, "e must have 4 dimensions (B, C, H, W), got ", e.dim());
  const ScalarType dtype = e.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "e must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(e.size(1) > 0 && e.size(2) > 0 && e.size(3) > 0,
                  "e has no channels or no pixels");
  STD_TORCH_CHECK(groups > 0 && e.size(1) % groups == 0, "groups = ", groups,
                  " does not divide the ", e.size(1), " channels");
}

// Kernels read rows of neighbouring pixels or pixels of neighbouring channels.
inline Tensor readable_slabs(const Tensor& e) {
  const bool rows = e.stride(3) == 1 || e.size(3) == 1;
  const bool pixels = e.stride(1) == 1 || e.size(1) == 1;
  return rows || pixels ? e : torch::stable::contiguous(e);
}

struct Slabs {
  const char* start;
  Element element;
  int64_t element_size, groups, channels, count;
  int64_t stride_b, stride_c, stride_h, stride_w;  // stride_w or stride_c is 1

  Slabs(const Tensor& e, int64_t g)  // of readable_slabs
      : start(static_cast<const char*>(e.const_data_ptr())),
        element(e.scalar_type() == ScalarType::Float      ? Element::kFloat
                : e.scalar_type() == ScalarType::BFloat16 ? Element::kBFloat16
                                                          : Element::kHalf),
        element_size(element == Element::kFloat ? 4 : 2),
        groups(g),
        channels(e.size(1) / g),
        count(e.size(0) * g),
        stride_b(e.stride(0)),
        stride_c(e.size(1) == 1 ? 1 : e.stride(1)),
        stride_h(e.stride(2)),
        stride_w(e.size(3) == 1 && stride_c != 1 ? 1 : e.stride(3)) {}

  SlabMap map(int64_t slab) const {
    const int64_t offset = slab / groups * stride_b + slab % groups * channels * stride_c;
    return {start + offset * element_size, element, stride_c, stride_h, stride_w};
  }
};

// A small tensor that kernels read as an array.
inline const float* float_values(const Tensor& values, const char* name, int64_t numel) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.is_contiguous(), name,
                  " must be float32 and contiguous");
  STD_TORCH_CHECK(values.numel() == numel, name, " must have ", numel, " values, got ",
                  values.numel());
  return static_cast<const float*>(values.const_data_ptr());
}

inline Tensor empty_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, like.device());
}

inline float* data_of(Tensor& floats) { return static_cast<float*>(floats.mutable_data_ptr()); }

// sums[i] = sum over the tasks, in their order and in float64, of share[task][first + i].
inline void add_shares(const float* share, int64_t tasks, int64_t stride, int64_t first,
                       int64_t count, float* sums) {
  torch::stable::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0.0;
      for (int64_t task = 0; task < tasks; ++task) sum += share[task * stride + first + i];
      sums[i] = static_cast<float>(sum);
    }
  });
}

constexpr int64_t kMostScratch = int64_t{1} << 30;  // floats; fewer threads run rather than more

// run(first, last, scratch) for runs of slabs, one a thread; scratch: `floats` floats, one run's.
template <class Run>
void for_each_slab(int64_t slabs, int64_t floats, const Run& run) {
  const int64_t fitting = std::max<int64_t>(1, kMostScratch / floats);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), fitting);
  const int64_t runs = std::max<int64_t>(1, std::min(slabs, threads));
  const int64_t stride = (floats + 15) / 16 * 16;
  Tensor scratch = torch::stable::empty({runs * stride}, ScalarType::Float);
  float* const memory = data_of(scratch);
  ask_for_huge_pages(memory, runs * stride * static_cast<int64_t>(sizeof(float)));
  torch::stable::parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run(i * slabs / runs, (i + 1) * slabs / runs, memory + i * stride);
    }
  });
}

// run(slab, scratch) with scratch that every slab finds again in the next call.
template <class Run>
void for_each_kept_slab(int64_t slabs, Tensor& scratch, const Run& run) {
  float* const memory = data_of(scratch);
  const int64_t stride = scratch.size(1);
  torch::stable::parallel_for(0, slabs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slab = begin; slab < end; ++slab) run(slab, memory + slab * stride);
  });
}

}  // namespace ciema::cpu
