// Tiny kernels with one bug each (kBug) in the use of the tensor cores' instructions, asynchronous
// copies and arrive_last, and their correct twins. x and out hold float32; blocks have 64 threads.
#include "../../csrc/cuda/fragments.cuh"
#include "../../csrc/cuda/launch.cuh"

namespace {

using namespace ciema;

constexpr int kThreads = 64;
constexpr int kFloats = 4;  // in 16 bytes

__device__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ int block() { return static_cast<int>(blockIdx.x); }

// ---- asynchronous copies ----------------------------------------------------------------------

// out = x by way of shared memory, every thread its own 16 bytes.
template <bool kBug>
__global__ void copy_not_waited_for(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [kThreads * kFloats]);
  const int at = thread() * kFloats;
  ptx::copy_async(tile + at, x + at);
  ptx::copy_async_commit();
  if (!kBug) ptx::copy_async_wait<0>();
  out[thread()] = tile[at];
  if (kBug) ptx::copy_async_wait<0>();
}

template <bool kBug>
__global__ void copy_not_committed(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [kThreads * kFloats]);
  const int at = thread() * kFloats;
  ptx::copy_async(tile + at, x + at);
  if (!kBug) ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  out[thread()] = tile[at];
}

template <bool kBug>
__global__ void copy_under_way_at_the_end(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [kThreads * kFloats]);
  const int at = thread() * kFloats;
  ptx::copy_async(tile + at, x + at);
  ptx::copy_async_commit();
  if (!kBug) ptx::copy_async_wait<0>();
  out[thread()] = x[at];
}

// Two stages of a pipeline: the older of two groups must have landed, not none of them.
template <bool kBug>
__global__ void waits_for_too_few_groups(const float* x, float* out, int) {
  constexpr int kStages = 2, kRounds = 4;
  CIEMA_SHARED(float, tile, [kStages][kThreads * kFloats]);
  const int at = thread() * kFloats;
  ptx::copy_async(tile[0] + at, x + at);
  ptx::copy_async_commit();
  float sum = 0.0f;
  for (int round = 0; round < kRounds; ++round) {
    if (round + 1 < kRounds) ptx::copy_async(tile[(round + 1) % kStages] + at, x + at);
    ptx::copy_async_commit();  // an empty group in the last round: the count goes on
    ptx::copy_async_wait<kBug ? 2 : 1>();
    sum += tile[round % kStages][at];
  }
  ptx::copy_async_wait<0>();
  out[thread()] = sum;
}

template <bool kBug>
__global__ void no_barrier_after_wait(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [kThreads * kFloats]);
  const int at = thread() * kFloats;
  ptx::copy_async(tile + at, x + at);
  ptx::copy_async_commit();
  if (kBug) __syncthreads();  // too early: what lands after it, the others have not waited for
  ptx::copy_async_wait<0>();
  if (!kBug) __syncthreads();
  out[thread()] = tile[(kThreads - 1 - thread()) * kFloats];
}

// The tile is refilled while others still read it.
template <bool kBug>
__global__ void refilled_too_early(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [kThreads * kFloats]);
  const int at = thread() * kFloats;
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    ptx::copy_async(tile + at, x + at);
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    __syncthreads();
    sum += tile[(kThreads - 1 - thread()) * kFloats];
    if (!kBug) __syncthreads();
  }
  out[thread()] = sum;
}

template <bool kBug>
__global__ void overwritten_under_way(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [kThreads * kFloats]);
  const int at = thread() * kFloats;
  ptx::copy_async(tile + at, x + at);
  ptx::copy_async_commit();
  if (!kBug) ptx::copy_async_wait<0>();
  tile[at] = 1.0f;
  if (kBug) ptx::copy_async_wait<0>();
  out[thread()] = tile[at];
}

// x has n elements, a multiple of 4; what lies beyond counts as zero.
template <bool kBug>
__global__ void copy_past_end(const float* x, float* out, int n) {
  CIEMA_SHARED(float, tile, [kThreads * kFloats]);
  const int at = thread() * kFloats;
  ptx::copy_async(tile + at, x + at, kBug || at < n);
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  out[thread()] = tile[at + 3];
}

