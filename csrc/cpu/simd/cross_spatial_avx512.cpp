#include "cross_spatial.h"

#ifdef CIEMA_X86_SIMD
#include <math.h>

#include "avx512.h"

#include "cross_spatial_body.h"

#include "target_end.h"

const ciema::cpu::CrossSpatial ciema::cpu::kAvx512CrossSpatial = ciema::cpu::kTable;
#endif
