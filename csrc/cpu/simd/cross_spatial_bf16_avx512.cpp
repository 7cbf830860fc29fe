#include "cross_spatial_bf16.h"

#ifdef CIEMA_X86_SIMD
#include "avx512.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#endif

#include "cross_spatial_bf16_body.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#include "target_end.h"

const ciema::cpu::CrossSpatialBf16 ciema::cpu::kAvx512CrossSpatialBf16 = ciema::cpu::kTable;
#endif
