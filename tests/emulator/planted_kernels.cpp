// Tiny kernels with one bug each (kBug) and their correct twins: what the checkers must find, and
// where they must stay silent. Every entry takes buffers x, out and a count n.
#include "../../csrc/cuda/launch.cuh"

namespace {

using namespace ciema;

constexpr int kThreads = 64;

__device__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ int global_thread() { return static_cast<int>(blockIdx.x) * kThreads + thread(); }

// ---- barriers and races -----------------------------------------------------------------------

template <bool kBug>
__global__ void missing_barrier(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [kThreads]);
  tile[thread()] = x[thread()];
  if (!kBug) __syncthreads();
  out[thread()] = tile[kThreads - 1 - thread()];
}

// The tile is refilled in every round: without the second barrier too early.
template <bool kBug>
__global__ void missing_second_barrier(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [kThreads]);
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    tile[thread()] = x[thread()] + static_cast<float>(round);
    __syncthreads();
    sum += tile[kThreads - 1 - thread()];
    if (!kBug) __syncthreads();
  }
  out[thread()] = sum;
}

template <bool kBug>
__global__ void missing_syncwarp(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [kThreads]);
  tile[thread()] = x[thread()];
  if (kBug) {
    __any_sync(kFullMask, 1);  // brings the lanes together, but orders no memory
  } else {
    __syncwarp();
  }
  out[thread()] = tile[thread() ^ 1];
}

template <bool kBug>
__global__ void blocks_add_plainly(const float* x, float* out, int n) {
  if (global_thread() >= n) return;
  if (kBug) {
    out[0] += x[global_thread()];
  } else {
    atomicAdd(out, x[global_thread()]);
  }
}

template <bool kBug>
__global__ void atomic_beside_plain(const int* x, int* out, int) {
  CIEMA_SHARED(int, count, [1]);
  if (thread() == 0) count[0] = 0;
  __syncthreads();
  atomicMax(count, x[thread()]);
  if (!kBug) __syncthreads();
  if (thread() == kThreads - 1) out[0] = count[0];
}

