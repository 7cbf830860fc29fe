#include "separable.h"

#ifdef CIEMA_X86_SIMD
#include "avx2.h"

constexpr int kTilePixels = 6, kTileVectors = 2;  // 12 sums, 2 weights, 1 pixel: 15 of 16 registers

#include "separable_body.h"

constexpr Separable kTable = table_of_floats();

#include "target_end.h"

const ciema::cpu::Separable ciema::cpu::kAvx2Separable = ciema::cpu::kTable;
#endif
