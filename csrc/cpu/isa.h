// The instruction set the CPU kernels use: the widest this CPU has, or FUSED_CPU_ISA's.
#pragma once

#include <string>

#include "simd/channel_statistics.h"
#include "simd/coordinate_attention.h"
#include "simd/cross_spatial.h"
#include "simd/cross_spatial_training.h"
#include "simd/products.h"
#include "simd/separable.h"

namespace ciema::cpu {

struct InstructionSet {
  const char* name;
  const ChannelStatistics* channel_statistics;
  const CoordinateAttention* coordinate_attention;
  const CrossSpatial* cross_spatial;
  const CrossSpatialTraining* cross_spatial_training;
  // With products in bfloat16; null where the processor has none.
  const CrossSpatialBf16* cross_spatial_bf16;
  const CrossSpatialTraining* cross_spatial_training_bf16;
  const Products* products;
  const Separable* separable;
};

// Chosen once, when first asked (FUSED_CPU_ISA is read then). Throws with the reason if the
// variable asks for one that is unknown or that this CPU lacks.
const InstructionSet& chosen_instruction_set();

// Names this CPU can run, widest first, separated by commas.
std::string available_instruction_sets();

}  // namespace ciema::cpu