template <bool kBug>
__global__ void barrier_in_branches(const float* x, float* out, int) {
  CIEMA_SHARED(float, tile, [kThreads]);
  tile[thread()] = x[thread()];
  if (kBug && thread() < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (!kBug) __syncthreads();
  out[thread()] = tile[kThreads - 1 - thread()];
}

template <bool kBug>
__global__ void exit_before_barrier(const float* x, float* out, int n) {
  CIEMA_SHARED(float, tile, [kThreads]);
  if (kBug && thread() >= n) return;
  if (thread() < n) tile[thread()] = x[thread()];
  __syncthreads();
  if (thread() < n) out[thread()] = tile[n - 1 - thread()];
}

template <bool kBug>
__global__ void shuffle_in_branch(const float* x, float* out, int) {
  float value = x[thread()];
  if (!kBug || thread() % kWarp < 16) value += __shfl_xor_sync(kFullMask, value, 1);
  __syncthreads();
  out[thread()] = value;
}

template <bool kBug>
__global__ void shuffle_from_absent_lane(const float* x, float* out, int) {
  float value = x[thread()];
  if (thread() % kWarp < 16) value = __shfl_sync(0xffffu, value, kBug ? 20 : 3);
  out[thread()] = value;
}

template <bool kBug>
__global__ void mask_without_caller(const float* x, float* out, int) {
  float value = x[thread()];
  value += __shfl_xor_sync(kBug && thread() % kWarp >= 16 ? 0xffffu : kFullMask, value, 1);
  out[thread()] = value;
}

// ---- memory -----------------------------------------------------------------------------------

template <bool kBug>
__global__ void read_past_end(const float* x, float* out, int n) {
  const int i = global_thread();
  if (i < n) out[i] = x[i] + (kBug || i + 1 < n ? x[i + 1] : 0.0f);
}

template <bool kBug>
__global__ void write_past_end(const float* x, float* out, int n) {
  const int i = global_thread();
  if (kBug || i < n) out[i] = i < n ? x[i] : 0.0f;
}

template <bool kBug>
__global__ void null_pointer(const float* x, float* out, int n) {
  const int i = global_thread();
  const float* source = kBug && i == 5 ? nullptr : x;
  if (i < n) out[i] = source[i];
}

template <bool kBug>
__global__ void misaligned_vector(const float* x, float* out, int n) {
  const int at = thread() * 4;
  if (at + 5 > n) return;
  store_vector(out + at, load_vector<Vector<float>>(x + at + (kBug ? 1 : 0)));
}

template <bool kBug>
__global__ void uninitialised_shared(const float* x, float* out, int n) {
  CIEMA_SHARED(float, tile, [kThreads]);
  if (thread() < n) tile[thread()] = x[thread()];
  if (!kBug && thread() >= n) tile[thread()] = 0.0f;
  __syncthreads();
  if (thread() < n) out[thread()] = tile[kThreads - 1 - thread()];
}

template <bool kBug>
__global__ void uninitialised_output(const float* x, float* out, int n) {
  const int i = global_thread();
  if (i >= n) return;
  if (!kBug) out[i] = 0.0f;
  out[i] += x[i];
}

template <bool kBug>
__global__ void unwritten_tail(const float* x, float* out, int n) {
  const int i = global_thread();
  if (i < (kBug ? n / 4 * 4 : n)) out[i] = x[i];
}

template <bool kBug>
__global__ void written_input(const float* x, float* out, int n) {
  const int i = global_thread();
  if (i >= n) return;
  out[i] = x[i];
  if (kBug) const_cast<float*>(x)[i] = 0.0f;
}

template <bool kBug>
__global__ void shared_index(const float* x, float* out, int) {
  CIEMA_SHARED(float, sums, [kThreads / kWarp]);
  const int warp = thread() / kWarp;
  if (thread() % kWarp == 0) sums[warp + (kBug ? 1 : 0)] = x[thread()];
  __syncthreads();
  out[thread()] = sums[warp];
}

template <bool kBug>
__global__ void dynamic_shared_past_end(const float* x, float* out, int) {
  CIEMA_DYNAMIC_SHARED(float, tile);  // kThreads floats
  tile[thread() + (kBug ? 1 : 0)] = x[thread()];
  __syncthreads();
  out[thread()] = tile[thread() + (kBug ? 1 : 0)];
}

// x is a view with pitch n + 1; the element between two rows belongs to nobody.
template <bool kBug>
__global__ void wrong_pitch(const float* x, float* out, int n) {
  for (int row = 0; row < 2; ++row) {
    if (thread() < n) out[row * n + thread()] = x[row * (kBug ? n : n + 1) + thread()];
  }
}

// A pointer into the registers of another thread: nonsense on a GPU, where it names one's own.
template <bool kBug>
__global__ void foreign_local_memory(const float* x, float* out, int) {
  CIEMA_SHARED(const float*, where, [kThreads]);
  float mine = x[thread()];
  where[thread()] = &mine;
  __syncthreads();
  out[thread()] = *where[kBug ? thread() ^ 1 : thread()];
  __syncthreads();
}

constexpr float kTable[8] = {1, 2, 3, 4, 5, 6, 7, 8};

template <bool kBug>
__global__ void constant_table(const int* x, int* out, int n) {
  const int i = thread();
  if (i < n) out[i] = static_cast<int>(kTable[kBug ? x[i] : x[i] % 8]);
}

template <bool kBug>
__global__ void bytes_in_shared(const float* x, float* out, int) {
  using Flag = std::conditional_t<kBug, uint8_t, uint16_t>;
  CIEMA_SHARED(Flag, flags, [kThreads]);
  flags[thread()] = x[thread()] > 0.0f;
  __syncthreads();
  out[thread()] = static_cast<float>(flags[thread() ^ 1]);
}

// ---- traffic ----------------------------------------------------------------------------------

template <bool kBug>
__global__ void strided_loads(const float* x, float* out, int) {
  out[thread()] = x[kBug ? thread() * 8 % 512 : thread()];
}

template <bool kBug>
__global__ void bank_conflicts(const float* x, float* out, int) {
  constexpr int kPitch = kBug ? kWarp : kWarp + 1;
  CIEMA_SHARED(float, tile, [kWarp][kPitch]);
  if (thread() < kWarp) {
    for (int row = 0; row < kWarp; ++row) tile[row][thread()] = x[thread()];
    __syncwarp();
    float sum = 0.0f;
    for (int column = 0; column < kWarp; ++column) sum += tile[thread()][column];
    out[thread()] = sum;
  }
}

template <bool kBug>
__global__ void vector_loads(const float* x, float* out, int) {
  if (kBug) {
    for (int e = 0; e < 4; ++e) out[thread() * 4 + e] = x[thread() * 4 + e];
  } else {
    store_vector(out + thread() * 4, load_vector<Vector<float>>(x + thread() * 4));
  }
}

// ---- what the emulator promises about CUDA's own semantics --------------------------------------

// Row by row in out: __shfl_sync, _up_, _down_, _xor_, then ballot, any and all.
__global__ void warp_operations(const int* x, int* out, int width) {
  const int value = x[thread()];
  int* row = out + thread();
  row[0 * kWarp] = __shfl_sync(kFullMask, value, 5, width);
  row[1 * kWarp] = __shfl_up_sync(kFullMask, value, 3, width);
  row[2 * kWarp] = __shfl_down_sync(kFullMask, value, 3, width);
  row[3 * kWarp] = __shfl_xor_sync(kFullMask, value, 6, width);
  row[4 * kWarp] = static_cast<int>(__ballot_sync(kFullMask, value % 3 == 0));
  row[5 * kWarp] = __any_sync(kFullMask, value == 17);
  row[6 * kWarp] = __all_sync(kFullMask, value != 17);
}

// Row by row in out: mathematical functions of x.
__global__ void functions(const float* x, float* out, int) {
  const float value = x[thread()];
  float* row = out + thread();
  row[0 * kWarp] = expf(value);
  row[1 * kWarp] = exp2f(value);
  row[2 * kWarp] = tanhf(value);
  row[3 * kWarp] = sqrtf(fabsf(value));
  row[4 * kWarp] = rsqrtf(fabsf(value));
  row[5 * kWarp] = fmaf(value, value, 1.0f);
  row[6 * kWarp] = fminf(value, 0.5f);
  row[7 * kWarp] = fmaxf(value, 0.5f);
  row[8 * kWarp] = __int_as_float(__float_as_int(value) ^ 1 << 31);
  row[9 * kWarp] = static_cast<float>(min(max(thread(), 3), 9));
}

// The order in which threads run, as tickets; with a partial last warp.
__global__ void tickets(int*, int* out, int) {
  CIEMA_SHARED(int, next, [1]);
  if (thread() == 0) next[0] = 0;
  __syncthreads();
  out[thread()] = atomicAdd(next, 1);
  __shfl_xor_sync(kFullMask, 0, 1);
}

const ciema::Entry kSemantics[] = {
    {"warp_operations",
     [](const ciema::Arguments& a) {
       ciema::launch(a, "warp_operations", dim3{1}, dim3{kWarp}, 0, warp_operations,
                     a.pointer<int>("x"), a.pointer<int>("out"),
                     static_cast<int>(a.integer("width")));
     }},
    {"functions",
     [](const ciema::Arguments& a) {
       ciema::launch(a, "functions", dim3{1}, dim3{kWarp}, 0, functions, a.pointer<float>("x"),
                     a.pointer<float>("out"), 0);
     }},
    {"tickets",
     [](const ciema::Arguments& a) {
       ciema::launch(a, "tickets", dim3{1}, dim3{static_cast<unsigned>(a.integer("threads"))}, 0,
                     tickets, nullptr, a.pointer<int>("out"), 0);
     }},
    {"convert",
     [](const ciema::Arguments& a) {  // on the host: every pattern is too many to launch
       for (int64_t i = 0; i < a.integer("n"); ++i) {
         const float value = a.pointer<float>("x")[i];
         a.pointer<__half>("half")[i] = __float2half_rn(value);
         a.pointer<__nv_bfloat16>("bfloat16")[i] = __float2bfloat16_rn(value);
         a.pointer<float>("from_half")[i] = __half2float(__float2half_rn(value));
         a.pointer<float>("from_bfloat16")[i] = __bfloat162float(__float2bfloat16_rn(value));
       }
     }},
};

#define PLANTED(kernel, type, shared_bytes)                                                       \
  const ciema::Entry kernel##_entries[] = {                                                       \
      {#kernel "_bug",                                                                            \
       [](const ciema::Arguments& a) {                                                            \
         ciema::launch(a, #kernel, dim3{static_cast<unsigned>(a.integer("blocks"))},              \
                       dim3{kThreads}, shared_bytes, kernel<true>, a.pointer<type>("x"),          \
                       a.pointer<type>("out"), static_cast<int>(a.integer("n")));                 \
       }},                                                                                        \
      {#kernel "_correct", [](const ciema::Arguments& a) {                                        \
         ciema::launch(a, #kernel, dim3{static_cast<unsigned>(a.integer("blocks"))},              \
                       dim3{kThreads}, shared_bytes, kernel<false>, a.pointer<type>("x"),         \
                       a.pointer<type>("out"), static_cast<int>(a.integer("n")));                 \
       }}}

