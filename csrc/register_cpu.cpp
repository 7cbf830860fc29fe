// The CPU kernels under their schemas, which fused/backends/native.py defines.
#include <torch/csrc/stable/library.h>

#include "cpu/channel_interaction.h"
#include "cpu/coordinate_attention.h"
#include "cpu/cross_spatial.h"
#include "cpu/cross_spatial_training.h"

STABLE_TORCH_LIBRARY_IMPL(ciema_native, CPU, m) {
  m.impl("channel_statistics", TORCH_BOX(&ciema::cpu::channel_statistics));
  m.impl("channel_statistics_backward", TORCH_BOX(&ciema::cpu::channel_statistics_backward));
  m.impl("coordinate_attention_pack", TORCH_BOX(&ciema::cpu::coordinate_attention_pack));
  m.impl("coordinate_attention_packed", TORCH_BOX(&ciema::cpu::coordinate_attention_packed));
  m.impl("coordinate_attention_backward",
         TORCH_BOX(&ciema::cpu::coordinate_attention_backward));
  m.impl("cross_spatial_pack", TORCH_BOX(&ciema::cpu::cross_spatial_pack));
  m.impl("cross_spatial_packed", TORCH_BOX(&ciema::cpu::cross_spatial_packed));
  m.impl("coordinate_cross_spatial_packed",
         TORCH_BOX(&ciema::cpu::coordinate_cross_spatial_packed));
  m.impl("cross_spatial_train", TORCH_BOX(&ciema::cpu::cross_spatial_train));
  m.impl("cross_spatial_backward", TORCH_BOX(&ciema::cpu::cross_spatial_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ciema_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&ciema::cpu::cpu_isa));
  m.impl("cpu_isa_available", TORCH_BOX(&ciema::cpu::cpu_isa_available));
}
