"""The page's figures, from the result files alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ..calibration import Calibration, ConfidenceBin, Coverage
from ..figures import LIGHT, calibration, figure_png, new_figure, paint, shorten
from ..recipes import OURS, PUBLISHED
from .cost import count_flop
from .grid import NETWORKS
from .summary import Results, Row

COLOURS = ("#2f6db5", "#c4622d", "#3d8a5f", "#8254a6")


def draw_all(found: Results) -> dict[str, bytes]:
    """PNG files by name; only those that the results suffice for."""
    drawn = {}
    ablation = found.table("table7", PUBLISHED)
    if ablation:
        drawn["confusion"] = confusion_matrices(ablation)
        drawn["curves"] = training_curves(ablation)
    points = [
        CostPoint(
            NETWORKS[network].name + (", our recipe" if recipe == OURS else ""),
            row,
            _flop(network, row.results[0]["config"]["size"], found.costs[network]),
            found.costs[network]["parameters"],
        )
        for (recipe, network), row in found.rows.items()
        if recipe in (PUBLISHED, OURS) and network in found.costs
    ]
    if points:
        drawn["cost"] = accuracy_against_cost(points)
    ours = found.rows.get((OURS, "mobilesteelnet"))
    if ours is not None and ours.results[0]["test"]["calibration"]:
        drawn["calibration"] = calibration(_mean_calibration(ours))
    if found.contrast and all("q1" in item for item in found.contrast):
        drawn["contrast"] = contrast_boxes(found.contrast)
    return drawn


def confusion_matrices(rows: list[Row]) -> bytes:
    """One matrix a network, mean over its seeds, in per cent of the true class."""
    figure = new_figure((4.2 * min(len(rows), 2) + 0.6, 4.0 * -(-len(rows) // 2)))
    for place, row in enumerate(rows):
        axes = figure.add_subplot(-(-len(rows) // 2), min(len(rows), 2), place + 1)
        paint(axes)
        counts = np.sum([result["test"]["confusion"] for result in row.results], axis=0)
        shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        names = [shorten(name, 16) for name in row.classes]
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        for (true, chosen), share in np.ndenumerate(shares):
            if share >= 0.5:
                colour = LIGHT.paper if share > 55 else LIGHT.ink
                axes.text(
                    *(chosen, true, f"{share:.0f}"), ha="center", va="center", color=colour, size=8
                )
        axes.set_title(f"{NETWORKS[row.network].name}: {row.accuracy.percent()} %", fontsize=9)
    return figure_png(figure)


def training_curves(rows: list[Row]) -> bytes:
    """Validation loss and accuracy over the epochs: a faint line a seed."""
    figure = new_figure((9, 3.4))
    for place, (key, scale) in enumerate((("val_loss", 1), ("val_accuracy", 100))):
        axes = figure.add_subplot(1, 2, place + 1)
        paint(axes)
        for row, colour in zip(rows, COLOURS, strict=False):
            for number, result in enumerate(row.results):
                history = enumerate(result["training"]["history"][key], start=1)
                points = [(epoch, scale * value) for epoch, value in history if value is not None]
                label = NETWORKS[row.network].name if number == 0 else None
                epochs, values = zip(*points, strict=True)
                axes.plot(epochs, values, color=colour, label=label, linewidth=1, alpha=0.7)
        axes.set_xlabel("epoch")
        axes.set_title("validation loss" if place == 0 else "validation accuracy, %", fontsize=9)
        axes.grid(color=LIGHT.faint, linewidth=0.8)
        if place == 0:
            axes.set_yscale("log")
        else:
            axes.legend(frameon=False, fontsize=7)
    return figure_png(figure)


class CostPoint(NamedTuple):
    """A network of the plot: its name, its results, and its cost at the size of their pictures."""

    name: str
    row: Row
    flop: float
    parameters: int


def _flop(network: str, size: int, cost: dict[str, Any]) -> float:
    """Of an image; counted anew where the cost was measured at another size."""
    return float(cost["flop"] if size == cost["input_size"] else count_flop(network, size))


def accuracy_against_cost(points: list[CostPoint]) -> bytes:
    """Accuracy over FLOP, the area of a mark showing parameters."""
    figure = new_figure((8, 4.6))
    axes = figure.add_subplot()
    paint(axes)
    names = []
    for name, row, flop, parameters in sorted(points, key=lambda point: point.flop):
        colour = LIGHT.second if row.network == "mobilesteelnet" else LIGHT.first
        x, y = flop / 1e9, 100 * row.accuracy.mean
        spread = 100 * (row.accuracy.deviation or 0.0)
        axes.errorbar(x, y, yerr=spread, color=colour, linewidth=1)
        axes.scatter(x, y, s=8 * parameters / 1e6 + 8, color=colour, alpha=0.6)
        names.append((name, x, y))
    axes.set_xscale("log")
    axes.margins(0.08)
    axes.set_xlabel("GFLOP an image of the size it was trained for (two a multiply-add)")
    axes.set_ylabel("average accuracy, %")
    axes.grid(color=LIGHT.faint, linewidth=0.8)
    _label_points(axes, names)
    return figure_png(figure)


def _label_points(axes: Any, names: list[tuple[str, float, float]]) -> None:
    """A name beside each point (x, y), inside and off other names and points where possible."""
    axes.figure.draw_without_rendering()  # settles the layout
    renderer, taken = axes.figure.canvas.get_renderer(), []
    for _, x, y in names:
        across, up = axes.transData.transform((x, y))
        taken.append(Bbox.from_bounds(across - 5, up - 5, 10, 10))
    places = [
        (side * across, up, "left" if side > 0 else "right")
        for up in (0, 9, -9, 18, -18, 27, -27)
        for side, across in ((1, 7), (-1, 7))
    ]
    for name, x, y in names:
        for across, up, alignment in places:
            label = axes.annotate(
                *(name, (x, y)),
                xytext=(across, up),
                textcoords="offset points",
                ha=alignment,
                va="center",
                fontsize=7,
                color=LIGHT.ink,
                arrowprops={"arrowstyle": "-", "lw": 0.5} if abs(up) > 9 else None,
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without the line to its point
            free = not any(box.overlaps(other) for other in taken)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            if free and inside:
                break
            if (across, up, alignment) != places[-1]:
                label.remove()
        taken.append(box)


def contrast_boxes(rows: list[dict[str, Any]]) -> bytes:
    """The contrasts of each class as boxes from least to greatest (figure 10 of the paper)."""
    figure = new_figure((7, 3.8))
    axes = figure.add_subplot()
    paint(axes)
    boxes = [
        {
            "label": shorten(row["class"], 16),
            "whislo": row["min"],
            "q1": row["q1"],
            "med": row["median"],
            "q3": row["q3"],
            "whishi": row["max"],
        }
        for row in rows
    ]
    axes.bxp(boxes, showfliers=False)
    axes.tick_params(axis="x", labelrotation=20)
    axes.set_ylabel("standard deviation of grey levels")
    axes.grid(axis="y", color=LIGHT.faint, linewidth=0.8)
    return figure_png(figure)


def _mean_calibration(row: Row) -> Calibration:
    """The mean of the seeds' calibrations; bins are joined with their pictures as weights."""
    found = [result["test"]["calibration"] for result in row.results]
    bins = [_join_bins(items) for items in zip(*(one["bins"] for one in found), strict=True)]
    coverage = [
        _join_coverage(items) for items in zip(*(one["coverage"] for one in found), strict=True)
    ]
    return Calibration(sum(one["expected_error"] for one in found) / len(found), bins, coverage)


def _join_bins(items: tuple[dict[str, Any], ...]) -> ConfidenceBin:
    pictures = sum(item["pictures"] for item in items)

    def mean(name: str) -> float | None:
        if not pictures:
            return None
        total = sum(item["pictures"] * item[name] for item in items if item["pictures"])
        return float(total / pictures)

    bounds = items[0]["lower"], items[0]["upper"]
    return ConfidenceBin(*bounds, pictures, mean("confidence"), mean("accuracy"))


def _join_coverage(items: tuple[dict[str, Any], ...]) -> Coverage:
    accuracies = [item["accuracy"] for item in items if item["accuracy"] is not None]
    share = sum(item["coverage"] for item in items) / len(items)
    mean = sum(accuracies) / len(accuracies) if accuracies else None
    return Coverage(items[0]["threshold"], share, mean)
