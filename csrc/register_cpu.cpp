// The CPU kernels under their schemas, which fused/backends/native.py defines.
#include <torch/csrc/stable/library.h>

#include "cpu/channel_interaction.h"
#include "cpu/separable.h"

STABLE_TORCH_LIBRARY_IMPL(ciema_native, CPU, m) {
  m.impl("channel_statistics", TORCH_BOX(&ciema::cpu::channel_statistics));
  m.impl("channel_statistics_backward", TORCH_BOX(&ciema::cpu::channel_statistics_backward));
  m.impl("separable_pack", TORCH_BOX(&ciema::cpu::separable_pack));
  m.impl("separable_block", TORCH_BOX(&ciema::cpu::separable_block));
  m.impl("stem", TORCH_BOX(&ciema::cpu::stem));
}

STABLE_TORCH_LIBRARY_IMPL(ciema_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&ciema::cpu::cpu_isa));
  m.impl("cpu_isa_available", TORCH_BOX(&ciema::cpu::cpu_isa_available));
}
