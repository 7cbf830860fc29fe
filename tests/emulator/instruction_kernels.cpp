// Small products of one warp through csrc/cuda/fragments.cuh, and what its registers hold.
#include "../../csrc/cuda/fragments.cuh"
#include "../../csrc/cuda/launch.cuh"

namespace {

using namespace ciema;

constexpr int kRows = 16;     // of A
constexpr int kColumns = 16;  // of B: two tiles of a product

// How an operand lies in memory, and by which function it is loaded.
enum class Load { kDepthLast, kDepthFirst, kRowAddresses };

__device__ int thread() { return static_cast<int>(threadIdx.x); }

// A pitch without bank conflicts for `columns` elements, if those are a multiple of 128 bytes or
// 16 elements.
template <class T>
__device__ int pitch_of(int columns, Load load) {
  return columns + (load == Load::kDepthFirst ? 8 : 16 / static_cast<int>(sizeof(T)));
}

template <class T>
__device__ void fill(T* tile, const T* source, int rows, int columns, int pitch) {
  for (int i = thread(); i < rows * columns; i += kWarp) {
    tile[i / columns * pitch + i % columns] = source[i];
  }
}

template <class F, class T>
__device__ void load_a(typename F::A& a, const T* tile, int k, int pitch, Load load) {
  if (load == Load::kDepthFirst) {
    F::load_a_columns(a, tile + k * pitch, pitch);
  } else if (load == Load::kDepthLast) {
    F::load_a(a, tile + k, pitch);
  } else {
    F::load_a_row(a, tile + thread() % kRows * pitch + k);
  }
}

template <class F, class T>
__device__ void load_b(typename F::B (&b)[2], const T* tile, int k, int pitch, Load load) {
  if (load == Load::kDepthFirst) {
    F::load_b_columns(b, tile + k * pitch, pitch);
  } else {
    F::load_b(b, tile + k, pitch);
  }
}

// Where d[i] of the n-th tile belongs.
__device__ int place(int n, int i) {
  const int row = thread() / 4 + i / 2 * 8, column = 8 * n + thread() % 4 * 2 + i % 2;
  return row * kColumns + column;
}

__device__ void store(float* out, const float (&d)[2][4]) {
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) out[place(n, i)] = d[n][i];
  }
}

// out (16×16) = C + A B.
template <class T, Precision kPrecision, Load kA, Load kB>
__global__ void __launch_bounds__(kWarp)
    product(const T* a, const T* b, const float* c, float* out, int depth) {
  using F = Fragments<T, kPrecision>;
  CIEMA_DYNAMIC_SHARED(T, shared);
  const int pitch_a = pitch_of<T>(kA == Load::kDepthFirst ? kRows : depth, kA);
  const int pitch_b = pitch_of<T>(kB == Load::kDepthFirst ? kColumns : depth, kB);
  T* tile_a = shared;
  T* tile_b = shared + (kA == Load::kDepthFirst ? depth : kRows) * pitch_a;
  fill(tile_a, a, kA == Load::kDepthFirst ? depth : kRows,
       kA == Load::kDepthFirst ? kRows : depth, pitch_a);
  fill(tile_b, b, kB == Load::kDepthFirst ? depth : kColumns,
       kB == Load::kDepthFirst ? kColumns : depth, pitch_b);
  __syncthreads();
  float d[2][4];
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) d[n][i] = c[place(n, i)];
  }
  for (int k = 0; k < depth; k += F::kDepth) {
    typename F::A fragment_a;
    typename F::B fragment_b[2];
    load_a<F>(fragment_a, tile_a, k, pitch_a, kA);
    load_b<F>(fragment_b, tile_b, k, pitch_b, kB);
    for (int n = 0; n < 2; ++n) F::multiply_add(d[n], fragment_a, fragment_b[n]);
  }
  store(out, d);
}

// out (16×16) = A B C, of which A B stays in registers; C (16×16) as [column][depth].
template <class T, Precision kPrecision>
__global__ void __launch_bounds__(kWarp)
    chained(const T* a, const T* b, const T* c, float* out) {
  using F = Fragments<T, kPrecision>;
  constexpr int kPitch = kColumns + 16 / static_cast<int>(sizeof(T)), kPitchC = kColumns + 8;
  CIEMA_SHARED(T, tile, [3][kRows * kPitchC]);
  fill(tile[0], a, kRows, kColumns, kPitch);
  fill(tile[1], b, kRows, kColumns, kPitch);
  fill(tile[2], c, kRows, kColumns, kPitchC);
  __syncthreads();
  typename F::A fragment_a;
  typename F::B fragment_b[2];
  float first[2][4] = {}, second[2][4] = {};
  for (int k = 0; k < kColumns; k += F::kDepth) {
    F::load_a(fragment_a, tile[0] + k, kPitch);
    F::load_b(fragment_b, tile[1] + k, kPitch);
    for (int n = 0; n < 2; ++n) F::multiply_add(first[n], fragment_a, fragment_b[n]);
  }
  for (int k = 0; k < kColumns; k += F::kDepth) {
    float inner[F::kDepth / 8][4];
    memcpy(inner, first[k / 8], sizeof(inner));
    F::chain(fragment_a, inner);
    F::load_b_chained(fragment_b, tile[2] + k, kPitchC);
    for (int n = 0; n < 2; ++n) F::multiply_add(second[n], fragment_a, fragment_b[n]);
  }
  store(out, second);
}

