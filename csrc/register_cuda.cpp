// The CUDA kernels under their schemas, which fused/backends/native.py defines.
#include <torch/csrc/stable/library.h>

#include "cuda/channel_interaction.h"

STABLE_TORCH_LIBRARY_IMPL(ciema_native, CUDA, m) {
  m.impl("channel_statistics", TORCH_BOX(&ciema::cuda::channel_statistics));
  m.impl("channel_statistics_backward", TORCH_BOX(&ciema::cuda::channel_statistics_backward));
}
