"""The compiled CUDA kernels stay within benchmarks/gpu_budgets.toml, and the check can fail."""

from __future__ import annotations

import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import budget_file, budgets, cuda_capture, cuda_report
from benchmarks.occupancy import MULTIPROCESSORS, occupancy
from fused.backends import cuda

NVCC = budgets.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

USAGE = budgets.Usage(
    source="stage",
    kernel="kernel<float, 1>",
    architecture=80,
    threads=256,
    registers=40,
    shared_bytes=96,
    spill_bytes=0,
    stack_bytes=0,
    occupancy=75,
    limiter="registers",
    tensor_instructions=64,
    products_per_issue=300,
    wide_loads=4,
)


def stored(*usages: budgets.Usage) -> dict:
    rows = budget_file.tomllib.loads(budgets.as_toml(usages, "Compiler: none."))
    return budgets.named(rows)


def test_what_was_written_is_met() -> None:
    other = replace(USAGE, kernel="other_kernel", architecture=90)
    assert budgets.past_budget([USAGE, other], stored(USAGE, other)) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"registers": 41}, "registers 41 > 40"),
        ({"shared_bytes": 97}, "shared_bytes 97 > 96"),
        ({"spill_bytes": 4}, "spill_bytes 4 > 0"),
        ({"stack_bytes": 8}, "stack_bytes 8 > 0"),
        ({"occupancy": 62}, "occupancy 62 < 75, limited by registers"),
        ({"tensor_instructions": 0}, "tensor_instructions 0 < 64"),
        ({"products_per_issue": 299}, "products_per_issue 299 < 300"),
        ({"wide_loads": 3}, "wide_loads 3 < 4"),
        ({"architecture": 90}, "on sm_90 has no budget"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_more_than_the_budget_is_told(change: dict, complaint: str) -> None:
    (told,) = budgets.past_budget([replace(USAGE, **change)], stored(USAGE))
    assert complaint in told


def test_a_budget_without_a_kernel_is_told() -> None:
    (told,) = budgets.past_budget([], stored(USAGE))
    assert "is not built any more" in told


def test_the_parts_of_the_file_are_kept_apart(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(budget_file, "FILE", tmp_path / "budgets.toml")
    budget_file.FILE.write_text("[stage]\na = 1\n")
    assert budget_file.read("triton") == {}
    budget_file.write("emulated", "[emulated]\nc = 3\n")
    budget_file.write("triton", "[triton]\nb = 2\n")
    budget_file.write("cuda", "[stage]\na = 4\n")
    found = {part: budget_file.read(part) for part in budget_file.MARKS}
    assert found == {
        "cuda": {"stage": {"a": 4}},
        "triton": {"triton": {"b": 2}},
        "emulated": {"emulated": {"c": 3}},
    }
    text = budget_file.FILE.read_text()
    assert budget_file.join(budget_file.split(text)) == text


def test_the_committed_file_is_as_it_would_be_written() -> None:
    text = budget_file.FILE.read_text()
    assert budget_file.join(budget_file.split(text)) == text


def test_stored_budgets_allow_no_spill() -> None:
    everything = budgets.stored()
    assert everything
    for kernels in everything.values():
        for kernel, by_architecture in kernels.items():
            assert set(by_architecture) == {f"sm_{a}" for a in budgets.ARCHITECTURES}, kernel
            assert all(row["spill_bytes"] == 0 for row in by_architecture.values()), kernel


def is_fresh(library: Path) -> bool:
    """Whether a library is younger than the sources of its kernels."""
    sources = [*budgets.ROOT.glob("csrc/cuda/*"), *budgets.ROOT.glob("csrc/common/*")]
    return library.stat().st_mtime > max(source.stat().st_mtime for source in sources)


@needs_nvcc
def test_every_kernel_is_within_its_budget() -> None:
    """As the library has them, for the architectures that it was built for."""
    library = cuda.LIBRARY.path
    if library is None:
        pytest.skip(str(cuda.LIBRARY.error))
    if not is_fresh(library):
        pytest.fail("fused._cuda is older than csrc/cuda: FUSED_BUILD=cuda setup.py build_ext")
    dynamic = cuda_capture.dynamic_shared_bytes(cuda_capture.all_launches())
    usages = budgets.measure_library(library, dynamic)
    assert budgets.past_budget_of_library(usages, budgets.stored()) == []


def test_kernels_of_a_library_are_found_by_name() -> None:
    other = replace(USAGE, source="other", registers=50)
    known = stored(USAGE, other)
    found = replace(USAGE, source="")
    assert budgets.past_budget_of_library([found], known) == []
    assert budgets.past_budget_of_library([replace(found, registers=50)], known) == []
    (told,) = budgets.past_budget_of_library([replace(found, registers=51)], known)
    assert "registers 51 >" in told
    (told,) = budgets.past_budget_of_library([], stored(USAGE))
    assert "is not built" in told
    told = budgets.past_budget_of_library([replace(found, kernel="new"), found], known)
    assert told == ["?: new on sm_80 has no budget"]


@needs_nvcc
def test_spills_and_shared_memory_are_read(tmp_path: Path) -> None:
    source = tmp_path / "greedy.cu"
    source.write_text(
        """
        __global__ void __launch_bounds__(1024, 2) greedy(const float* x, float* out) {
          __shared__ float tile[1024];
          float value[64];
          for (int i = 0; i < 64; ++i) value[i] = x[threadIdx.x + i * 1024];
          tile[threadIdx.x] = value[0];
          __syncthreads();
          for (int round = 0; round < 64; ++round)
            for (int i = 0; i < 64; ++i) value[i] = value[i] * value[(i + round) % 64] + tile[i];
          for (int i = 0; i < 64; ++i) out[threadIdx.x + i * 1024] = value[i];
        }
        """
    )
    (usage,) = budgets.measure(NVCC, source, [80])
    assert usage.kernel == "greedy"
    assert usage.threads == 1024
    assert usage.registers <= 32  # 2 blocks of 1024 threads share 65536
    assert usage.shared_bytes == 4096
    assert usage.spill_bytes + usage.stack_bytes > 0
    assert usage.occupancy == 100


@needs_nvcc
def test_a_kernel_that_does_not_compile_gives_the_compilers_words(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void wrong() { return 1 }")
    with pytest.raises(RuntimeError, match="expected"):
        budgets.measure(NVCC, source, [80])


@needs_nvcc
def test_occupancy_is_that_of_cuda_occupancy_h(tmp_path: Path) -> None:
    draw = random.Random(1)
    cases = [
        (
            draw.choice(budgets.ARCHITECTURES),
            draw.randrange(1, 1025),
            draw.randrange(16, 129),
            draw.randrange(0, 49152),
        )
        for _ in range(300)
    ]
    source = tmp_path / "occupancy.cpp"
    source.write_text(OCCUPANCY)
    program = tmp_path / "occupancy"
    subprocess.run([NVCC, str(source), "-cudart", "none", "-o", str(program)], check=True)
    lines = []
    for architecture, *case in cases:
        limits = MULTIPROCESSORS[architecture]
        numbers = (architecture, *case, limits.threads, limits.shared_bytes, limits.blocks)
        lines.append(" ".join(map(str, numbers)))
    run = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True)
    expected = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    assert len(expected) == len(cases)
    names = {1: "warps", 2: "registers", 4: "shared memory", 8: "blocks"}
    for case, (blocks, limiters) in zip(cases, expected, strict=True):
        wanted = (blocks, {name for bit, name in names.items() if limiters & bit})
        found, reasons = occupancy(*case)
        assert (found, set(reasons)) == wanted, case


OCCUPANCY = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int arch, threads, registers, shared, max_threads, max_shared, max_blocks;
  while (std::scanf("%d %d %d %d %d %d %d", &arch, &threads, &registers, &shared, &max_threads,
                    &max_shared, &max_blocks) == 7) {
    cudaOccDeviceProp device;
    device.computeMajor = arch / 10;
    device.computeMinor = arch % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = max_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 49152;
    device.sharedMemPerMultiprocessor = max_shared;
    device.sharedMemPerBlockOptin = max_shared - 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = shared;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = 0;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.cacheConfig = CACHE_PREFER_NONE;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0))
      return 1;
    std::printf("%d %d\\n", result.activeBlocksPerMultiprocessor, (int)result.limitingFactors);
  }
}
"""


@pytest.mark.parametrize("size", cuda_report.SIZES)
def test_requests_of_memory_are_within_their_budgets(size: int) -> None:
    """Sectors of device memory, and bank conflicts, of every launch of a forward, as emulated."""
    found = cuda_report.emulate(size)
    assert found.findings == 0
    assert cuda_report.past_budget(found, cuda_report.stored()) == []
    rows = found.requests
    name, (sectors, wavefronts) = next((k, v) for k, v in rows.items() if v[1] > 0)
    assert cuda_report.past_budget(found, {}) == [
        f"{size}×{size}: {kernel} has no budget" for kernel in rows
    ]
    tight = {str(size): {**rows, name: [sectors, wavefronts - 1], "9 gone": [100, 100]}}
    assert cuda_report.past_budget(found, tight) == [
        f"{size}×{size}: {name}: wavefronts {wavefronts} % > {wavefronts - 1} %",
        f"{size}×{size}: 9 gone is not launched",
    ]
    text = cuda_report.as_toml([found])
    assert budget_file.tomllib.loads(text)["emulated"][str(size)] == rows
