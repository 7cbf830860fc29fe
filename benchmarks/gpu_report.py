"""``python -m benchmarks.gpu_report FOLDER``: what on_gpu.sh found, as one Markdown report.

Reads FOLDER/steps.jsonl (a line a step) and FOLDER/timings.json, either of which may be missing,
and writes FOLDER/report.md. A time stands there only where the results were judged right.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .gpu_rows import (
    COMPILED,
    FORWARD,
    LAYOUTS,
    NOT_RUN,
    OK,
    OURS,
    PROVIDERS,
    PUBLISHED,
    SKIPPED,
    STAGES,
    SUBJECTS,
    TRAINING,
    Facts,
)

Cells = dict[str, Facts]
CANDIDATES = ("fused-cuda", "fused-triton", "reference")
TITLES = {
    FORWARD: "Forward, evaluation, no gradients",
    TRAINING: "Training, forward and backward (half precision: autocast)",
}


# ------------------------------------------------------------------------------------------ tables


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; columns from `left` on are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def cases(rows: Iterable[Facts]) -> dict[str, Cells]:
    """Rows by case and provider, in the order of the tables."""
    found: dict[str, Cells] = {}

    def order(row: Facts) -> tuple[Any, ...]:
        return (
            SUBJECTS.index(row["subject"]),
            *(row["precision"], LAYOUTS.index(row["layout"]), row["batch"]),
        )

    for row in sorted(rows, key=order):
        case = row["key"].removesuffix(f" {row['provider']}")
        found.setdefault(case, {})[row["provider"]] = row
    return found


def _label(cells: Cells) -> list[str]:
    row = next(iter(cells.values()))
    return [row["subject"], row["precision"], row["layout"], str(row["batch"])]


_HEAD = ["subject", "precision", "layout", "batch"]


def timed(cells: Cells, provider: str, graph: bool = False) -> float | None:
    """Milliseconds of a provider, if it was judged right and timed."""
    row = cells.get(provider, {})
    if row.get("status") != OK:
        return None
    value: float | None = (row.get("graph") or {}).get("ms") if graph else row.get("ms")
    return value


def best_compiled(cells: Cells, graph: bool = False) -> float | None:
    """Milliseconds of the quicker of the two compiled forms."""
    times = [t for name in COMPILED if (t := timed(cells, name, graph)) is not None]
    return min(times, default=None)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(slower: float | None, ours: float | None) -> str:
    return "–" if slower is None or ours is None else f"{slower / ours:.1f}×"


def _time_cell(cells: Cells, provider: str, graph: bool) -> str:
    row, value = cells.get(provider), timed(cells, provider, graph)
    if row is None:
        return "–"
    if value is None:
        return "–" if graph else row["status"]
    spread = row["graph"] if graph else row
    width = 50 * (spread["high"] - spread["low"]) / value
    return f"{_number(value)} ±{width:.0f}%"


def time_table(rows: Sequence[Facts], graph: bool = False) -> str:
    """Times of all providers, and how much quicker than published and compiled ours is.

    "Ours" is `fused-auto`, what a user gets who chooses nothing.
    """
    names = [p for p in PROVIDERS if any(row["provider"] == p for row in rows)]
    body = []
    for cells in cases(rows).values():
        if graph and not any(timed(cells, name, True) for name in names):
            continue
        ours = timed(cells, "fused-auto", graph)
        ratios = (timed(cells, PUBLISHED, graph), best_compiled(cells, graph))
        columns = [_time_cell(cells, name, graph) for name in names]
        body.append([*_label(cells), *columns, *(_ratio(slower, ours) for slower in ratios)])
    header = [*_HEAD, *names, "auto against published", "auto against best compiled"]
    return table(header, body, left=3) if body else ""


def memory_table(rows: Sequence[Facts]) -> str:
    """Peak megabytes that one call adds."""
    names = [p for p in PROVIDERS if any(row["provider"] == p for row in rows)]

    def cell(row: Facts | None) -> str:
        peak = None if row is None or row.get("status") != OK else row.get("peak_bytes")
        return "–" if peak is None else f"{peak / 1e6:.1f}"

    body = [
        [*_label(cells), *(cell(cells.get(name)) for name in names)]
        for cells in cases(rows).values()
    ]
    return table([*_HEAD, *names], [row for row in body if set(row[4:]) != {"–"}], left=3)


def kernel_times(cells: Cells) -> dict[str, float]:
    """Milliseconds of the candidates that are right; of replayed graphs, where all have one.

    What the host adds is about the same for all, and at small batches hides the kernels' times.
    """
    right = {n: ms for n in CANDIDATES if (ms := timed(cells, n)) is not None}
    replayed = {n: ms for n in right if (ms := timed(cells, n, graph=True)) is not None}
    times = replayed if len(replayed) == len(right) else right
    return {name.removeprefix("fused-"): ms for name, ms in times.items()}


def auto_choices(rows: Iterable[Facts]) -> list[Facts]:
    """For each stage and case: which backends are right, which is quickest, what auto takes."""
    out = []
    for case, cells in cases(r for r in rows if r["subject"] in STAGES).items():
        right = kernel_times(cells)
        if not right:
            continue
        first = next(iter(cells.values()))
        taken = cells.get("fused-auto", {}).get("backends", {})
        out.append(
            {
                "case": case,
                **{k: first[k] for k in ("subject", "mode", "batch", "precision", "layout")},
                "size": next((c["size"] for c in cells.values() if "size" in c), None),
                "ms": right,
                "not_right": {
                    name: cells[provider]["status"]
                    for provider in CANDIDATES
                    if provider in cells and (name := provider.removeprefix("fused-")) not in right
                },
                "quickest": min(right, key=right.__getitem__),
                "auto": taken,
            }
        )
    return out


def choice_table(choices: Sequence[Facts]) -> str:
    """`auto_choices` for people."""
    names = [name.removeprefix("fused-") for name in CANDIDATES]
    body = [
        [
            *(c["subject"], c["mode"], c["precision"], c["layout"], str(c["batch"])),
            *(
                _number(c["ms"].get(n)) if n in c["ms"] else c["not_right"].get(n, "–")
                for n in names
            ),
            c["quickest"],
            ", ".join(dict.fromkeys(c["auto"].values())) or "–",
        ]
        for c in choices
    ]
    header = ["stage", "mode", "precision", "layout", "batch", *names, "quickest", "auto takes"]
    return table(header, body, left=4)


# ------------------------------------------------------------------------------------------ report


def machine_text(result: Facts) -> str:
    """What the figures were taken on."""
    machine = result.get("machine") or {}
    lines = {
        "GPU": machine.get("gpu") or machine.get("device") or "unknown",
        "compute capability": machine.get("capability"),
        "driver": machine.get("driver"),
        "torch": machine.get("torch"),
        "triton": machine.get("triton"),
        "CUDA": machine.get("cuda"),
        "fused._cuda": machine.get("fused_cuda"),
        "commit": result.get("commit"),
        "sources": result.get("sources"),
        "scale": result.get("scale"),
        "date": result.get("date"),
    }
    return "; ".join(f"{name} {value}" for name, value in lines.items() if value)


def _section(title: str, text: str, note: str = "") -> list[str]:
    return [f"## {title}", *([note] if note else []), text] if text else []


def timings_text(result: Facts) -> str:
    """All tables of a result file."""
    rows: list[Facts] = result.get("rows", [])
    ran = [row for row in rows if row["status"] != NOT_RUN]
    parts = [machine_text(result)]
    counts = {
        s: sum(r["status"] == s for r in rows) for s in dict.fromkeys(r["status"] for r in rows)
    }
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    parts.append(f"{len(rows)} rows: {told}." if rows else "No rows.")
    for mode, title in TITLES.items():
        chosen = [row for row in ran if row["mode"] == mode]
        if not chosen:
            continue
        note = "Median ms a call, ± half the distance from the 20th to the 80th percentile."
        parts += _section(title, time_table(chosen), note)
        note = "The same calls captured once and replayed, which takes the host out of the figure."
        parts += _section(f"{title}: CUDA graph", time_table(chosen, graph=True), note)
        note = "MB that one call adds at its peak, outputs counted, weights and inputs not."
        parts += _section(f"{title}: peak memory", memory_table(chosen), note)
    choices = auto_choices(ran)
    if choices:
        note = "ms of each backend that is right; `auto` is to take the quickest of them. "
        note += "In training `reference` is timed with PyTorch's own backward of its maths."
        parts += _section("Backends of each stage", choice_table(choices), note)
    parts += _section("Not timed", _losses(ran))
    return "\n\n".join(parts) + "\n"


def _losses(rows: Iterable[Facts]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        graph = row.get("graph") or {}
        if row["status"] not in (OK, SKIPPED):
            reasons.setdefault((row["status"], row.get("reason", "")), []).append(row["key"])
        elif row["status"] == SKIPPED:
            text = f"{row['subject']} {row['provider']}"
            reasons.setdefault((SKIPPED, row.get("reason", "")), []).append(text)
        elif "reason" in graph:
            reasons.setdefault(("no graph", graph["reason"]), []).append(row["key"])
    lines = []
    for (status, reason), keys in reasons.items():
        keys = list(dict.fromkeys(keys))
        shown = ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
        lines.append(f"* **{status}**: {shown}: {reason}")
    return "\n".join(lines)


def is_bad_graph(row: Facts) -> bool:
    """Whether a replay of ours gave other bits than the call that was captured."""
    return row["provider"] in OURS and (row.get("graph") or {}).get("equal") is False


def steps_text(steps: Sequence[Facts]) -> str:
    """The steps of on_gpu.sh."""
    body = [
        [s["step"], s["status"], f"{s['seconds']:.0f}", f"{s['limit']:.0f}", s.get("told", "")]
        for s in steps
    ]
    return table(["step", "status", "seconds", "limit", "last line"], body, left=2)


def _read(file: Path, read: Callable[[str], Any], absent: Any) -> Any:
    try:
        return read(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return absent


def read_steps(text: str) -> list[Facts]:
    """One object a line."""
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def report(folder: Path) -> str:
    """The whole report.

    Raises:
        ValueError: a file is not what on_gpu.sh writes.
        OSError: a file cannot be read.
    """
    steps = _read(folder / "steps.jsonl", read_steps, [])
    result = _read(folder / "timings.json", json.loads, None)
    parts = ["# GPU results"]
    parts += _section("Steps", steps_text(steps)) if steps else ["No step was run."]
    if result is None:
        parts.append("Nothing was timed.")
    else:
        parts += ["# Timings", timings_text(result)]
    return "\n\n".join(parts).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("folder", type=Path, help="with steps.jsonl and timings.json")
    folder = parser.parse_args(arguments).folder
    try:
        (folder / "report.md").write_text(report(folder), encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"error: {folder}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(folder / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