template <bool kBug>
__global__ void copy_from_misaligned(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [kThreads * kFloats]);
  const int at = thread() * kFloats;
  ptx::copy_async(tile + at, x + at + (kBug ? 1 : 0));
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  out[thread()] = tile[at];
}

template <bool kBug>
__global__ void copy_to_global(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [kThreads * kFloats]);
  const int at = thread() * kFloats;
  ptx::copy_async(kBug ? out + at : tile + at, x + at);
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  for (int i = 0; i < kFloats && !kBug; ++i) out[at + i] = tile[at + i];
}

// ---- matrices ---------------------------------------------------------------------------------

// Copies 8 columns of 16 floats to shared memory, and loads them as matrices of 8 rows.
template <bool kBug>
__global__ void misaligned_row(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [16 * 9 + 4]);
  constexpr int kPitch = kBug ? 9 : 8;
  if (thread() < 16) {
    for (int i = 0; i < 8; ++i) tile[thread() * kPitch + i] = x[thread() * 8 + i];
  }
  __syncthreads();
  Fragments<float, Precision::kTf32>::A a;
  Fragments<float, Precision::kTf32>::load_a(a, tile, kPitch);
  out[thread()] = __uint_as_float(a.bits[0][0]);
}

template <bool kBug>
__global__ void matrix_in_global_memory(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [16 * 8]);
  if (thread() < 16) {
    for (int i = 0; i < 8; ++i) tile[thread() * 8 + i] = x[thread() * 8 + i];
  }
  __syncthreads();
  Fragments<float, Precision::kTf32>::A a;
  Fragments<float, Precision::kTf32>::load_a(a, kBug ? x : tile, 8);
  out[thread()] = __uint_as_float(a.bits[0][0]);
}

template <bool kBug>
__global__ void matrix_without_barrier(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [16 * 8]);
  if (thread() < 16) {
    for (int i = 0; i < 8; ++i) tile[thread() * 8 + i] = x[thread() * 8 + i];
  }
  if (!kBug) __syncthreads();  // ldmatrix brings the lanes together, but orders no memory
  Fragments<float, Precision::kTf32>::A a;
  Fragments<float, Precision::kTf32>::load_a(a, tile, 8);
  out[thread()] = __uint_as_float(a.bits[0][0]);
}

template <bool kBug>
__global__ void matrix_not_filled(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [16 * 8]);
  if (thread() < (kBug ? 15 : 16)) {
    for (int i = 0; i < 8; ++i) tile[thread() * 8 + i] = x[thread() * 8 + i];
  }
  __syncthreads();
  Fragments<float, Precision::kTf32>::A a;
  Fragments<float, Precision::kTf32>::load_a(a, tile, 8);
  out[thread()] = __uint_as_float(a.bits[0][0]);
}

template <bool kBug>
__global__ void product_in_branch(const float* x, float* out, int n) {
  float d[4] = {};
  const uint32_t a[4] = {__float_as_uint(x[thread()]), 0, 0, 0};
  const uint32_t b[2] = {__float_as_uint(1.0f), 0};
  // Whole warps may stay away, parts of them may not.
  if (thread() < (kBug ? n : kWarp)) ptx::multiply_add_tf32(d, a, b);
  out[thread()] = d[0];
}

// The lanes of one warp in two products.
template <bool kBug>
__global__ void products_in_branches(const float* x, float* out, int n) {
  float d[4] = {};
  const uint32_t a[4] = {__float_as_uint(x[thread()]), 0, 0, 0};
  const uint32_t b[2] = {__float_as_uint(1.0f), 0};
  if (thread() < (kBug ? n : kWarp)) {
    ptx::multiply_add_tf32(d, a, b);
  } else {
    ptx::multiply_add_tf32(d, a, b);
  }
  out[thread()] = d[0];
}

// ---- the last block ---------------------------------------------------------------------------

