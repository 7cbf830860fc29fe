"""The figures of a report as PNG bytes, each in a light and a dark form."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

try:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'figures need {error.name}: pip install "mobilesteelnet[cli]"', name=error.name
    ) from None

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

    from .calibration import Calibration
    from .evaluate import Evaluation

DPI = 150
LONGEST_NAME = 28
MOST_LABELLED_CELLS = 20


@dataclass(frozen=True)
class Theme:
    """Colours of a figure, as the report's page has them."""

    paper: str
    ink: str
    faint: str
    first: str
    second: str


LIGHT = Theme(paper="#ffffff", ink="#1d2430", faint="#d8dde5", first="#2f6db5", second="#c4622d")
DARK = Theme(paper="#171c24", ink="#e4e8ee", faint="#394252", first="#6fa8e8", second="#eb9a6b")


def confusion_matrix(evaluation: Evaluation, theme: Theme = LIGHT) -> bytes:
    """Counts, coloured by the share of the true class; rows are true, columns predicted."""
    counts = np.array(evaluation.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    number = len(evaluation.classes)
    side = float(np.clip(0.5 * number + 1.8, 3.6, 14))
    figure, axes = _figure((side + 0.6, side), theme)
    colours = LinearSegmentedColormap.from_list("shares", [theme.paper, theme.first])
    axes.imshow(shares, cmap=colours, vmin=0, vmax=1)
    names = [shorten(name) for name in evaluation.classes]
    axes.set_xticks(range(number), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(number), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_xticks(np.arange(number + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(number + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=theme.faint, linewidth=0.8)
    axes.tick_params(which="both", length=0)
    if number <= MOST_LABELLED_CELLS:
        for (row, column), count in np.ndenumerate(counts):
            dark_cell = shares[row, column] > 0.55
            colour = theme.paper if dark_cell else theme.ink
            if count:
                axes.text(column, row, str(count), ha="center", va="center", color=colour)
    return figure_png(figure)


def class_bars(evaluation: Evaluation, theme: Theme = LIGHT) -> bytes:
    """Accuracy and precision of each class as horizontal bars."""
    number = len(evaluation.classes)
    figure, axes = _figure((6.2, float(np.clip(0.5 * number + 1.0, 2.4, 30))), theme)
    place = np.arange(number)
    # A class without pictures has no accuracy: no bar.
    accuracy = [math.nan if r.accuracy is None else 100 * r.accuracy for r in evaluation.per_class]
    precision = [100 * item.precision for item in evaluation.per_class]
    axes.barh(place - 0.19, accuracy, 0.36, color=theme.first, label="accuracy (recall)")
    axes.barh(place + 0.19, precision, 0.36, color=theme.second, label="precision")
    for row, values in ((-0.19, accuracy), (0.19, precision)):
        for index, value in enumerate(values):
            place_of: dict[str, Any] = {"va": "center", "fontsize": 8, "color": theme.ink}
            shown = (0.0, "–") if math.isnan(value) else (value, f"{value:.1f}")
            axes.text(shown[0] + 0.8, index + row, shown[1], **place_of)
    axes.set_yticks(place, [shorten(name) for name in evaluation.classes])
    axes.invert_yaxis()
    axes.set_xlim(0, 109)
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.grid(axis="x", color=theme.faint, linewidth=0.8)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, labelcolor=theme.ink
    )
    return figure_png(figure)


def training_curves(rows: list[dict[str, Any]], best_epoch: int, theme: Theme = LIGHT) -> bytes:
    """Loss and accuracy of training and validation over the epochs, the kept epoch marked."""
    figure = new_figure((9, 3.2), theme)
    few: dict[str, Any] = {"marker": "o", "markersize": 3} if len(rows) < 40 else {}
    for place, key in enumerate(("loss", "accuracy")):
        axes = figure.add_subplot(1, 2, place + 1)
        paint(axes, theme)
        scale = 100 if key == "accuracy" else 1
        for part, colour, name in (
            ("train", theme.first, "training"),
            ("val", theme.second, "validation"),
        ):
            measured = [row for row in rows if row[f"{part}_{key}"] is not None]
            epochs = [row["epoch"] for row in measured]
            values = [scale * row[f"{part}_{key}"] for row in measured]
            axes.plot(epochs, values, color=colour, label=name, linewidth=1.6, **few)
        if best_epoch:
            axes.axvline(best_epoch, color=theme.ink, linewidth=0.9, linestyle=":")
        axes.set_title(key, color=theme.ink)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=theme.faint, linewidth=0.8)
        if key == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
            axes.set_ylim(0, 102)
        elif max(row["val_loss"] or 0.0 for row in rows) > 20 * max(
            row["train_loss"] for row in rows
        ):
            axes.set_yscale("log")
        axes.legend(frameon=False, labelcolor=theme.ink)
    return figure_png(figure)


def calibration(found: Calibration, theme: Theme = LIGHT) -> bytes:
    """Accuracy against confidence, and what rejecting uncertain pictures buys."""
    figure = new_figure((9, 3.6), theme)
    axes = figure.add_subplot(1, 2, 1)
    paint(axes, theme)
    filled = [item for item in found.bins if item.pictures]
    axes.plot([0, 100], [0, 100], color=theme.ink, linewidth=0.9, linestyle=":")
    axes.bar(
        [50 * (item.lower + item.upper) for item in filled],
        [100 * (item.accuracy or 0.0) for item in filled],
        width=90 / len(found.bins),
        color=theme.first,
    )
    axes.set_title(f"calibration error {100 * found.expected_error:.1f} %", color=theme.ink)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 102)
    curve = figure.add_subplot(1, 2, 2)
    paint(curve, theme)
    accepted = [item for item in found.coverage if item.accuracy is not None]
    curve.plot(
        [100 * item.coverage for item in accepted],
        [100 * (item.accuracy or 0.0) for item in accepted],
        color=theme.second,
        marker="o",
        markersize=4,
    )
    curve.set_title("accuracy of the accepted pictures", color=theme.ink)
    curve.set_xlabel("accepted")
    curve.set_xlim(left=0)
    for part in (axes, curve):
        part.grid(color=theme.faint, linewidth=0.8)
        part.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        part.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    return figure_png(figure)


def gate_overlay(picture: Image, gate: np.ndarray) -> Image:
    """A picture with the spatial gate laid over it in colours.

    Args:
        picture: Any size, mode RGB.
        gate: (h, w), the gate averaged over its groups; stretched from its least to its greatest
            value, so that the pattern shows (the report prints both values).
    """
    from PIL import Image as images

    low, high = float(gate.min()), float(gate.max())
    stretched = (gate - low) / (high - low) if high > low else np.zeros_like(gate)
    map_ = images.fromarray(stretched.astype(np.float32), mode="F")
    map_ = map_.resize(picture.size, images.Resampling.BILINEAR)
    heat = colormaps["inferno"](np.clip(np.asarray(map_), 0, 1))[..., :3]
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None] / 255
    mixed = 0.45 * grey + 0.55 * heat
    return images.fromarray((255 * mixed).round().astype(np.uint8))


def shorten(name: str, longest: int = LONGEST_NAME) -> str:
    """A name that fits beside an axis; signs that matplotlib takes for maths are escaped."""
    cut = name if len(name) <= longest else name[: longest - 1] + "…"
    return "".join(sign if sign.isprintable() else "?" for sign in cut).replace("$", r"\$")


def new_figure(size: tuple[float, float], theme: Theme = LIGHT) -> Figure:
    """A figure without axes, `size` in inches."""
    figure = Figure(figsize=size, dpi=DPI, facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(size: tuple[float, float], theme: Theme) -> tuple[Figure, Axes]:
    figure = new_figure(size, theme)
    axes = figure.add_subplot()
    paint(axes, theme)
    return figure, axes


def paint(axes: Axes, theme: Theme = LIGHT) -> None:
    """Give axes the theme's colours, and no frame."""
    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.ink, labelcolor=theme.ink)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)


def figure_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "mobilesteelnet"})
    return buffer.getvalue()
