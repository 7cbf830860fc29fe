"""What a compiled Triton kernel uses of a GPU, read from its machine code.

The NVIDIA figures come from the tools that Triton brings along, cuobjdump and nvdisasm, the AMD
ones from the assembly that LLVM writes.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import sass
from benchmarks.occupancy import MULTIPROCESSORS, occupancy
from benchmarks.triton_compile import Target

# Columns of a multiprocessor's tensor memory (PTX manual, tcgen05.alloc).
_TENSOR_MEMORY = 512


@dataclass(frozen=True)
class ComputeUnit:
    """What an AMD unit that shares one LDS holds (LLVM's AMDGPU guide; the ISA manuals).

    `simds` of `waves` waves each; a CDNA unit is a compute unit, an RDNA one a pair of them,
    because Triton compiles for workgroup-processor mode.
    """

    simds: int
    waves: int
    lds_bytes: int


COMPUTE_UNITS = {"gfx942": ComputeUnit(4, 8, 65536), "gfx1100": ComputeUnit(4, 16, 131072)}


@dataclass(frozen=True)
class Code:
    """What a compiled kernel needs and how it computes.

    Attributes:
        threads: of a block.
        registers: of a thread.
        spill_bytes: of a thread's stack in use, which only spilled registers use here.
        shared_bytes: of a block.
        occupancy: percent of the warps that a multiprocessor can hold.
        limiter: what admits no more.
        tensor_instructions: that multiply on tensor cores (matrix cores).
        slow_products: `tl.dot` of half precision that are not on tensor cores.
        half_products: `tl.dot` of half precision.
        products_per_issue: multiply-adds on tensor cores for each instruction that a warp issues
            in the loop that has most of them; 0 where the instructions do not tell (Blackwell's
            UTCHMMA, AMD).
        loads: instructions that read global memory.
        wide_loads: those of 16 bytes a thread, or more.
    """

    threads: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: int
    limiter: str
    tensor_instructions: int
    slow_products: int
    half_products: int
    products_per_issue: int
    loads: int
    wide_loads: int


def inspect(compiled: Sequence[Any], target: Target) -> list[Code]:
    """Reads compiled kernels of one target, all at once: the disassembler is slow to start."""
    if target.is_nvidia:
        listings = sass.disassemble([kernel.asm["cubin"] for kernel in compiled], target.name)
        found = [_inspect_nvidia(k, c, target) for k, c in zip(compiled, listings, strict=True)]
    else:
        found = [_inspect_amd(kernel, target) for kernel in compiled]
    codes = []
    for kernel, facts in zip(compiled, found, strict=True):
        half, slow = products(kernel.asm["ttir"], kernel.asm["ttgir"])
        codes.append(Code(half_products=half, slow_products=slow, **facts))
    return codes


def products(ttir: str, ttgir: str) -> tuple[int, int]:
    """Products of half precision: as written, and those left to ordinary arithmetic.

    Triton gives a product that its matrix units do not take the layout `#blocked`, and may widen
    its operands to float32 first; so in a kernel without products of float32 these count too.
    """
    product = r"tt\.dot [^:]*: tensor<[\dx]+x(%s)\b"
    written = re.findall(product % r"\w+", ttir)
    slow = re.findall(product % r"\w+" + r".*-> tensor<[^>]*#blocked\d*>", ttgir)
    half = ("f16", "bf16")
    widened = [] if "f32" in written else [dtype for dtype in slow if dtype == "f32"]
    count = sum(dtype in half for dtype in slow) + len(widened)
    return sum(dtype in half for dtype in written), count


def _inspect_nvidia(compiled: Any, code: list[sass.Instruction], target: Target) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = sass.run("cuobjdump", "--dump-resource-usage", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump did not tell what the kernel uses:\n{usage}")
    registers, stack, local = map(int, found.groups())
    threads = _captured(r"\.reqntid (\d+)", compiled.asm["ptx"])
    shared = int(compiled.metadata.shared)
    columns = int(getattr(compiled.metadata, "tmem_size", None) or 0)
    percent, limiter = nvidia_occupancy(target, threads, registers, shared, columns)
    return {
        "threads": threads,
        "registers": registers,
        # A frame that no instruction touches (ptxas plans one, then needs none) holds no spill.
        "spill_bytes": stack + local
        if any(o.opcode.startswith(("STL", "LDL")) for o in code)
        else 0,
        "shared_bytes": shared,
        "occupancy": percent,
        "limiter": limiter,
        **sass.counts(code),
    }


def nvidia_occupancy(
    target: Target, threads: int, registers: int, shared_bytes: int, tensor_memory_columns: int = 0
) -> tuple[int, str]:
    """`occupancy` in percent of the threads, with Blackwell's tensor memory as a limit."""
    architecture = int(target.name.removeprefix("sm_"))
    blocks, limiters = occupancy(architecture, threads, registers, shared_bytes)
    limiter = ", ".join(limiters)
    if tensor_memory_columns > 0 and _TENSOR_MEMORY // tensor_memory_columns < blocks:
        blocks, limiter = _TENSOR_MEMORY // tensor_memory_columns, "tensor memory"
    return 100 * blocks * threads // MULTIPROCESSORS[architecture].threads, limiter


def _inspect_amd(compiled: Any, target: Target) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    warps, shared = int(compiled.metadata.num_warps), int(compiled.metadata.shared)
    waves = _captured(r"; Occupancy: (\d+)", text)
    percent, limiter = amd_occupancy(target, warps, waves, shared)
    loads = re.findall(r"^\s+((?:global|buffer|flat)_load_\w+)", text, re.M)
    # Spilled scalar registers lie in lanes of vector registers, not in memory.
    scratch = max(
        _captured(r"\.private_segment_fixed_size: (\d+)", text),
        4 * _captured(r"\.vgpr_spill_count: (\d+)", text),
    )
    return {
        "threads": warps * target.gpu.warp_size,
        "registers": _captured(r"\.vgpr_count: +(\d+)", text),
        "spill_bytes": scratch,
        "shared_bytes": shared,
        "occupancy": percent,
        "limiter": limiter,
        "tensor_instructions": len(re.findall(r"^\s+v_(?:mfma|wmma)_", text, re.M)),
        "products_per_issue": 0,
        "loads": len(loads),
        "wide_loads": sum(name.endswith(("dwordx4", "b128")) for name in loads),
    }


def amd_occupancy(target: Target, warps: int, waves: int, shared_bytes: int) -> tuple[int, str]:
    """Percent of a compute unit's waves that run at once, and what admits no more.

    Args:
        target: an AMD target.
        warps: waves of a workgroup.
        waves: that a SIMD's registers hold, as LLVM says.
        shared_bytes: of a workgroup.
    """
    unit = COMPUTE_UNITS[target.name]
    by_registers = waves * unit.simds // warps
    by_shared = unit.lds_bytes // shared_bytes if shared_bytes else by_registers
    groups = min(by_registers, by_shared)
    limiter = "shared memory" if by_shared < by_registers else "registers"
    if groups == unit.waves * unit.simds // warps:
        limiter = "warps"
    return 100 * groups * warps // (unit.simds * unit.waves), limiter


def _captured(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler did not write {pattern!r}")
    return int(found[1])