// out[0] = sum of x: a partial sum for every block in `partial`, added up by the last one.
enum class Arrival { kCorrect, kNobodyWaits, kBeforeWriting, kPlainCounter, kTooMany, kByOneWarp };

template <Arrival kArrival>
__global__ void __launch_bounds__(kThreads)
    last_block(const float* x, float* out, float* partial, int* counter) {
  CIEMA_SHARED(float, values, [kThreads]);
  CIEMA_SHARED(int, ticket, [1]);
  const int blocks = static_cast<int>(gridDim.x);
  values[thread()] = x[block() * kThreads + thread()];
  __syncthreads();
  bool last = kArrival == Arrival::kNobodyWaits && block() == blocks - 1;
  if (kArrival == Arrival::kBeforeWriting) last = arrive_last(counter, blocks);
  if (thread() == 0) {
    float sum = 0.0f;
    for (int i = 0; i < kThreads; ++i) sum += values[i];
    partial[block()] = sum;
  }
  if (kArrival == Arrival::kCorrect) last = arrive_last(counter, blocks);
  if (kArrival == Arrival::kTooMany) last = arrive_last(counter, blocks + 1);
  if (kArrival == Arrival::kByOneWarp && thread() < kWarp) last = arrive_last(counter, blocks);
  __syncthreads();  // so that only other blocks' results are read too early
  if (kArrival == Arrival::kPlainCounter) {
    if (thread() == 0) ticket[0] = atomicAdd(counter, 1);
    __syncthreads();
    last = ticket[0] == blocks - 1;
  }
  if (!last) return;
  values[thread()] = thread() < blocks ? partial[thread()] : 0.0f;
  __syncthreads();
  if (thread() != 0) return;
  float sum = 0.0f;
  for (int i = 0; i < kThreads; ++i) sum += values[i];
  out[0] = sum;
}

template <Arrival kArrival>
void last_block_entry(const Arguments& a) {
  for (int64_t i = 0; i < a.integer("launches"); ++i) {
    launch(a, "last_block", dim3{static_cast<unsigned>(a.integer("blocks"))}, dim3{kThreads}, 0,
           last_block<kArrival>, a.pointer<float>("x"), a.pointer<float>("out"),
           a.pointer<float>("partial"), a.pointer<int>("counter"));
  }
}

const Entry kLastBlock[] = {
    {"last_block_correct", last_block_entry<Arrival::kCorrect>},
    {"last_block_nobody_waits", last_block_entry<Arrival::kNobodyWaits>},
    {"last_block_before_writing", last_block_entry<Arrival::kBeforeWriting>},
    {"last_block_plain_counter", last_block_entry<Arrival::kPlainCounter>},
    {"last_block_too_many", last_block_entry<Arrival::kTooMany>},
    {"last_block_by_one_warp", last_block_entry<Arrival::kByOneWarp>},
};

template <void (*kKernel)(const float*, float*, int)>
void entry(const Arguments& a) {
  launch(a, "planted", dim3{1}, dim3{static_cast<unsigned>(a.integer("threads"))}, 0, kKernel,
         a.pointer<float>("x"), a.pointer<float>("out"), static_cast<int>(a.integer("n")));
}

#define PLANTED(kernel)                                  \
  const Entry kernel##_entries[] = {                     \
      {#kernel "_bug", entry<kernel<true>>},             \
      {#kernel "_correct", entry<kernel<false>>},        \
  }

PLANTED(copy_not_waited_for);
PLANTED(copy_not_committed);
PLANTED(copy_under_way_at_the_end);
PLANTED(waits_for_too_few_groups);
PLANTED(no_barrier_after_wait);
PLANTED(refilled_too_early);
PLANTED(overwritten_under_way);
PLANTED(copy_past_end);
PLANTED(copy_from_misaligned);
PLANTED(copy_to_global);
PLANTED(misaligned_row);
PLANTED(matrix_in_global_memory);
PLANTED(matrix_without_barrier);
PLANTED(matrix_not_filled);
PLANTED(product_in_branch);
PLANTED(products_in_branches);

}  // namespace
