#include "separable.h"

#include "portable.h"

constexpr int kTilePixels = 4, kTileVectors = 1;

#include "separable_body.h"

constexpr Separable kTable = table_of_floats();

#include "target_end.h"

const ciema::cpu::Separable ciema::cpu::kPortableSeparable = ciema::cpu::kTable;