// The registers of one product: A (32×4), B (2×32×2) and D (32×4) as the lanes hold them. a is
// (16, kDepth), b (16, kDepth); transposed in memory if kFirst.
template <class T, bool kFirst>
__global__ void __launch_bounds__(kWarp)
    registers(const T* a, const T* b, uint32_t* a_out, uint32_t* b_out, float* d_out) {
  using F = Fragments<T, Precision::kTf32>;
  constexpr int kPitch = 16 + 8;
  CIEMA_SHARED(T, tile, [2][16 * kPitch]);
  constexpr int kLines = kFirst ? F::kDepth : 16, kLength = kFirst ? 16 : F::kDepth;
  fill(tile[0], a, kLines, kLength, kPitch);
  fill(tile[1], b, kLines, kLength, kPitch);
  __syncthreads();
  typename F::A fragment_a;
  typename F::B fragment_b[2];
  constexpr Load kLoad = kFirst ? Load::kDepthFirst : Load::kDepthLast;
  load_a<F>(fragment_a, tile[0], 0, kPitch, kLoad);
  load_b<F>(fragment_b, tile[1], 0, kPitch, kLoad);
  float d[4] = {};
  F::multiply_add(d, fragment_a, fragment_b[0]);
  memcpy(a_out + thread() * 4, &fragment_a, sizeof(fragment_a));
  for (int n = 0; n < 2; ++n) {
    memcpy(b_out + (n * kWarp + thread()) * 2, &fragment_b[n], sizeof(fragment_b[n]));
  }
  for (int i = 0; i < 4; ++i) d_out[thread() * 4 + i] = d[i];
}

// ---- entries ----------------------------------------------------------------------------------

template <class T, Precision kPrecision, Load kA, Load kB>
void product_entry(const Arguments& a) {
  const int depth = static_cast<int>(a.integer("depth"));
  const size_t elements = 2 * static_cast<size_t>(depth + 16) * (16 + 8);
  launch(a, "product", dim3{1}, dim3{kWarp}, elements * sizeof(T),
         product<T, kPrecision, kA, kB>, a.pointer<T>("a"), a.pointer<T>("b"),
         a.pointer<float>("c"), a.pointer<float>("out"), depth);
}

template <class T, Precision kPrecision>
void chained_entry(const Arguments& a) {
  launch(a, "chained", dim3{1}, dim3{kWarp}, 0, chained<T, kPrecision>, a.pointer<T>("a"),
         a.pointer<T>("b"), a.pointer<T>("c"), a.pointer<float>("out"));
}

template <class T, bool kFirst>
void registers_entry(const Arguments& a) {
  launch(a, "registers", dim3{1}, dim3{kWarp}, 0, registers<T, kFirst>, a.pointer<T>("a"),
         a.pointer<T>("b"), a.pointer<uint32_t>("a_out"), a.pointer<uint32_t>("b_out"),
         a.pointer<float>("d_out"));
}

#define PRODUCT(name, type, precision, load_a, load_b)                     \
  {"product_" #name "_" #load_a "_" #load_b,                               \
   product_entry<type, precision, Load::load_a, Load::load_b>}
#define ENTRIES(name, type, precision)                                 \
  PRODUCT(name, type, precision, kDepthLast, kDepthLast),              \
      PRODUCT(name, type, precision, kRowAddresses, kDepthLast),       \
      PRODUCT(name, type, precision, kDepthLast, kDepthFirst),         \
      PRODUCT(name, type, precision, kDepthFirst, kDepthLast),         \
      PRODUCT(name, type, precision, kDepthFirst, kDepthFirst),        \
      {"chained_" #name, chained_entry<type, precision>},              \
      {"registers_" #name "_last", registers_entry<type, false>},      \
      {"registers_" #name "_first", registers_entry<type, true>}

const Entry kEntries[] = {
    ENTRIES(float16, __half, Precision::kSplit),
    ENTRIES(bfloat16, __nv_bfloat16, Precision::kSplit),
    ENTRIES(float32, float, Precision::kSplit),
    ENTRIES(tf32, float, Precision::kTf32),
};

}  // namespace
