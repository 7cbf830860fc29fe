// The product that all 1×1 convolutions share: one tile of results, from loading to storing.
//
//   acc[b, m, s] = Σ_k W[m, k] X[b, k, s]        X is one operand, or two along k: [X0; X1]
//   X0 may be formed while loading: X0[b, k, s] = x[b, k, s] · w[b, k / width, s], rounded to T
//   out[b, m, s] = epilogue(acc[b, m, s]), computed in float32 and rounded once
//
// Layouts     x and out both "rows" or both "channels_last" (map.cuh); w any strides; W row-major,
//             of T or float32 (then rounded to T while loading).
// Grid        one block for kM channels × kN pixels of one sample; tiles of channels are
//             neighbours, so that the pixels they share come from the second-level cache.
// Loop        steps of 64 bytes of depth; kStages tiles of W and X in shared memory, filled by
//             cp.async two steps ahead, 16, 8 or 4 bytes at a time as lines are aligned; by single
//             loads for odd lines of 16-bit values and for W of another dtype. A thread scales its
//             own copies by w, of which it holds the next step's in registers, before the barrier
//             that publishes them.
// Bytes       x once for every kM channels and W once for every kN pixels, from the second-level
//             cache; x, W, w and out once from device memory while that holds them.
// Accuracy    float32 sums in the tensor cores, in a fixed order; float operands as Precision says.
#pragma once

#include "product_loop.cuh"
#include "product_results.cuh"

namespace ciema::product {

template <class T, Precision kPrecision, Layout kLayout, class Shape, class Loading, class Epilogue>
constexpr int shared_bytes() {
  using Main = Tiles<T, kPrecision, kLayout, Shape, Loading>;
  using Out = Results<T, kPrecision, kLayout, Shape, Loading, Epilogue>;
  constexpr int kLoop = kStages * Main::kStageElements * static_cast<int>(sizeof(T));
  return kLoop > Out::kBytes ? kLoop : Out::kBytes;
}

// Blocks that a multiprocessor should hold, which allows a thread 128 registers; in float32 as many
// registers as it takes. The same for all architectures, so that they share PTX (setup.py): where
// the shared memory holds but one wide tile, the bound costs a twentieth more instructions.
template <class T, class Shape>
constexpr int min_blocks() {
  return sizeof(T) == sizeof(float) ? 1 : 512 / Shape::kThreads;
}

template <class T, Precision kPrecision, Layout kLayout, class Shape, class Loading, class Epilogue>
__global__ void __launch_bounds__(Shape::kThreads, min_blocks<T, Shape>())
    product_kernel(ProductParams p, Epilogue epilogue) {
  using Main = Tiles<T, kPrecision, kLayout, Shape, Loading>;
  CIEMA_DYNAMIC_SHARED(T, shared);
  const Corner corner = corner_of(p, Shape::kM, Shape::kN);
  typename Main::Accumulators acc = {};
  Main::accumulate(p, corner, shared, acc);
  Results<T, kPrecision, kLayout, Shape, Loading, Epilogue>::store(
      p, corner, epilogue, acc, reinterpret_cast<float*>(shared));
}

}  // namespace ciema::product
