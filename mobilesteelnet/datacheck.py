"""What `mobilesteelnet data check` tells of a picture set before anything is trained on it.

Counts and sizes, the contrast of each class (table 3 and figure 10 of the paper), exact duplicates
and the files that cannot be used.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .data import PictureSet
from .run_folder import write_atomically

if TYPE_CHECKING:
    from rich.console import Group

_SHOWN = 20
"""Rows of a long list that the terminal shows; the JSON has all of them."""


@dataclass(frozen=True)
class DataReport:
    """The facts of a labelled picture set.

    Attributes:
        path: the folder or zip.
        layout: what it was recognised as.
        pictures: sound pictures in all.
        sizes: how many pictures have each "width x height", the most frequent first.
        contrast: one row a class, see `contrast_table`.
        duplicates: names of pictures with exactly the same pixels, one list a group.
        conflicts: those of the groups whose pictures have different classes.
        bad: files that are not used, as {"name", "reason"}.
    """

    path: str
    layout: str
    pictures: int
    sizes: dict[str, int]
    contrast: list[dict[str, Any]]
    duplicates: list[list[str]]
    conflicts: list[list[str]]
    bad: list[dict[str, str]]

    @property
    def ok(self) -> bool:
        """Whether every file is usable and no picture has two classes."""
        return not self.bad and not self.conflicts

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists and dicts, `ok` included."""
        return {"ok": self.ok, **asdict(self)}

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def render(self) -> Group:
        """The report for a terminal.

        Raises:
            ImportError: rich is not installed.
        """
        try:
            from rich.console import Group
            from rich.text import Text
        except ImportError as error:
            raise ImportError(
                'showing the report needs rich: pip install "mobilesteelnet[cli]"'
            ) from error
        classes = f"{self.pictures} pictures in {len(self.contrast)} classes"
        return Group(
            Text(f"{self.path}: {classes}, {self.layout}"),
            Text(f"sizes: {_sizes_in_words(self.sizes)}"),
            _contrast_rows(self.contrast),
            *_listed("exact duplicates", [" = ".join(group) for group in self.duplicates]),
            *_listed("same picture in two classes", [" = ".join(g) for g in self.conflicts]),
            *_listed("bad files", [f"{file['name']} {file['reason']}" for file in self.bad]),
            Text("usable as it is" if self.ok else "see above before training"),
        )

    def __rich__(self) -> Group:
        return self.render()


def contrast_table(pictures: PictureSet) -> list[dict[str, Any]]:
    """The contrast of each class, as table 3 of the paper.

    The contrast of a picture is the standard deviation of its grey levels (0 to 255).

    Args:
        pictures: a labelled set.

    Returns:
        One dict a class, in their order: class, count, and min, q1, median, q3, max, mean and std
        of the contrasts of its pictures (q1 and q3 are the quartiles).
    """
    labels = np.array(pictures.labels)
    contrasts = np.array([picture.contrast for picture in pictures.items])
    rows = []
    for label, name in enumerate(pictures.classes):
        values = contrasts[labels == label]
        rows.append(
            {
                "class": name,
                "count": int(values.size),
                "min": float(values.min()),
                "max": float(values.max()),
                "mean": float(values.mean()),
                "median": float(np.median(values)),
                "q1": float(np.quantile(values, 0.25)),
                "q3": float(np.quantile(values, 0.75)),
                "std": float(values.std()),
            }
        )
    return rows


def check(pictures: PictureSet) -> DataReport:
    """Collects the facts of a labelled set.

    Args:
        pictures: from `data.scan`, with `on_bad_file="skip"` so that bad files are listed.

    Raises:
        DataError: the set is unlabelled.
    """
    groups = pictures.duplicate_groups()
    labels = pictures.labels
    sizes = Counter(f"{picture.width} x {picture.height}" for picture in pictures.items)

    def names(group: list[int]) -> list[str]:
        return [pictures.items[i].name for i in group]

    return DataReport(
        path=str(pictures.path),
        layout=pictures.layout,
        pictures=len(pictures),
        sizes=dict(sizes.most_common()),
        contrast=contrast_table(pictures),
        duplicates=[names(group) for group in groups],
        conflicts=[names(group) for group in groups if len({labels[i] for i in group}) > 1],
        bad=[{"name": file.name, "reason": file.reason} for file in pictures.bad],
    )


def contrast_box_plot(pictures: PictureSet, path: str | os.PathLike[str]) -> Path:
    """Draws the contrasts of each class as a box plot (figure 10 of the paper) into a PNG.

    Args:
        pictures: a labelled set.
        path: the PNG to write; its directory must exist.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        DataError: the set is unlabelled.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'the box plot needs matplotlib: pip install "mobilesteelnet[cli]"'
        ) from error
    labels = pictures.labels
    contrasts = [
        [p.contrast for p, label in zip(pictures.items, labels, strict=True) if label == wanted]
        for wanted in range(len(pictures.classes))
    ]
    figure = Figure(figsize=(max(6.0, 1.3 * len(contrasts)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.boxplot(contrasts, flierprops={"marker": ".", "markersize": 4})
    axes.set_xticks(range(1, len(contrasts) + 1), pictures.classes, rotation=30, ha="right")
    axes.set_ylabel("contrast (standard deviation of grey levels)")
    axes.set_title(f"{pictures.path.name}: {len(pictures)} pictures")
    axes.grid(axis="y", alpha=0.3)
    write_atomically(path, lambda part: figure.savefig(part, dpi=150, format="png"))
    return Path(path)


def _contrast_rows(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="contrast (standard deviation of grey levels)", title_justify="left")
    table.add_column("class")
    figures = ("min", "max", "mean", "median", "std")
    for column in ("pictures", *figures):
        table.add_column(column, justify="right")
    for row in rows:
        values = [f"{row[figure]:.2f}" for figure in figures]
        table.add_row(Text(row["class"]), str(row["count"]), *values)
    return table


def _listed(title: str, lines: list[str]) -> list[Any]:
    from rich.text import Text

    if not lines:
        return [Text(f"{title}: none")]
    more = [f"  … and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [Text("\n".join([f"{title}: {len(lines)}", *(f"  {x}" for x in lines[:_SHOWN]), *more]))]


def _sizes_in_words(sizes: dict[str, int]) -> str:
    words = [f"{size} ({count})" for size, count in list(sizes.items())[:5]]
    if len(sizes) > 5:
        words.append(f"and {len(sizes) - 5} other sizes")
    return ", ".join(words)
