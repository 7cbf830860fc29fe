"""What launch.cuh asks of the CUDA runtime, with a runtime that only answers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import budgets

NVCC = budgets.find_nvcc()

# A device with 99 KiB a block, and kernels with 6784 bytes of their own.
RUNTIME = """
#include <cuda_runtime_api.h>
int current_device = 0, asked = 0, given = 0;
extern "C" {
cudaError_t cudaGetDevice(int* device) { *device = current_device; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 99 * 1024 : -1;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  found->sharedSizeBytes = 6784;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute name, int bytes) {
  ++asked;
  given = bytes;
  const bool known = name == cudaFuncAttributeMaxDynamicSharedMemorySize;
  return known && bytes + 6784 <= 99 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
const char* cudaGetErrorString(cudaError_t) { return "refused"; }
// What nvcc puts in for device code, of which there is none.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
}
"""
PROGRAM = """
#include <cstdio>
#include "cuda/launch.cuh"
extern int current_device, asked, given;
namespace ciema {
void fail_launch(const char* kernel, const char* message) { throw kernel; }
}
int main() {
  int one = 0, other = 0;
  for (current_device = 0; current_device < 2; ++current_device) {
    for (int call = 0; call < 3; ++call) {
      ciema::allow_shared_memory(&one, "one");
      ciema::allow_shared_memory(&other, "other");
    }
  }
  std::printf("%d %d", asked, given);
}
"""


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_a_kernel_may_use_all_that_its_static_memory_leaves(tmp_path: Path) -> None:
    """48 KiB without asking are of both: 44352 bytes beside 6784 of its own would be refused."""
    (tmp_path / "runtime.cpp").write_text(RUNTIME)
    (tmp_path / "program.cu").write_text(PROGRAM)
    command = [str(NVCC), "-std=c++20", "-cudart", "none", f"-I{ROOT / 'csrc'}", "-o", "program"]
    subprocess.run([*command, "program.cu", "runtime.cpp"], cwd=tmp_path, check=True)
    told = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True)
    asked, given = map(int, told.stdout.split())
    assert asked == 4  # once for each kernel and device
    assert given == 99 * 1024 - 6784
