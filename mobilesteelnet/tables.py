"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .predict import Predictions
    from .robustness import Robustness


def evaluation_table(evaluation: Evaluation) -> Table:
    """Figures of each class, their means in the foot."""
    part = f"{len(evaluation.predictions)} pictures, {evaluation.split}"
    table = Table(title=f"Evaluation ({part}), per cent", show_footer=True, title_justify="left")
    table.add_column("class", "average", overflow="fold")
    table.add_column("pictures", str(len(evaluation.predictions)), justify="right")
    for name, value in (
        ("accuracy", evaluation.average_accuracy),
        ("precision", evaluation.precision),
        ("F1", evaluation.f1),
    ):
        table.add_column(name, f"{100 * value:.2f}", justify="right")
    for item in evaluation.per_class:
        figures = (item.accuracy, item.precision, item.f1)
        cells = ["–" if value is None else f"{100 * value:.2f}" for value in figures]
        table.add_row(Text(item.name), str(item.pictures), *cells)
    return table


def prediction_table(predictions: Predictions) -> Table:
    """The most probable classes of each picture, one a line."""
    table = Table(title=f"{len(predictions.items)} pictures", title_justify="left")
    table.add_column("picture", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("%", justify="right", no_wrap=True, min_width=5)
    for item in predictions.items:
        for place, (label, value) in enumerate(item.top):
            unsure = item.rejected and place == 0
            table.add_row(
                Text("" if place else item.name),
                Text(f"uncertain ({label})" if unsure else label),
                Text(f"{100 * value:.1f}"),
            )
    return table


def robustness_table(rows: Sequence[Robustness]) -> Table:
    """Average accuracy and calibration error under each change of the pictures."""
    from .robustness import LEVELS

    table = Table(title="Changed pictures, per cent", title_justify="left")
    table.add_column("change")
    for name in ("level", "accuracy", "calibration error"):
        table.add_column(name, justify="right")
    for row in rows:
        unit = f" ({LEVELS[row.change][0]})" if row.change in LEVELS else ""
        figures = (row.average_accuracy, row.calibration_error)
        level = f"{row.level:g}" if unit else ""
        table.add_row(row.change + unit, level, *(f"{100 * value:.2f}" for value in figures))
    return table


def information_table(facts: dict[str, Any]) -> Table:
    """What ``networks.describe_network`` tells, stage by stage."""
    size = facts["input_size"]
    table = Table(
        title=f"{facts['network']}, one image of {size}×{size}, forward (two FLOP a multiply-add)",
        title_justify="left",
        show_footer=True,
    )
    columns = (
        ("stage", "all", "left"),
        ("published GFLOP", f"{facts['published_flop'] / 1e9:.3f}", "right"),
        ("GFLOP", f"{facts['flop'] / 1e9:.3f}", "right"),
        ("MB moved", "", "right"),
        ("MB saved for backward", "", "right"),
    )
    for name, foot, side in columns:
        table.add_column(name, foot, justify=side)  # type: ignore[arg-type]  # "left" or "right"
    backbone = f"{facts['backbone_flop'] / 1e9:.3f}"
    table.add_row("backbone", backbone, backbone, "", "")
    other = f"{facts['other_flop'] / 1e9:.3f}"
    table.add_row("head, attention of other papers", other, other, "", "")
    for row in facts["stages"]:
        table.add_row(
            escape(row["stage"]),
            f"{row['published_flop'] / 1e9:.3f}",
            f"{row['flop'] / 1e9:.3f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['saved_bytes'] / 1e6:.1f}",
        )
    return table
