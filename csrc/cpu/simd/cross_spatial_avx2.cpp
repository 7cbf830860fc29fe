#include "cross_spatial.h"

#ifdef CIEMA_X86_SIMD
#include <math.h>

#include "avx2.h"

#include "cross_spatial_body.h"

#include "target_end.h"

const ciema::cpu::CrossSpatial ciema::cpu::kAvx2CrossSpatial = ciema::cpu::kTable;
#endif
