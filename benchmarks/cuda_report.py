"""``python -m benchmarks.cuda_report``: one group of CIEMA on the cuda backend, as emulated.

Runs the evaluation of FusedCIEMA (C = 32, one group) in float16 on maps of 14×14 and 56×56 through
the emulator, holds the result against float64, and writes CUDA_REPORT.md: for each launch its grid,
what it asks of memory, tensor-core instructions, and how far its requests are from the best that
the same bytes allow. The last are held against gpu_budgets.toml, or with ``--update`` written
there. Takes seconds and no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import budget_file
from benchmarks.cuda_capture import ROOT, KernelLaunch, dry
from fused import FusedCIEMA
from fused.backends.cuda.launch import Launch

from emulator import Report, emulated  # isort: skip  # found by cuda_capture

FILE = ROOT / "benchmarks" / "CUDA_REPORT.md"
CHANNELS, SIZES = 32, (14, 56)
HEAD = """# The CUDA kernels of one group of CIEMA, emulated

Written by `python -m benchmarks.cuda_report`: evaluation, C = 32, one group, batch 1, float16,
NCHW. Every launch ran under the emulator with all its checks. Bytes are those of the kernels'
requests; *once* counts a byte once a launch, as device memory sees it through a cache that holds
the maps. Sectors (32 bytes) and wavefronts are given over the fewest that the same requests could
need: 1.00 is fully coalesced, or free of bank conflicts.
"""
REQUESTS = ("sectors", "wavefronts")
COLUMNS = (
    *("kernel", "grid", "threads", "shared bytes", "read", "written", "once", "sectors"),
    *("wavefronts", "mma", "ldmatrix", "barriers", "findings"),
)


def run(size: int) -> tuple[list[tuple[Launch, Report]], float]:
    """The launches of one forward with their reports, and the error against float64."""
    torch.manual_seed(0)
    block = FusedCIEMA(CHANNELS, factor=1).eval()
    for name, buffer in block.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    x = torch.randn(1, CHANNELS, size, size).half()
    with torch.no_grad():
        want = block.double()(x.double())
        log: list[tuple[Launch, Report]] = []
        half = block.half()
        half.backend = "cuda"
        with emulated(lambda launch, report: log.append((launch, report))):
            out = half(x)
    return log, ((out - want).norm() / want.norm()).item()


def ratio(totals: Mapping[str, int], space: str) -> float | None:
    """Units over the fewest possible, of reads and writes; None if there are none."""
    kinds = ("read", "write")
    units = sum(totals.get(f"{space}_{kind}_units", 0) for kind in kinds)
    ideal = sum(totals.get(f"{space}_{kind}_ideal_units", 0) for kind in kinds)
    return units / ideal if ideal else None


def _told(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def row(launch: Launch, made: KernelLaunch, report: Report) -> list[str]:
    """One launch for the table."""
    totals = report.totals
    once = sum(sum(pair) for pair in report.touched.values())
    mma = sum(count for name, count in totals.items() if name.startswith("mma_"))
    return [
        *(f"`{made.kernel}`", "×".join(map(str, made.grid)), str(made.threads)),
        *(str(made.dynamic_shared_bytes), str(totals.get("global_read_bytes", 0))),
        *(str(totals.get("global_write_bytes", 0)), str(once)),
        *(_told(ratio(totals, "global")), _told(ratio(totals, "shared"))),
        *(str(mma), str(totals.get("ldmatrix", 0)), str(totals.get("barriers", 0))),
        str(len(report.findings)),
    ]


@dataclass(frozen=True)
class Emulated:
    """A forward of one size: its launches with their kernels and reports."""

    size: int
    launches: list[tuple[Launch, list[KernelLaunch], Report]]
    error: float

    @property
    def findings(self) -> int:
        """What the emulator found."""
        return sum(len(report.findings) for _, _, report in self.launches)

    @property
    def requests(self) -> dict[str, list[int]]:
        """Kernel, numbered → sectors and wavefronts, per cent of the fewest; 0: there are none."""
        return {
            f"{number} {made[-1].kernel}": [
                round(100 * (ratio(report.totals, space) or 0)) for space in ("global", "shared")
            ]
            for number, (_, made, report) in enumerate(self.launches, 1)
        }


def emulate(size: int) -> Emulated:
    """One forward on maps of size×size."""
    log, error = run(size)
    return Emulated(size, [(launch, dry([launch]), report) for launch, report in log], error)


def section(found: Emulated) -> str:
    """The table of one size."""
    size, count = found.size, sum(len(made) for _, made, _ in found.launches)
    lines = [
        f"## {size}×{size}: {count} launches, relative error {found.error:.1e}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for launch, made, report in found.launches:
        lines.append("| " + " | ".join(row(launch, made[-1], report)) + " |")
    return "\n".join(lines)


def stored() -> dict[str, dict[str, list[int]]]:
    """The budgets: size, kernel, sectors and wavefronts."""
    table: dict[str, dict[str, list[int]]] = budget_file.read("emulated").get("emulated", {})
    return table


def past_budget(found: Emulated, budgets: Mapping[str, Mapping[str, list[int]]]) -> list[str]:
    """One sentence for every launch that asks for more than its budget, has none, or is gone."""
    rows, complaints = budgets.get(str(found.size), {}), []
    for kernel, numbers in found.requests.items():
        if kernel not in rows:
            complaints.append(f"{found.size}×{found.size}: {kernel} has no budget")
            continue
        for name, value, limit in zip(REQUESTS, numbers, rows[kernel], strict=True):
            if value > limit:
                complaints.append(
                    f"{found.size}×{found.size}: {kernel}: {name} {value} % > {limit} %"
                )
    gone = set(rows) - set(found.requests)
    return complaints + [f"{found.size}×{found.size}: {kernel} is not launched" for kernel in gone]


def as_toml(sizes: Iterable[Emulated]) -> str:
    """The part of the budgets file that these forwards just meet."""
    lines = [
        "# Of every launch of a forward of one group, by the maps' size: sectors of device",
        "# memory and wavefronts of shared memory (more than 100: bank conflicts), in per cent of",
        "# the fewest that the same requests need, at most; 0: there are none.",
        "# Written by `python -m benchmarks.cuda_report --update`, compared by",
        "# tests/test_budgets.py.",
    ]
    for found in sizes:
        lines += ["", f"[emulated.{found.size}]"]
        lines += [f'"{kernel}" = {numbers}' for kernel, numbers in found.requests.items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; 1 if something was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=FILE, help="the file (CUDA_REPORT.md)")
    parser.add_argument("--update", action="store_true", help="write what is found as the budgets")
    options = parser.parse_args(arguments)
    sizes = []
    for size in SIZES:
        print(f"emulating {size}×{size} …", flush=True)
        sizes.append(emulate(size))
    texts = [HEAD, *map(section, sizes)]
    options.out.write_text("\n\n".join(text.strip() for text in texts) + "\n", encoding="utf-8")
    findings = sum(found.findings for found in sizes)
    print(f"wrote {options.out.name}, {findings} findings")
    if options.update:
        budget_file.write("emulated", as_toml(sizes))
        return 1 if findings else 0
    complaints = [told for found in sizes for told in past_budget(found, stored())]
    print("\n".join(complaints), file=sys.stderr)
    return 1 if findings or complaints else 0


if __name__ == "__main__":
    sys.exit(main())
