// The second stage of sums over blocks: rows of partial results, added in a fixed order.
//
//   out[i] = sum_r partials[r, first + i]        partials (rows, columns) float32
//
// Partials of a convolution stand tap after tap, where the parameter has a weight's taps together.
//
// Grid        x: tiles of 32 neighbouring outputs, y: jobs; a launch serves all parameters of a
//             stage. Eight warps of a block each take a contiguous share of the rows.
// Bytes       reads the partials of the jobs once, writes every output once, in its own dtype.
// Accuracy    float32, a share's rows in order, then the shares in order: no atomics.
#pragma once

#include "../common/device.cuh"

namespace ciema::parameter_sums {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kJobs = 16;

enum class Kind : int { kFloat32, kFloat16, kBfloat16 };

struct Job {
  const float* partials;
  void* out;
  int64_t rows, columns, first, size, taps;
  Kind kind;
};

struct Params {
  Job job[kJobs];
};

__device__ __forceinline__ void store(const Job& job, int64_t at, float value) {
  if (job.kind == Kind::kFloat16) {
    static_cast<__half*>(job.out)[at] = from_float<__half>(value);
  } else if (job.kind == Kind::kBfloat16) {
    static_cast<__nv_bfloat16*>(job.out)[at] = from_float<__nv_bfloat16>(value);
  } else {
    static_cast<float*>(job.out)[at] = value;
  }
}

__global__ void __launch_bounds__(kThreads) sum_kernel(Params params) {
  const Job job = params.job[blockIdx.y];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  if (static_cast<int64_t>(blockIdx.x) * kWarp >= job.size) return;
  const int64_t share = (job.rows + kWarps - 1) / kWarps;
  const int64_t begin = warp * share;
  const int64_t end = begin + share < job.rows ? begin + share : job.rows;
  float sum = 0.0f;
  if (at < job.size) {
    const float* source = job.partials + job.first + at;
#pragma unroll 4
    for (int64_t row = begin; row < end; ++row) sum += source[row * job.columns];
  }
  CIEMA_SHARED(float, sums, [kWarps][kWarp]);
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || at >= job.size) return;
  for (int other = 1; other < kWarps; ++other) sum += sums[other][lane];
  const int64_t weights = job.size / job.taps;
  store(job, at % weights * job.taps + at / weights, sum);
}

}  // namespace ciema::parameter_sums
