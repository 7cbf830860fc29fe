"""What the compiled Triton kernels use of a multiprocessor, held against gpu_budgets.toml.

``python benchmarks/triton_budgets.py`` compiles every kernel of the triton backend, in every
configuration of its table, for every architecture (no GPU is needed), prints registers, shared
memory, tensor-core instructions, occupancy and its limiter, and exits with 1 if a kernel is past
its budget, has none or is gone. No kernel may spill a register on NVIDIA GPUs, and no product of
half precision may miss the tensor cores, whatever the file says.

By default a quarter of the combinations is compiled, those that differ most. ``--all`` takes all of
them (16 to 21 minutes on two busy cores, most of it being in Triton's cache) and tells of budgets
without a kernel. ``--update`` writes the file, so it belongs with ``--all``.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: find the packages beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import triton

from benchmarks import budget_file
from benchmarks.triton_capture import LAYOUTS
from benchmarks.triton_compile import TARGETS
from benchmarks.triton_report import as_markdown, as_text
from benchmarks.triton_usage import (
    DTYPES,
    Failure,
    Found,
    Job,
    Row,
    all_jobs,
    measure_all,
    quick_jobs,
    rows,
)
from fused.backends.triton import INTERPRETER, KERNELS, configs

# What a row of the file holds, in this order.
_AT_MOST = ("registers", "spill_bytes", "shared_bytes")
_AT_LEAST = ("occupancy", "tensor_instructions", "products_per_issue", "wide_loads")
COLUMNS = (*_AT_MOST, *_AT_LEAST)
# Spills of AMD's targets are budgeted as the rest is; here they are faults.
SPILL_FREE = tuple(name for name, target in TARGETS.items() if target.is_nvidia)


def faults(found: Found) -> list[str]:
    """One sentence for what no budget can allow."""
    complaints = [f"{one.what}: {one.message}" for one in found if isinstance(one, Failure)]
    told = set()
    for usage in found:
        if isinstance(usage, Failure) or (usage.key, usage.binary) in told:
            continue
        told.add((usage.key, usage.binary))
        code, where = usage.code, f"{usage.key}, {usage.call}"
        if code.spill_bytes > 0 and usage.key.target in SPILL_FREE:
            complaints.append(f"{where}: spills {code.spill_bytes} bytes of registers")
        if code.slow_products > 0:
            products = f"{code.slow_products} of {code.half_products} products"
            complaints.append(f"{where}: {products} of half precision are not on tensor cores")
        elif code.half_products > 0 and code.tensor_instructions == 0:
            complaints.append(f"{where}: products of half precision, but no tensor instruction")
        room = TARGETS[usage.key.target].shared_bytes
        if code.shared_bytes > room:
            complaints.append(f"{where}: {code.shared_bytes} bytes of shared memory > {room}")
    return complaints


def past_budget(found: Sequence[Row], budget: dict[str, Any], whole: bool = True) -> list[str]:
    """One sentence for every row that uses more than its budget, has none, or is gone.

    Args:
        found: what was compiled.
        budget: as `stored` returns it.
        whole: whether that was everything, so that a budget without a kernel is stale.
    """
    complaints = []
    for row in found:
        of_kernel = budget.get(row.key.kernel, {})
        # A part of the combinations may differ less by layout than the whole did, or not at all.
        layouts = ("any", *LAYOUTS) if row.key.layout == "any" else (row.key.layout, "any")
        names = [replace(row.key, layout=layout).row for layout in layouts]
        limits = [
            by[row.key.target] for n in names if row.key.target in (by := of_kernel.get(n, {}))
        ]
        if not limits:
            complaints.append(f"{row.key} has no budget")
            continue
        for name, limit in zip(COLUMNS, limits[0], strict=True):
            value = getattr(row.code, name)
            if name in _AT_MOST and value > limit:
                complaints.append(f"{row.key}: {name} {value} > {limit}")
            if name in _AT_LEAST and value < limit:
                complaints.append(f"{row.key}: {name} {value} < {limit}")
    if whole:
        seen = {(row.key.kernel, row.key.row, row.key.target) for row in found}
        for kernel, by_row in budget.items():
            for name, by_target in by_row.items():
                for target in by_target:
                    if (kernel, name, target) not in seen:
                        complaints.append(
                            f"{kernel} ({name}) on {target} has a budget, but is not built any more"
                        )
    return complaints


def unlaunched(found: Sequence[Row]) -> list[str]:
    """One sentence for every kernel of the table of configurations that no op launched."""
    missing = {kernel for kernel, _ in configs.TABLE} - {row.key.kernel for row in found}
    return [f"{kernel} has configurations, but no op launches it" for kernel in sorted(missing)]


def stored() -> tuple[str, dict[str, Any]]:
    """Triton's version that the budgets were taken with ("" if there are none), and the budgets."""
    table = budget_file.read("triton").get("triton", {})
    return table.pop("version", ""), table


