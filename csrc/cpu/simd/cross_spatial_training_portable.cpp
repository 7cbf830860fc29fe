#include "cross_spatial_training.h"

#include <math.h>

#include "portable.h"

#include "cross_spatial_training_table.h"

#include "target_end.h"

const ciema::cpu::CrossSpatialTraining ciema::cpu::kPortableCrossSpatialTraining =
    ciema::cpu::kTable;
