"""``python -m benchmarks.table result.json``: pytest-benchmark's JSON as Markdown tables."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import machine

Record = dict[str, Any]
# (subject, size, mode): one row.
Row = tuple[str, str, str]


FORWARD_TEXT = (
    "`ratio`: the best alternative of the same dtype (bold) over this one. `GFLOP/s`: FLOP by the "
    "contract, of the form computed; kernels that save multiplications (Winograd, folded products) "
    "may pass the peak. `of peak`: of the quickest product of 1024³ in the same run. `MB`: peak "
    "memory of one call."
)


def records(result: dict[str, Any]) -> list[Record]:
    """One record a benchmark: its extra_info, and `ms`, the median.

    Raises:
        ValueError: the JSON is not from these benchmarks.
    """
    out = []
    for entry in result.get("benchmarks", ()):
        facts = entry.get("extra_info", {})
        if "subject" not in facts:
            raise ValueError(f"{entry.get('name')}: not one of these benchmarks")
        out.append(facts | {"ms": 1e3 * entry["stats"]["median"]})
    if not out:
        raise ValueError("the file holds no benchmarks: all failed their gate, or none were run")
    return out


def is_alternative(provider: str) -> bool:
    """Whether a provider is what the fused backends are held against: all but these."""
    return not provider.startswith("fused-")


def _grid(found: Sequence[Record]) -> tuple[dict[Row, dict[str, Record]], list[str]]:
    rows: dict[Row, dict[str, Record]] = {}
    providers: list[str] = []
    for record in found:
        row = (record["subject"], record["size"], record["mode"])
        rows.setdefault(row, {})[record["provider"]] = record
        if record["provider"] not in providers:
            providers.append(record["provider"])
    return rows, providers


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _table(found: Sequence[Record], cell: Callable[[Record, dict[str, Record]], str]) -> str:
    grid, providers = _grid(found)
    body = [
        [*row, *(cell(cells[p], cells) if p in cells else "–" for p in providers)]
        for row, cells in grid.items()
    ]
    return markdown_table(["subject", "size", "mode", *providers], body)


def best_alternative(cells: dict[str, Record], dtype: str) -> str | None:
    """The quickest provider of a row that is not a fused one, among those with maps of `dtype`."""
    names = [name for name in cells if is_alternative(name) and _dtype(cells[name]) == dtype]
    return min(names, key=lambda name: cells[name]["ms"]) if names else None


def _dtype(record: Record) -> str:
    return str(record.get("dtype", "float32"))


def _milliseconds(record: Record) -> str:
    return f"{record['ms']:.3g}" if record["ms"] < 100 else f"{record['ms']:.0f}"


def _time(record: Record, cells: dict[str, Record]) -> str:
    text = _milliseconds(record)
    best = best_alternative(cells, _dtype(record))
    if best is None:
        return text
    text += f" ({cells[best]['ms'] / record['ms']:.2f}×)"
    return f"**{text}**" if record["provider"] == best else text


def _megabytes(key: str) -> Callable[[Record, dict[str, Record]], str]:
    def cell(record: Record, cells: dict[str, Record]) -> str:
        return "–" if record[key] is None else f"{record[key] / 1e6:.1f}"

    return cell


def inference(found: Sequence[Record]) -> str:
    """One table of all forwards: a line for each subject, size, dtype and provider."""
    grid, _ = _grid([record for record in found if record["mode"] == "forward"])
    body = []
    for (subject, size, _), cells in grid.items():
        for name, record in sorted(
            cells.items(), key=lambda item: (_dtype(item[1]), item[1]["ms"])
        ):
            best = best_alternative(cells, _dtype(record))
            ratio = "–" if best is None else f"{cells[best]['ms'] / record['ms']:.2f}×"
            rate, peak = record["flop"] / record["ms"] / 1e6, record.get("peak_gflop_per_second")
            share = "–" if peak is None else f"{100 * rate / peak:.0f} %"
            megabytes = _megabytes("peak_bytes")(record, cells)
            texts = (f"**{name}**" if name == best else name, _milliseconds(record), ratio)
            body.append([subject, size, _dtype(record), *texts, f"{rate:.0f}", share, megabytes])
    columns = ("provider", "ms", "ratio", "GFLOP/s", "of peak", "MB")
    return markdown_table(["subject", "size", "maps", *columns], body)


def _rate(record: Record, cells: dict[str, Record]) -> str:
    return f"{record['flop'] / record['ms'] / 1e6:.1f}"


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    found = records(result)
    sections = [
        machine.line(result.get("machine_info", {}), str(result.get("datetime", ""))),
        "## Time\n\nMedian ms a call, and how many times quicker than the best alternative "
        "of the same dtype (bold: all but `fused-*` are alternatives) it is.",
        _table(found, _time),
        "## GFLOP/s\n\nFLOP of the form that a provider computes, by the contract, over its time.",
        _table(found, _rate),
        "## Peak memory\n\nMB of resident memory that one call adds; for onnxruntime and openvino "
        "loading the graph and its weights included.",
        _table(found, _megabytes("peak_bytes")),
    ]
    if any(record["mode"] == "forward" for record in found):
        sections += [f"## Forward, line by line\n\n{FORWARD_TEXT}", inference(found)]
    trained = [record for record in found if record["saved_bytes"] is not None]
    if trained:
        sections += [
            "## Saved for the backward\n\nMB that autograd keeps, inputs counted, parameters not.",
            _table(trained, _megabytes("saved_bytes")),
        ]
    chosen: dict[str, dict[str, None]] = {}  # sets that keep their order
    for record in found:
        for op, backend in record.get("backends", {}).items():
            chosen.setdefault(op, {})[backend] = None
    if chosen:
        told = ", ".join(f"{op} {' and '.join(ran)}" for op, ran in chosen.items())
        sections.append(f"`fused-auto` ran: {told}.")
    return "\n\n".join(sections) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of a result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("result", type=Path, help="file written by pytest --benchmark-json=FILE")
    file = parser.parse_args(arguments).result
    try:
        text = markdown(json.loads(file.read_text()))
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        print(f"error: {file}: not of these benchmarks: {error!r}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {file}: {error}", file=sys.stderr)
        return 1
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