def as_toml(found: Sequence[Row]) -> str:
    """The part of the budgets file that these rows just meet."""
    lines = [
        "# What every compiled Triton kernel may use, by precision, layout of the maps and",
        f"# configuration: {', '.join(_AT_MOST)} at most,",
        f"# {', '.join(_AT_LEAST)} at least.",
        "# Written by `python benchmarks/triton_budgets.py --update`, compared by",
        "# tests/test_triton_budgets.py.",
        "[triton]",
        f'version = "{triton.__version__}"',
    ]
    kernel = None
    by_row: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in found:
        by_row[row.key.kernel, row.key.row].append(row)
    for (name, title), members in by_row.items():
        if name != kernel:
            kernel = name
            lines += ["", f"[triton.{name}]"]
        cells = [
            f"{row.key.target} = [{', '.join(str(getattr(row.code, c)) for c in COLUMNS)}]"
            for row in sorted(members, key=lambda row: list(TARGETS).index(row.key.target))
        ]
        lines.append(f'"{title}" = {{ {", ".join(cells)} }}')
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compiles, prints, compares or updates; the exit status."""
    options = _options()
    if INTERPRETER:
        print("FUSED_TRITON_INTERPRETER is set: nothing can be compiled", file=sys.stderr)
        return 2
    found = measure_all(_jobs(options))
    table = rows(found)
    print(as_text(table))
    complaints = faults(found)
    if not options.op:
        complaints += unlaunched(table)
    if options.report is not None:
        options.report.write_text(as_markdown(table, complaints))
    if options.update:
        budget_file.write("triton", as_toml(table))
    else:
        version, budget = stored()
        if version != triton.__version__:
            print(f"budgets are of triton {version}, this is {triton.__version__}", file=sys.stderr)
        complaints += past_budget(table, budget, whole=options.all and not _limited(options))
    print("\n".join(complaints), file=sys.stderr)
    return 1 if complaints else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--all", action="store_true", help="compile everything, not the quick quarter"
    )
    parser.add_argument("--update", action="store_true", help="write what is found")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a report in Markdown")
    for name, known in (("--target", TARGETS), ("--dtype", DTYPES), ("--op", KERNELS)):
        parser.add_argument(
            name, action="append", choices=list(known), help="only this; repeatable"
        )
    options = parser.parse_args()
    if options.update and _limited(options):
        parser.error("--update writes the whole file: not with --target, --dtype or --op")
    return options


def _limited(options: argparse.Namespace) -> bool:
    return bool(options.target or options.dtype or options.op)


def _jobs(options: argparse.Namespace) -> list[Job]:
    jobs = all_jobs() if options.all else quick_jobs()
    return [
        replace(job, ops=tuple(options.op or job.ops))
        for job in jobs
        if job.target in (options.target or TARGETS) and job.dtype in (options.dtype or DTYPES)
    ]


if __name__ == "__main__":
    sys.exit(main())
