"""What the compiled CUDA kernels use of a multiprocessor, held against gpu_budgets.toml.

``python benchmarks/budgets.py`` compiles every ``csrc/cuda/*.cu`` for every architecture (no GPU is
needed), prints registers, spills, shared memory and occupancy of every kernel, and exits with 1 if
one is past its budget. ``--update`` writes what it found as the new budgets.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = ROOT / "benchmarks" / "gpu_budgets.toml"
TRITON_MARK = "# ---- Triton kernels\n"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# As setup.py builds them.
_NVCC_FLAGS = (
    *("-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ programming guide, table of compute capabilities)."""

    threads: int
    shared_bytes: int
    blocks: int
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(2048, 167936, 32),
    86: Multiprocessor(1536, 102400, 16),
    89: Multiprocessor(1536, 102400, 24),
    90: Multiprocessor(2048, 233472, 32),
    100: Multiprocessor(2048, 233472, 32),
    120: Multiprocessor(1536, 102400, 24),
}


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on one architecture; bytes are those of a block (stack: a thread)."""

    source: str
    kernel: str
    architecture: int
    threads: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    stack_bytes: int
    occupancy: int
    limiter: str


def occupancy(
    architecture: int, threads: int, registers: int, shared_bytes: int
) -> tuple[int, tuple[str, ...]]:
    """Blocks that fit a multiprocessor at once, and what admits no more.

    Args:
        architecture: a key of ``MULTIPROCESSORS``.
        threads: of a block.
        registers: of a thread.
        shared_bytes: of a block, static and dynamic.

    Returns:
        The number of blocks and the limiting resources among ``warps``, ``blocks``, ``registers``
        and ``shared memory``. The rules are those of ``cuda_occupancy.h``: registers are given to
        a warp in units of 256 and the four quarters of a multiprocessor hold whole warps; shared
        memory comes in units of 128 bytes, 1 KiB of it to the system for each block.
    """
    limits = MULTIPROCESSORS[architecture]
    warps = -(-threads // 32)
    by_resource = {"warps": limits.threads // 32 // warps, "blocks": limits.blocks}
    if registers > 0:
        registers_of_warp = -(-registers * 32 // 256) * 256
        warps_that_fit = limits.registers // 4 // registers_of_warp * 4
        # A launch is checked as if every quarter held as many warps as the fullest.
        launchable = registers_of_warp * (-(-warps // 4) * 4) <= limits.registers
        by_resource["registers"] = warps_that_fit // warps if launchable else 0
    shared_of_block = -(-(shared_bytes + 1024) // 128) * 128
    by_resource["shared memory"] = limits.shared_bytes // shared_of_block
    blocks = min(by_resource.values())
    return blocks, tuple(name for name, limit in by_resource.items() if limit == blocks)


def find_nvcc() -> str | None:
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


def measure(nvcc: str, source: Path, architecture: int) -> list[Usage]:
    """Compiles one file for one architecture and reads what ptxas says of every kernel in it.

    Raises:
        RuntimeError: nvcc's message, if it does not compile.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise RuntimeError("torch is not installed; its headers are needed to compile the kernels")
    include = Path(torch.origin).parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *_NVCC_FLAGS, f"-arch=sm_{architecture}", "-Xptxas", "-v", f"-I{include}"]
        command += ["--keep", "--keep-dir", folder, "-cubin", str(source)]
        command += ["-o", str(Path(folder) / "kernels.cubin")]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
        ptx = (Path(folder) / f"{source.stem}.ptx").read_text()
    threads = {
        name: int(count)
        for name, count in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx)
    }
    return list(_usages(result.stdout + result.stderr, source.stem, architecture, threads))


def _usages(ptxas: str, source: str, architecture: int, threads: dict[str, int]) -> Iterable[Usage]:
    """Reads the report of ``ptxas -v``: for each kernel an entry, its properties and its use."""
    for entry in re.split(r"(?=Compiling entry function ')", ptxas)[1:]:
        symbol = _captured(r"Compiling entry function '(\w+)'", entry)
        kernel = short_name(symbol)
        if symbol not in threads:
            raise RuntimeError(f"{kernel} has no __launch_bounds__; its occupancy can't be told")
        registers = int(_captured(r"Used (\d+) registers", entry))
        shared = sum(int(found) for found in re.findall(r"(\d+) bytes smem", entry))
        stores = int(_captured(r"(\d+) bytes spill stores", entry))
        loads = int(_captured(r"(\d+) bytes spill loads", entry))
        blocks, limiters = occupancy(architecture, threads[symbol], registers, shared)
        yield Usage(
            source=source,
            kernel=kernel,
            architecture=architecture,
            threads=threads[symbol],
            registers=registers,
            shared_bytes=shared,
            spill_bytes=stores + loads,
            stack_bytes=int(_captured(r"(\d+) bytes stack frame", entry)),
            occupancy=100 * blocks * threads[symbol] // MULTIPROCESSORS[architecture].threads,
            limiter=", ".join(limiters),
        )


