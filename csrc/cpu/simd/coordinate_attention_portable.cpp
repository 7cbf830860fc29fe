#include "coordinate_attention.h"

#include <math.h>

#include "portable.h"

#include "coordinate_attention_table.h"

#include "target_end.h"

const ciema::cpu::CoordinateAttention ciema::cpu::kPortableCoordinateAttention = ciema::cpu::kTable;
