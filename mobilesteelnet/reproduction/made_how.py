"""Sentences on how results came about: by other options than the recipe's, in which precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .grid import NETWORKS, PlannedRun
from .summary import Row

FLOAT32 = "32-true"


def strays(rows: Sequence[Row], label: str = "") -> list[str]:
    """What a reader must know first: results that were not made by the recipe as it stands.

    Args:
        rows: The results.
        label: Put before the network's name, where that alone does not say which row is meant.
    """
    told = []
    for row in rows:
        result = row.results[0]
        wanted = PlannedRun(row.network, result["recipe"], result["seed"]).config("", {}).to_dict()
        changed = other_options(result["config"], wanted)
        if changed:
            name = f"{label}{NETWORKS[row.network].name}"
            told.append(f"{name} was **not** made by the recipe as it stands: {changed}.")
    return told


def other_options(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The options of a result that differ from those wanted, wherever the data lay."""
    return ", ".join(
        f"{key} {value}"
        for key, value in stored.items()
        if key != "data" and value != wanted.get(key)
    )


def precisions(rows: Iterable[tuple[str, Row]]) -> str:
    """Which runs were not computed in float32, and in what; rows with the names to show."""
    rows = list(rows)
    told: dict[str, list[str]] = {}
    for name, row in rows:
        seeds: dict[str, list[str]] = {}
        for result in row.results:
            seeds.setdefault(result["machine"]["precision"], []).append(str(result["seed"]))
        for precision, numbers in seeds.items():
            several = "s" if len(numbers) > 1 else ""
            told.setdefault(precision, []).append(f"{name} (seed{several} {', '.join(numbers)})")
    if set(told) <= {FLOAT32}:
        return ""
    if len(told) == 1:
        return f" All trained with `--precision {next(iter(told))}`."
    parts = [
        f"with `--precision {precision}`: {', '.join(runs)}"
        for precision, runs in sorted(told.items())
        if precision != FLOAT32
    ]
    rest = "; all others in float32" if FLOAT32 in told else ""
    return f" Trained {'; '.join(parts)}{rest}."


def named(rows: Iterable[Row]) -> list[tuple[str, Row]]:
    """The rows with their networks' names."""
    return [(NETWORKS[row.network].name, row) for row in rows]


def machines(results: Iterable[dict[str, Any]]) -> str:
    """On what they were computed, where they say it."""
    known = (result["machine"] for result in results if "machine" in result)
    places = sorted({f"{machine['device']}, {machine['precision']}" for machine in known})
    return f" Computed on {'; '.join(places)}." if places else ""