def _captured(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas did not say {pattern!r} in:\n{text}")
    return found[1]


def short_name(symbol: str) -> str:
    """``forward_kernel<float, 1>`` for a mangled name: no namespaces, result or parameters."""
    full = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    head = re.sub(r"^void ", "", full.strip()).replace("(anonymous namespace)::", "")
    head = re.sub(r"\((int|unsigned int|bool)\)", "", head).partition("(")[0]
    name, opening, arguments = head.partition("<")
    return name.rpartition("::")[2] + opening + arguments


def measure_all(nvcc: str, architectures: Iterable[int] = ARCHITECTURES) -> list[Usage]:
    """``measure`` for every ``csrc/cuda/*.cu`` and architecture, two compilers at a time."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    jobs = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(lambda job: measure(nvcc, *job), jobs))
    usages = [usage for usages in found for usage in usages]
    return sorted(usages, key=lambda u: (u.source, u.kernel, u.architecture))


def parts(text: str) -> tuple[str, str]:
    """The budgets file's part for CUDA, written here, and Triton's, which triton_budgets.py writes.

    The second begins at the line that says so.
    """
    cuda, mark, triton = text.partition(TRITON_MARK)
    return cuda, mark + triton


def stored() -> dict[str, Any]:
    """The budgets of the CUDA kernels."""
    return tomllib.loads(parts(BUDGETS.read_text())[0])


def past_budget(usages: Iterable[Usage], budgets: dict[str, Any]) -> list[str]:
    """One sentence for every kernel that uses more than its budget, or has none, or is gone."""
    complaints = []
    seen = set()
    for usage in usages:
        where = f"{usage.source}: {usage.kernel} on sm_{usage.architecture}"
        seen.add((usage.source, usage.kernel))
        of_kernel = budgets.get(usage.source, {}).get(usage.kernel, {})
        budget = of_kernel.get(f"sm_{usage.architecture}")
        if budget is None:
            complaints.append(f"{where} has no budget")
            continue
        for name in ("registers", "shared_bytes", "spill_bytes", "stack_bytes"):
            if getattr(usage, name) > budget[name]:
                complaints.append(f"{where}: {name} {getattr(usage, name)} > {budget[name]}")
        if usage.occupancy < budget["occupancy"]:
            complaints.append(
                f"{where}: occupancy {usage.occupancy} % < {budget['occupancy']} %,"
                f" limited by {usage.limiter}"
            )
    for source, kernels in budgets.items():
        for kernel in kernels:
            if (source, kernel) not in seen:
                complaints.append(f"{source}: {kernel} has a budget, but is not built any more")
    return complaints


def as_toml(usages: Iterable[Usage], compiler: str) -> str:
    """The budgets file that these usages just meet."""
    lines = [
        "# What every CUDA kernel may use: registers of a thread, bytes of a block (stack: of a",
        "# thread), and the least occupancy in percent of a multiprocessor's threads.",
        "# Written by `python benchmarks/budgets.py --update`, compared by tests/test_budgets.py.",
        f"# {compiler}",
    ]
    heading = None
    for usage in usages:
        if (usage.source, usage.kernel) != heading:
            heading = (usage.source, usage.kernel)
            lines += ["", f'[{usage.source}."{usage.kernel}"]  # {usage.threads} threads']
        lines.append(
            f"sm_{usage.architecture} = {{ registers = {usage.registers},"
            f" shared_bytes = {usage.shared_bytes}, spill_bytes = {usage.spill_bytes},"
            f" stack_bytes = {usage.stack_bytes}, occupancy = {usage.occupancy} }}"
            f"  # {usage.limiter}"
        )
    return "\n".join(lines) + "\n"


def as_table(usages: Iterable[Usage]) -> str:
    """The usages for a person to read."""
    heads = ("kernel", "arch", "threads", "regs", "shared", "spills", "occupancy", "limited by")
    rows = [
        (
            *(usage.kernel, f"sm_{usage.architecture}", str(usage.threads), str(usage.registers)),
            *(str(usage.shared_bytes), str(usage.spill_bytes), f"{usage.occupancy} %"),
            usage.limiter,
        )
        for usage in usages
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    )


def main() -> int:
    """Compiles, prints, compares or updates; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write what is found as the budgets")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc is not installed: nothing can be compiled", file=sys.stderr)
        return 2
    usages = measure_all(nvcc)
    print(as_table(usages))
    if options.update:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
        release = _captured(r"release ([\d.]+)", told.stdout)
        _, triton = parts(BUDGETS.read_text())
        cuda = as_toml(usages, f"Compiler: nvcc {release}.")
        BUDGETS.write_text(f"{cuda}\n{triton}" if triton else cuda)
        return 0
    complaints = past_budget(usages, stored())
    print("\n".join(complaints), file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
