#include "cross_spatial_training.h"

#ifdef CIEMA_X86_SIMD
#include <math.h>

#include "avx512.h"

#include "cross_spatial_training_table.h"

#include "target_end.h"

const ciema::cpu::CrossSpatialTraining ciema::cpu::kAvx512CrossSpatialTraining = ciema::cpu::kTable;
#endif
