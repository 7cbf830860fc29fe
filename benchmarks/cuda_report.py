"""``python -m benchmarks.cuda_report``: one group of CIEMA on the cuda backend, as emulated.

Runs the evaluation of FusedCIEMA (C = 32, one group) in float16 on maps of 14×14 and 56×56 through
the emulator, holds the result against float64, and writes CUDA_REPORT.md: for each launch its grid,
what it asks of memory, tensor-core instructions, and how far its requests are from the best that
the same bytes allow. Takes minutes and no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

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


def ratio(totals: dict[str, int], space: str) -> str:
    """Units over the fewest possible, of reads and writes."""
    kinds = ("read", "write")
    units = sum(totals.get(f"{space}_{kind}_units", 0) for kind in kinds)
    ideal = sum(totals.get(f"{space}_{kind}_ideal_units", 0) for kind in kinds)
    return f"{units / ideal:.2f}" if ideal else "–"


def row(launch: Launch, made: KernelLaunch, report: Report) -> list[str]:
    """One launch for the table."""
    totals = report.totals
    once = sum(sum(pair) for pair in report.touched.values())
    mma = sum(count for name, count in totals.items() if name.startswith("mma_"))
    return [
        *(f"`{made.kernel}`", "×".join(map(str, made.grid)), str(made.threads)),
        *(str(made.dynamic_shared_bytes), str(totals.get("global_read_bytes", 0))),
        *(str(totals.get("global_write_bytes", 0)), str(once)),
        *(ratio(totals, "global"), ratio(totals, "shared")),
        *(str(mma), str(totals.get("ldmatrix", 0)), str(totals.get("barriers", 0))),
        str(len(report.findings)),
    ]


def section(size: int) -> tuple[str, int]:
    """The table of one size, and how many findings there were."""
    log, error = run(size)
    made = [dry([launch]) for launch, _ in log]
    lines = [
        f"## {size}×{size}: {sum(map(len, made))} launches, relative error {error:.1e}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for (launch, report), kernels in zip(log, made, strict=True):
        lines.append("| " + " | ".join(row(launch, kernels[-1], report)) + " |")
    return "\n".join(lines), sum(len(report.findings) for _, report in log)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; 1 if something was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=FILE, help="the file (CUDA_REPORT.md)")
    options = parser.parse_args(arguments)
    texts, findings = [HEAD], 0
    for size in SIZES:
        print(f"emulating {size}×{size} …", flush=True)
        text, found = section(size)
        texts.append(text)
        findings += found
    options.out.write_text("\n\n".join(text.strip() for text in texts) + "\n", encoding="utf-8")
    print(f"wrote {options.out.name}, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
