"""What the compiled CUDA kernels use of a multiprocessor, held against gpu_budgets.toml.

``python benchmarks/budgets.py`` compiles every ``csrc/cuda/*.cu`` for every architecture (no GPU is
needed), prints registers, spills, shared memory, occupancy, tensor instructions and the width of
loads of every kernel, and exits with 1 if one is past its budget. ``--update`` writes what it found
as the new budgets. Dynamic shared memory is that of the launches at the paper's size.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: find the packages beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import budget_file, sass
from benchmarks.occupancy import MULTIPROCESSORS, occupancy

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
BUILD = runpy.run_path(str(ROOT / "setup.py"), run_name="build")  # its flags
# What a row of the file holds: at most, then at least.
_AT_MOST = ("registers", "shared_bytes", "spill_bytes", "stack_bytes")
_AT_LEAST = ("occupancy", "tensor_instructions", "products_per_issue", "wide_loads")


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on one architecture; bytes are those of a block (stack: a thread).

    Of its machine code: tensor instructions, multiply-adds on tensor cores for each instruction of
    the loop that has most of them, loads of global memory and those of 16 bytes a thread.
    """

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
    tensor_instructions: int = 0
    products_per_issue: int = 0
    loads: int = 0
    wide_loads: int = 0


def find_nvcc() -> str | None:
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


def measure(
    nvcc: str,
    source: Path,
    architectures: Iterable[int],
    dynamic: Mapping[str, int] | None = None,
) -> list[Usage]:
    """Compiles one file for several architectures and reads what its kernels use.

    Args:
        nvcc: the compiler.
        source: a CUDA file.
        architectures: keys of ``MULTIPROCESSORS``.
        dynamic: kernel → bytes of dynamic shared memory.

    Raises:
        RuntimeError: nvcc's message, if it does not compile, or warns.
    """
    found: list[Usage] = []
    with tempfile.TemporaryDirectory() as folder:
        cubin, families = Path(folder) / "kernels.cubin", set()
        for architecture in architectures:
            flag = BUILD["code_flag"](f"{architecture // 10}.{architecture % 10}")
            family = _captured(r"arch=(compute_\d+)", flag)
            ptx = Path(folder) / family / f"{source.stem}.ptx"
            if family not in families:
                families.add(family)
                ptx.parent.mkdir()
                flags = [*BUILD["NVCC_FLAGS"], f"-arch={family}"]
                run_compiler([nvcc, *flags, "-ptx", str(source), "-o", str(ptx)])
            command = [nvcc, flag, "-Xptxas", "-O3,-v", "-cubin", str(ptx), "-o", str(cubin)]
            told = run_compiler(command)
            code = sass.text_sections(cubin.read_bytes())
            listings = sass.disassemble_code(list(code.values()), f"sm_{architecture}")
            counted = dict(zip(code, map(sass.counts, listings), strict=True))
            threads = _block_threads(ptx.read_text())
            found += _usages(told, (source.stem, architecture), threads, counted, dynamic or {})
    return found


def _block_threads(ptx: str) -> dict[str, int]:
    """Kernel → the most threads of a block, where its ``__launch_bounds__`` say so."""
    entries = re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx)
    return {name: int(count) for name, count in entries}


def run_compiler(command: list[str]) -> str:
    """What a compiler said; a warning is an error."""
    result = subprocess.run(command, capture_output=True, text=True)
    told = result.stdout + result.stderr
    if result.returncode != 0 or "warning" in told:
        raise RuntimeError(f"{' '.join(command)} failed:\n{told}")
    return told


