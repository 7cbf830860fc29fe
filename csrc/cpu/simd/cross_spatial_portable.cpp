#include "cross_spatial.h"

#include <math.h>

#include "portable.h"

#include "cross_spatial_body.h"

#include "target_end.h"

const ciema::cpu::CrossSpatial ciema::cpu::kPortableCrossSpatial = ciema::cpu::kTable;
