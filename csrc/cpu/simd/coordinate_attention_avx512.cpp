#include "coordinate_attention.h"

#ifdef CIEMA_X86_SIMD
#include <math.h>

#include "avx512.h"

#include "coordinate_attention_table.h"

#include "target_end.h"

const ciema::cpu::CoordinateAttention ciema::cpu::kAvx512CoordinateAttention = ciema::cpu::kTable;
#endif
