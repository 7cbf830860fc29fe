"""``python -m benchmarks.gpu_choice TIMINGS``: what "auto" is to take on a GPU, from its timings.

TIMINGS is the timings.json of ``benchmarks/on_gpu.sh``. For every stage, dtype and batch the
quicker of the right ones among the cuda and the triton backend is noted, in place of what was known
of the same on GPUs of that compute capability; all other rows stay. MSFF in training counts by what
the network takes beyond CIEMA, if it was not timed itself. Prints the table; ``--write`` rewrites
fused/backends/gpu_choice.json, which ships with the package.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fused.backends.gpu_choice import FILE, FORMAT, Measured, read

from .gpu_case import DTYPES
from .gpu_report import auto_choices, cases, kernel_times
from .gpu_rows import LAYOUTS, SCALES, TRAINING, Facts

CANDIDATES = ("cuda", "triton")


def msff_in_training(rows: Iterable[Facts]) -> list[Facts]:
    """Cases of MSFF in training, from those of the network and of CIEMA.

    The rest of the network is PyTorch's with every backend, so the difference ranks them.
    """
    rows = [row for row in rows if row["mode"] == TRAINING]
    known = {case for case, cells in cases(rows).items() if kernel_times(cells)}
    whole = {case: cells for case, cells in cases(rows).items() if case.startswith("network ")}
    out = []
    for case, cells in whole.items():
        own = case.replace("network", "msff", 1)
        ciema = kernel_times(cases(rows).get(case.replace("network", "ciema", 1), {}))
        times = kernel_times(cells)
        both = {
            name: times[name] - ciema[name] for name in CANDIDATES if name in times.keys() & ciema
        }
        if own not in known and len(both) == len(CANDIDATES):
            first = next(iter(cells.values()))
            out.append({**first, "case": own, "subject": "msff", "ms": both})
    return out


def measured(result: dict[str, Any]) -> list[Measured]:
    """What a result file says of the GPU backends, one row a stage, mode, dtype and batch.

    Raises:
        ValueError: it was not taken on an NVIDIA GPU.
    """
    machine = result.get("machine") or {}
    if not machine.get("capability"):
        raise ValueError("these timings are not of a CUDA device")
    size = SCALES[result["scale"]][1] // 4
    out = []
    for choice in (*auto_choices(result["rows"]), *msff_in_training(result["rows"])):
        times = {name: ms for name, ms in choice["ms"].items() if name in CANDIDATES}
        if not times or choice["precision"] == "tf32" or choice["layout"] != LAYOUTS[0]:
            continue
        out.append(
            Measured(
                *(machine["gpu"], machine["capability"], choice["subject"]),
                choice["mode"] == TRAINING,
                str(DTYPES[choice["precision"]]).removeprefix("torch."),
                choice["batch"] * size * size,
                min(times, key=times.__getitem__),
            )
        )
    return out


def merged(before: Sequence[Measured], found: Sequence[Measured]) -> list[Measured]:
    """`found`, and of `before` what was not measured again; in a fixed order."""

    def case(row: Measured) -> tuple[str, str, bool, str, int]:
        return row.capability, row.stage, row.backward, row.dtype, row.pixels

    rows = {case(row): row for row in (*before, *found)}
    return [rows[key] for key in sorted(rows)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_choice",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("timings", type=Path, help="timings.json of benchmarks/on_gpu.sh")
    parser.add_argument("--write", action="store_true", help=f"rewrite {FILE.name}")
    options = parser.parse_args(arguments)
    try:
        found = measured(json.loads(options.timings.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {options.timings}: {error}", file=sys.stderr)
        return 2
    for row in found:
        mode = "training" if row.backward else "forward"
        print(f"{row.stage} {mode} {row.dtype} {row.pixels} pixels: {row.quickest}")
    if options.write:
        rows = [asdict(row) for row in merged(read(), found)]
        FILE.write_text(json.dumps({"format": FORMAT, "measured": rows}, indent=1) + "\n")
        print(f"wrote {FILE.name}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
