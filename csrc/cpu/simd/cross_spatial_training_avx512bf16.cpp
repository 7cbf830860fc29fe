#include "cross_spatial_training.h"

#ifdef CIEMA_X86_SIMD
#include <math.h>

#define CIEMA_AVX512_BF16 1
#include "avx512.h"

#define CIEMA_BF16_ROWS 1
#include "cross_spatial_training_table.h"

#include "target_end.h"

const ciema::cpu::CrossSpatialTraining ciema::cpu::kAvx512bf16CrossSpatialTraining =
    ciema::cpu::kTable;
#endif