PLANTED(missing_barrier, float, 0);
PLANTED(missing_second_barrier, float, 0);
PLANTED(missing_syncwarp, float, 0);
PLANTED(blocks_add_plainly, float, 0);
PLANTED(atomic_beside_plain, int, 0);
PLANTED(barrier_in_branches, float, 0);
PLANTED(exit_before_barrier, float, 0);
PLANTED(shuffle_in_branch, float, 0);
PLANTED(shuffle_from_absent_lane, float, 0);
PLANTED(mask_without_caller, float, 0);
PLANTED(read_past_end, float, 0);
PLANTED(write_past_end, float, 0);
PLANTED(null_pointer, float, 0);
PLANTED(misaligned_vector, float, 0);
PLANTED(uninitialised_shared, float, 0);
PLANTED(uninitialised_output, float, 0);
PLANTED(unwritten_tail, float, 0);
PLANTED(written_input, float, 0);
PLANTED(shared_index, float, 0);
PLANTED(dynamic_shared_past_end, float, kThreads * sizeof(float));
PLANTED(wrong_pitch, float, 0);
PLANTED(foreign_local_memory, float, 0);
PLANTED(constant_table, int, 0);
PLANTED(bytes_in_shared, float, 0);
PLANTED(strided_loads, float, 0);
PLANTED(bank_conflicts, float, 0);
PLANTED(vector_loads, float, 0);

}  // namespace