def measure_library(library: Path, dynamic: Mapping[str, int] | None = None) -> list[Usage]:
    """What the kernels in a built library use, without compiling them again.

    Spills are not told apart from other local memory there: they are in ``stack_bytes``. Kernels
    are of no source file.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        command = [str(sass.tool_path("cuobjdump")), "--extract-elf", "all", str(library.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        for file in sorted(Path(folder).glob("*.cubin")):
            architecture = int(_captured(r"\.sm_(\d+)\.cubin$", file.name))
            cubin = file.read_bytes()
            threads, code = sass.block_threads(cubin), sass.text_sections(cubin)
            listings = sass.disassemble_code(list(code.values()), f"sm_{architecture}")
            counted = dict(zip(code, map(sass.counts, listings), strict=True))
            told = sass.run("cuobjdump", "--dump-resource-usage", str(file))
            for symbol, numbers in re.findall(r"Function (\w+):\s*([^\n]+)", told):
                uses = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", numbers)}
                kernel = short_name(symbol)
                found.append(
                    _usage(
                        ("", kernel, architecture),
                        *(threads[symbol], uses["REG"], uses["STACK"] + uses["LOCAL"], 0),
                        max(uses["SHARED"] - _reserved(architecture), 0)
                        + (dynamic or {}).get(kernel, 0),
                        counted[symbol],
                    )
                )
    return found


def _usages(
    ptxas: str,
    where: tuple[str, int],
    threads: Mapping[str, int],
    counted: Mapping[str, dict[str, int]],
    dynamic: Mapping[str, int],
) -> Iterable[Usage]:
    """Reads the report of ``ptxas -v``: for each kernel an entry, its properties and its use."""
    source, architecture = where
    for entry in re.split(r"(?=Compiling entry function ')", ptxas)[1:]:
        symbol = _captured(r"Compiling entry function '(\w+)'", entry)
        kernel = short_name(symbol)
        if symbol not in threads:
            raise RuntimeError(f"{kernel} has no __launch_bounds__; its occupancy can't be told")
        registers = int(_captured(r"Used (\d+) registers", entry))
        shared = sum(int(found) for found in re.findall(r"(\d+) bytes smem", entry))
        shared += dynamic.get(kernel, 0)
        stores = int(_captured(r"(\d+) bytes spill stores", entry))
        loads = int(_captured(r"(\d+) bytes spill loads", entry))
        stack = int(_captured(r"(\d+) bytes stack frame", entry))
        yield _usage(
            (source, kernel, architecture),
            *(threads[symbol], registers, stack, stores + loads, shared, counted[symbol]),
        )


def _usage(
    where: tuple[str, str, int],
    threads: int,
    registers: int,
    stack: int,
    spills: int,
    shared: int,
    counted: dict[str, int],
) -> Usage:
    source, kernel, architecture = where
    blocks, limiters = occupancy(architecture, threads, registers, shared)
    return Usage(
        source=source,
        kernel=kernel,
        architecture=architecture,
        threads=threads,
        registers=registers,
        shared_bytes=shared,
        spill_bytes=spills,
        stack_bytes=stack,
        occupancy=100 * blocks * threads // MULTIPROCESSORS[architecture].threads,
        limiter=", ".join(limiters),
        **counted,
    )


def _reserved(architecture: int) -> int:
    """Shared memory that cuobjdump counts beside a kernel's own: the system's, from sm_90 on."""
    return 1024 if architecture >= 90 else 0


def _captured(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas did not say {pattern!r} in:\n{text}")
    return found[1]


def short_name(symbol: str) -> str:
    """``forward_kernel<float, 1>`` for a mangled name: no namespaces, result or parameters."""
    full = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    head = re.sub(r"^void ", "", full.strip()).replace("(anonymous namespace)::", "")
    head = re.sub(r"\([\w: ]+\)(?=-?\d)", "", head).partition("(")[0]  # casts of enumerators
    return re.sub(r"\b(?:\w+::)+", "", head)


def measure_all(nvcc: str, architectures: Iterable[int] = ARCHITECTURES) -> list[Usage]:
    """``measure`` for every ``csrc/cuda/*.cu``, two compilers at a time."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    dynamic, wanted = _dynamic_shared_bytes(), list(architectures)
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(lambda source: measure(nvcc, source, wanted, dynamic), sources))
    usages = [usage for usages in found for usage in usages]
    return sorted(usages, key=lambda u: (u.source, u.kernel, u.architecture))


def _dynamic_shared_bytes() -> Mapping[str, int]:
    from benchmarks import cuda_capture  # which imports this module

    return cuda_capture.dynamic_shared_bytes(cuda_capture.all_launches())


def stored() -> dict[str, Any]:
    """The budgets of the CUDA kernels: source, kernel, architecture, name of a number."""
    return named(budget_file.read("cuda"))


def named(rows: dict[str, Any]) -> dict[str, Any]:
    """The file's rows with a name for every number."""
    columns = (*_AT_MOST, *_AT_LEAST)
    return {
        source: {
            kernel: {sm: dict(zip(columns, row, strict=True)) for sm, row in by_sm.items()}
            for kernel, by_sm in kernels.items()
        }
        for source, kernels in rows.items()
    }


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
        for name in _AT_MOST:
            if getattr(usage, name) > budget[name]:
                complaints.append(f"{where}: {name} {getattr(usage, name)} > {budget[name]}")
        for name in _AT_LEAST:
            if getattr(usage, name) < budget[name]:
                told = f", limited by {usage.limiter}" if name == "occupancy" else ""
                complaints.append(f"{where}: {name} {getattr(usage, name)} < {budget[name]}{told}")
    for source, kernels in budgets.items():
        for kernel in kernels:
            if (source, kernel) not in seen:
                complaints.append(f"{source}: {kernel} has a budget, but is not built any more")
    return complaints


def past_budget_of_library(usages: Iterable[Usage], budgets: dict[str, Any]) -> list[str]:
    """`past_budget` for what `measure_library` found, which knows no source files."""
    sources: dict[str, list[str]] = {}
    for source, kernels in budgets.items():
        for kernel in kernels:
            sources.setdefault(kernel, []).append(source)
    complaints, seen = [], set()
    for usage in usages:
        seen.add(usage.kernel)
        told: list[list[str]] = []
        for source in sources.get(usage.kernel, ["?"]):
            own = {source: {usage.kernel: budgets.get(source, {}).get(usage.kernel, {})}}
            told.append(past_budget([replace(usage, source=source)], own))
        fewest: list[str] = min(told, key=len)  # of two files with such a kernel the one that fits
        complaints += fewest
    complaints += [f"{kernel} has a budget, but is not built" for kernel in set(sources) - seen]
    return complaints


def as_toml(usages: Iterable[Usage], compiler: str) -> str:
    """The budgets file that these usages just meet."""
    lines = [
        "# What every CUDA kernel may use: registers of a thread, bytes of a block (stack: of a",
        "# thread); and at least: occupancy in percent of a multiprocessor's threads, instructions",
        "# of tensor cores, multiply-adds on them for each instruction of the loop that has most,",
        "# loads of 16 bytes a thread.",
        "# Written by `python benchmarks/budgets.py --update`, compared by tests/test_budgets.py.",
        f"# {compiler}",
        f"# Columns: {', '.join((*_AT_MOST, *_AT_LEAST))}",
    ]
    heading = None
    for usage in usages:
        if (usage.source, usage.kernel) != heading:
            heading = (usage.source, usage.kernel)
            lines += ["", f'[{usage.source}."{usage.kernel}"]  # {usage.threads} threads']
        numbers = [str(getattr(usage, name)) for name in (*_AT_MOST, *_AT_LEAST)]
        lines.append(f"sm_{usage.architecture} = [{', '.join(numbers)}]  # {usage.limiter}")
    return "\n".join(lines) + "\n"


def as_table(usages: Iterable[Usage]) -> str:
    """The usages for a person to read."""
    heads = (
        *("kernel", "arch", "threads", "regs", "shared", "spills", "occupancy", "limited by"),
        *("tensor", "MAC/issue", "loads of 16 bytes"),
    )
    rows = [
        (
            *(usage.kernel, f"sm_{usage.architecture}", str(usage.threads), str(usage.registers)),
            *(str(usage.shared_bytes), str(usage.spill_bytes), f"{usage.occupancy} %"),
            *(usage.limiter, str(usage.tensor_instructions), str(usage.products_per_issue)),
            f"{usage.wide_loads}/{usage.loads}",
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
        budget_file.write("cuda", as_toml(usages, f"Compiler: nvcc {release}."))
        return 0
    complaints = past_budget(usages, stored())
    print("\n".join(complaints), file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
