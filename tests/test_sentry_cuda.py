"""sentryward on the PTX of CUDA kernels: what it is given, a proof, and a planted race."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from emulator import missing_tool

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)
pytest.importorskip("triton")

from benchmarks import budgets, sentry_cuda
from benchmarks.cuda_capture import KernelLaunch, pointer
from benchmarks.sentry import find_verifier

NVCC, VERIFIER = budgets.find_nvcc(), find_verifier()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_verifier = pytest.mark.skipif(VERIFIER is None, reason="sentryward is not installed")

PTX = """.visible .entry scale(
\t.param .align 8 .b8 scale_param_0[32],
\t.param .u32 scale_param_1
)
{
\tmov.b64 \t%rd9, scale_param_0;
\tmov.u64 \t%rd1, %rd9;
\tld.param.v2.u32 \t{%r1, %r2}, [scale_param_0+8];
\tld.param.u64 \t%rd2, [%rd1];
\tld.param.f32 \t%f1, [%rd1+16];
\tld.param.u32 \t%r3, [scale_param_1];
}
"""
SOURCE = """
struct Params { float* out; int step, count; };
__global__ void __launch_bounds__(32) steps(Params p) {
  const int i = blockIdx.x * p.step + threadIdx.x;
  if (i < p.count) p.out[i] = 1.0f + i;
}
"""


def test_a_structure_is_taken_apart_into_what_is_loaded() -> None:
    ptx, parts = sentry_cuda.with_scalars(PTX)
    assert parts == {
        "scale_param_0_0": (0, 0, "u64"),
        "scale_param_0_8": (0, 8, "u32"),
        "scale_param_0_12": (0, 12, "u32"),
        "scale_param_0_16": (0, 16, "f32"),
        "scale_param_1_0": (1, 0, "u32"),
    }
    assert "ld.param.u32 %r2, [scale_param_0_12];" in ptx
    assert "ld.param.u64 %rd2, [scale_param_0_0];" in ptx
    assert ".align" not in ptx
    first = struct.pack("<QIIf", pointer(0), 7, 0, 0.5)
    made = KernelLaunch("scale", "scale", (3, 1, 1), (64, 1, 1), 0, (first, struct.pack("<I", 5)))
    given = sentry_cuda.verifiers_input(made, parts)
    values = {one["parameter"]: one["value"] for one in given["arguments"]}
    assert values == {"scale_param_0_8": 7, "scale_param_0_12": 0, "scale_param_1_0": 5}
    assert given["launch"] == {"grid_dim": [3, 1, 1], "block_dim": [64, 1, 1]}


def test_a_parameter_used_as_an_array_is_refused() -> None:
    indexed = PTX.replace("ld.param.f32", "add.s64 \t%rd3, %rd1, %rd2;\n\tld.param.f32")
    with pytest.raises(ValueError, match="indexes its parameters"):
        sentry_cuda.with_scalars(indexed)


@needs_nvcc
@needs_verifier
@pytest.mark.parametrize(("step", "result"), [(32, "race_free"), (16, "race")])
def test_blocks_that_write_over_each_other_are_found(
    tmp_path: Path, step: int, result: str
) -> None:
    source, ptx = tmp_path / "steps.cu", tmp_path / "steps.ptx"
    source.write_text(SOURCE)
    command = [NVCC, f"-arch={sentry_cuda.FAMILY}", "-ptx", str(source), "-o", str(ptx)]
    subprocess.run(command, check=True, capture_output=True)
    ((kernel, text),) = sentry_cuda.split(ptx.read_text()).items()
    params = struct.pack("<Qii", pointer(0), step, 100)
    made = KernelLaunch("steps", kernel, (4, 1, 1), (32, 1, 1), 0, (params,))
    assert sentry_cuda.prove(VERIFIER, made, text).result == result


@needs_nvcc
@needs_verifier
def test_a_kernel_of_the_package_is_proven() -> None:
    launches = sentry_cuda.launches(["channel_statistics"])
    proofs = {p.kernel: p.result for p in sentry_cuda.prove_all(VERIFIER, launches)}
    assert proofs["channel_statistics: forward_channels_last_kernel<__half, 8>"] == "race_free"
