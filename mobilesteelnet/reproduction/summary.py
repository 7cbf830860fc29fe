"""The result files of a reproduction, gathered: means and deviations over the seeds."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run_folder import RunFolderError
from ..train_config import TrainConfig
from .grid import TABLES
from .runner import read_result
from .sets import FOLDER as SETS_FOLDER


@dataclass(frozen=True)
class Spread:
    """A figure over the runs of a network.

    Attributes:
        values: One a run, in the order of the seeds.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the runs."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of a run; None of one alone."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def percent(self) -> str:
        """Mean ± standard deviation of fractions of 1, in per cent."""
        text = f"{100 * self.mean:.2f}"
        return text if self.deviation is None else f"{text} ± {100 * self.deviation:.2f}"


@dataclass(frozen=True)
class Row:
    """A network's results.

    Attributes:
        network: Key of the grid.
        results: The result files' content, in the order of the seeds.
    """

    network: str
    results: tuple[dict[str, Any], ...]

    @property
    def accuracy(self) -> Spread:
        """Average accuracy on the test pictures."""
        return Spread(tuple(result["test"]["average_accuracy"] for result in self.results))

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.results[0]["test"]["classes"])

    def class_accuracy(self, name: str) -> Spread | None:
        """Accuracy of one class; None where the test pictures have none of it."""
        values = [result["test"]["classes"].get(name) for result in self.results]
        if not values or any(value is None for value in values):
            return None
        return Spread(tuple(values))


@dataclass(frozen=True)
class Results:
    """Everything that lies in a results folder.

    Attributes:
        rows: By recipe and network.
        costs: By network.
        candidates: Cross-validations by name.
        robustness: Of one network under changes of the pictures; empty if it was not measured.
        contrast: One dict a class; empty if it was not measured.
        notes: Sentences by table and row: why a figure differs.
        sets: Of other picture sets, by name: the rows by recipe.
    """

    rows: dict[tuple[str, str], Row]
    costs: dict[str, dict[str, Any]]
    candidates: dict[str, dict[str, Any]]
    robustness: dict[str, Any]
    contrast: list[dict[str, Any]]
    notes: dict[str, dict[str, str]]
    sets: dict[str, dict[str, Row]]

    def __bool__(self) -> bool:
        """Whether there is any result."""
        return any(
            (self.rows, self.costs, self.candidates, self.robustness, self.contrast, self.sets)
        )

    def table(self, name: str, recipe: str) -> list[Row]:
        """The rows of a table that have results."""
        found = (self.rows.get((recipe, network)) for network in TABLES[name].rows)
        return [row for row in found if row is not None]


def read_results(folder: Path) -> Results:
    """Reads a results folder.

    Raises:
        RunFolderError: A file is damaged, or the runs of a network have different options.
        ValueError: A run's options are unknown or out of range.
    """
    rows = _read_rows(folder)
    sets = {
        path.name: {recipe: row for (recipe, _), row in found.items()}
        for path in sorted((folder / SETS_FOLDER).glob("*"))
        if (found := _read_rows(path))
    }
    return Results(
        rows,
        {path.stem: read_result(path) for path in sorted(folder.glob("cost/*.json"))},
        {path.stem: _read(path) for path in sorted(folder.glob("recipe/*.json"))},
        _read(folder / "robustness.json", {}),
        _read(folder / "contrast.json", []),
        _read_notes(folder / "notes.json"),
        sets,
    )


def _read_rows(folder: Path) -> dict[tuple[str, str], Row]:
    """The runs below a folder, by recipe and network."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*-seed*.json")):
        result = read_result(path)
        grouped.setdefault((result["recipe"], result["network"]), []).append(result)
    rows = {}
    for key, results in grouped.items():
        results.sort(key=lambda result: result["seed"])
        # An option that came after a result has its default there.
        configs = [TrainConfig.from_dict(result["config"]) for result in results]
        options = [{**config.to_dict(), "seed": 0} for config in configs]
        if any(other != options[0] for other in options):
            raise RunFolderError(
                f"results of {key[1]!r} by the recipe {key[0]!r} have different options: make them "
                "again with --overwrite"
            )
        rows[key] = Row(key[1], tuple(results))
    return rows


def _read_notes(path: Path) -> dict[str, dict[str, str]]:
    notes: dict[str, dict[str, str]] = _read(path, {})
    try:
        good = all(isinstance(text, str) for group in notes.values() for text in group.values())
    except AttributeError:
        good = False
    if not good:
        raise RunFolderError(f"{str(path)!r} must hold sentences by section and row")
    return notes


def _read(path: Path, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{str(path)!r} cannot be read: {error}") from None
