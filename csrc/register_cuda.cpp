// The CUDA library's op under its schema, which fused/backends/native.py defines.
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"

STABLE_TORCH_LIBRARY_IMPL(ciema_native, CUDA, m) {
  m.impl("launch", TORCH_BOX(&ciema::cuda::launch));
}
