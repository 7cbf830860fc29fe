#include "coordinate_attention.h"

#ifdef CIEMA_X86_SIMD
#include <math.h>

#include "avx2.h"

#include "coordinate_attention_table.h"

#include "target_end.h"

const ciema::cpu::CoordinateAttention ciema::cpu::kAvx2CoordinateAttention = ciema::cpu::kTable;
#endif
