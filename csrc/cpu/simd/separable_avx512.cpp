#include "separable.h"

#ifdef CIEMA_X86_SIMD
#include "avx512.h"

constexpr int kTilePixels = 14, kTileVectors = 2;  // 28 sums, 2 weights: 30 of 32 registers

#include "separable_body.h"

constexpr Separable kTable = table_of_floats();

#include "target_end.h"

const ciema::cpu::Separable ciema::cpu::kAvx512Separable = ciema::cpu::kTable;
#endif
