"""The report of an evaluation: figures as PNG files and one self-contained page of HTML.

write_report("runs/first/report", evaluation, checkpoint, pictures, run=RunFolder("runs/first"))
"""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import figures
from .checkpoint import Checkpoint
from .data import PictureSet
from .evaluate import Evaluation, PictureResult
from .gates import mean_gate
from .report_confidence import confidence_section
from .report_html import percent, safe, themed_image, thumbnail
from .run_folder import RunFolder, write_atomically, write_json, write_text

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_WRONG_PICTURES = 40
MOST_GATE_PICTURES = 12


@dataclass(frozen=True)
class ReportFiles:
    """What :func:`write_report` wrote.

    Attributes:
        page: ``report.html``, complete in itself.
        json: ``evaluation.json``.
        images: The figures as PNG files.
    """

    page: Path
    json: Path
    images: list[Path]


def write_report(
    out: str | os.PathLike[str],
    evaluation: Evaluation,
    checkpoint: Checkpoint,
    pictures: PictureSet,
    *,
    run: RunFolder | None = None,
    command: str = "",
    title: str = "Steel surface defects: evaluation",
) -> ReportFiles:
    """Write ``report.html``, ``evaluation.json`` and the figures into a folder.

    Args:
        out: The folder; made if missing. Files of these names in it are replaced.
        evaluation: What is reported.
        checkpoint: The network, for the spatial gate.
        pictures: The set that was evaluated.
        run: The training run, for its curves.
        command: The command line that made the report.
        title: The page's heading.

    Raises:
        OSError: The folder cannot be written.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = run.read_rows() if run is not None else []
    best = int(checkpoint.training.get("epoch", 0)) if rows else 0
    drawings: dict[str, Callable[[figures.Theme], bytes]] = {
        "confusion_matrix": lambda theme: figures.confusion_matrix(evaluation, theme),
        "class_accuracy": lambda theme: figures.class_bars(evaluation, theme),
    }
    found = evaluation.calibration
    if found is not None:
        drawings["calibration"] = lambda theme: figures.calibration(found, theme)
    if rows:
        drawings["training_curves"] = lambda theme: figures.training_curves(rows, best, theme)
    images = []
    tags = {}
    for name, draw in drawings.items():
        light = draw(figures.LIGHT)
        path = folder / f"{name}.png"
        write_atomically(path, partial(_write, content=light))
        images.append(path)
        alt = _alternative_text(name, evaluation, rows, best)
        tags[name] = themed_image(light, draw(figures.DARK), alt)
    sections = [
        _result_section(evaluation, tags),
        confidence_section(evaluation.calibration, tags.get("calibration", "")),
        _training_section(tags, rows, best),
        _gate_section(evaluation, checkpoint, pictures),
        _wrong_section(evaluation, checkpoint, pictures),
        _origin_section(evaluation, command),
    ]
    template = resources.files(__package__).joinpath("report_template.html").read_text("utf-8")
    page = string.Template(template).substitute(
        title=safe(title),
        subtitle=safe(_subtitle(evaluation)),
        numbers=_numbers(evaluation),
        sections="\n".join(section for section in sections if section),
    )
    write_text(folder / "report.html", page)
    write_json(folder / "evaluation.json", evaluation.to_dict())
    return ReportFiles(folder / "report.html", folder / "evaluation.json", images)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _subtitle(evaluation: Evaluation) -> str:
    data = evaluation.about.get("data", "the data")
    part = {"val": "validation"}.get(evaluation.split, evaluation.split)
    of = "all pictures" if part == "all" else f"the {part} part"
    return (
        f"{len(evaluation.predictions)} pictures, {of} of {data}, {len(evaluation.classes)} classes"
    )


def _numbers(evaluation: Evaluation) -> str:
    wrong = len(evaluation.wrong)
    cells = [
        ("average accuracy", f"{100 * evaluation.average_accuracy:.2f} %", "main"),
        ("overall accuracy", f"{100 * evaluation.overall_accuracy:.2f} %", ""),
        ("precision", f"{100 * evaluation.precision:.2f} %", ""),
        ("F1", f"{100 * evaluation.f1:.2f} %", ""),
        ("wrong", f"{wrong} of {len(evaluation.predictions)}", ""),
    ]
    return "".join(
        f'<div class="{kind}"><dt>{safe(name)}</dt><dd>{safe(value)}</dd></div>'
        for name, value, kind in cells
    )


def _alternative_text(
    name: str, evaluation: Evaluation, rows: Sequence[dict[str, Any]], best: int
) -> str:
    if name == "class_accuracy":
        parts = [f"{item.name} {percent(item.accuracy)} %" for item in evaluation.per_class[:30]]
        return "Bars of accuracy and precision of each class. Accuracy: " + ", ".join(parts)
    if name == "confusion_matrix":
        most = _confusions(evaluation)[:3]
        words = "; ".join(f"{count} {true} taken for {chosen}" for count, true, chosen in most)
        return "Confusion matrix. " + (
            f"Most frequent: {words}" if words else "No picture is wrong"
        )
    if name == "calibration" and evaluation.calibration is not None:
        error = 100 * evaluation.calibration.expected_error
        return f"Accuracy against confidence; the expected calibration error is {error:.2f} %"
    validated = [row for row in rows if row["val_loss"] is not None]
    last = ""
    if validated:
        last = (
            f"the last validation loss is {validated[-1]['val_loss']:.4f} and accuracy "
            f"{100 * validated[-1]['val_accuracy']:.2f} %. "
        )
    return f"Loss and accuracy over {len(rows)} epochs; {last}Epoch {best} was kept."


def _confusions(evaluation: Evaluation) -> list[tuple[int, str, str]]:
    """Counts of (true, predicted) off the diagonal, the largest first."""
    names = evaluation.classes
    found = [
        (count, names[row], names[column])
        for row, counts in enumerate(evaluation.confusion)
        for column, count in enumerate(counts)
        if count and row != column
    ]
    return sorted(found, key=lambda item: (-item[0], item[1], item[2]))


def _result_section(evaluation: Evaluation, tags: dict[str, str]) -> str:
    lines = "".join(
        f"<tr><td>{safe(item.name)}</td><td>{item.pictures}</td><td>{percent(item.accuracy)}</td>"
        f"<td>{percent(item.precision)}</td><td>{percent(item.f1)}</td></tr>"
        for item in evaluation.per_class
    )
    return (
        '<section><h2>By class</h2><div class="columns">'
        f'<figure>{tags["confusion_matrix"]}<figcaption class="soft">Confusion matrix: counts, '
        "coloured by the share of the true class.</figcaption></figure>"
        f'<div><div class="scroll"><table><caption>Accuracy is the share of a class that was found '
        "(recall); all in per cent.</caption><thead><tr><th scope=col>class</th>"
        "<th scope=col>pictures</th><th scope=col>accuracy</th><th scope=col>precision</th>"
        f"<th scope=col>F1</th></tr></thead><tbody>{lines}</tbody></table></div>"
        f"<figure>{tags['class_accuracy']}</figure></div></div>{_matrix_table(evaluation)}</section>"
    )


def _matrix_table(evaluation: Evaluation) -> str:
    head = "".join(f"<th scope=col>{safe(name)}</th>" for name in evaluation.classes)
    cells = ["".join(f"<td>{count}</td>" for count in row) for row in evaluation.confusion]
    lines = "".join(
        f"<tr><th scope=row>{safe(name)}</th>{row}</tr>"
        for name, row in zip(evaluation.classes, cells, strict=True)
    )
    return (
        "<details><summary>The confusion matrix as a table</summary><div class=scroll><table>"
        "<caption>Rows: true class; columns: predicted class.</caption>"
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


def _training_section(tags: dict[str, str], rows: Sequence[dict[str, Any]], best: int) -> str:
    if not rows:
        return ""
    kept = f" The dotted line marks epoch {best}, whose weights are evaluated here." if best else ""
    return (
        f"<section><h2>Training</h2><figure>{tags['training_curves']}</figure>"
        f'<p class="soft">{len(rows)} epochs.{kept}</p></section>'
    )


def _wrong_section(evaluation: Evaluation, checkpoint: Checkpoint, pictures: PictureSet) -> str:
    wrong = evaluation.wrong
    if not wrong:
        return "<section><h2>Wrong pictures</h2><p>None.</p></section>"
    places = {item.name: index for index, item in enumerate(pictures.items)}
    shown = wrong[:MOST_WRONG_PICTURES]
    plain = gated = ""
    for number, item in enumerate(shown):
        picture = pictures.open(places[item.name])
        gate = mean_gate(checkpoint, picture) if number < MOST_GATE_PICTURES else None
        card = _wrong_card(item, evaluation, picture, gate)
        plain, gated = (plain + card, gated) if gate is None else (plain, gated + card)
    count = f"All {len(wrong)}" if len(shown) == len(wrong) else f"{len(shown)} of {len(wrong)}"
    over = ", the first ones with the spatial gate laid over them" if gated else ""
    return (
        f"<section><h2>Wrong pictures</h2><p class=soft>{count}, the most confident first{over}; "
        f'evaluation.json lists every picture.</p><div class="pictures gates">{gated}</div>'
        f'<div class="pictures">{plain}</div></section>'
    )


def _file_name(name: str) -> str:
    """The last part of a path; the whole of it appears where the pointer rests."""
    return f'<span class="soft" title="{safe(name)}">{safe(name.rpartition("/")[2])}</span>'


def _wrong_card(
    item: PictureResult, evaluation: Evaluation, picture: Image, gate: np.ndarray | None
) -> str:
    chosen = item.probabilities[evaluation.classes.index(item.predicted)]
    true = item.probabilities[evaluation.classes.index(item.true)]
    alt = f"{item.name}: {item.true}, taken for {item.predicted}"
    shown = thumbnail(picture, alt)
    if gate is not None:
        over = thumbnail(figures.gate_overlay(picture, gate), f"The gate over {item.name}")
        shown = f'<div class="pair">{shown}{over}</div>'
    return (
        f"<figure>{shown}<figcaption>"
        f'<span class="wrong">{safe(item.predicted)}</span> {100 * chosen:.1f} %<br>'
        f'<span class="right">{safe(item.true)}</span> {100 * true:.1f} %<br>'
        f"{_file_name(item.name)}</figcaption></figure>"
    )


def _gate_section(evaluation: Evaluation, checkpoint: Checkpoint, pictures: PictureSet) -> str:
    places = {item.name: index for index, item in enumerate(pictures.items)}
    samples = _samples(evaluation)
    cards = []
    for item in samples:
        picture = pictures.open(places[item.name])
        gate = mean_gate(checkpoint, picture)
        if gate is None:
            return ""
        cards.append(_gate_card(item, picture, gate))
    return (
        "<section><h2>Where the network looks</h2>"
        "<p>The spatial gate <i>w</i> of CIEMA, one value from 0 to 1 a place, averaged over its "
        "groups and laid over the picture. Each map is stretched from its least to its greatest "
        'value: dark <span class="scale" role="img" aria-label="colour scale from dark to bright">'
        "</span> bright. It shows what is let through, not a proof of why a class was chosen.</p>"
        f'<div class="pictures gates">{"".join(cards)}</div></section>'
    )


def _samples(evaluation: Evaluation) -> list[PictureResult]:
    """Pictures of each class in turn, evenly spaced over the part, right or wrong."""
    by_class = {
        name: [item for item in evaluation.predictions if item.true == name]
        for name in evaluation.classes
    }
    filled = [items for items in by_class.values() if items]
    each = max(1, MOST_GATE_PICTURES // len(filled))
    chosen = [item for items in filled for item in items[:: max(1, len(items) // each)][:each]]
    return chosen[:MOST_GATE_PICTURES]


def _gate_card(item: PictureResult, picture: Image, gate: np.ndarray) -> str:
    overlay = figures.gate_overlay(picture, gate)
    low, high = float(gate.min()), float(gate.max())
    right = item.true == item.predicted
    kind, verdict = ("right", "recognised") if right else ("wrong", f"taken for {item.predicted}")
    return (
        f'<figure><div class="pair">{thumbnail(picture, f"{item.name}, {item.true}")}'
        f"{thumbnail(overlay, f'The gate over {item.name}, from {low:.3f} to {high:.3f}')}</div>"
        f'<figcaption>{safe(item.true)}, <span class="{kind}">{safe(verdict)}</span><br>'
        f"{_file_name(item.name)}<br>"
        f'<span class="soft">w from {low:.3f} to {high:.3f}</span></figcaption></figure>'
    )


def _origin_section(evaluation: Evaluation, command: str) -> str:
    about = evaluation.about
    training = about.get("training", {})
    each = 1000 * evaluation.seconds / len(evaluation.predictions)
    facts: list[tuple[str, object]] = [
        ("data", about.get("data", "")),
        ("files that could not be used", len(about.get("bad_files", []))),
        ("input", f"{about.get('input_size')} × {about.get('input_size')} pixels"),
        ("network", _pairs(about.get("network", {}))),
        ("trained with", _pairs(training.get("options", {}))),
        ("pictures", _pairs(training.get("pictures", {}))),
        ("logits divided by", about.get("temperature", "")),
        ("torch, device", f"{about.get('torch')}, {about.get('device')}"),
        ("time", f"{evaluation.seconds:.1f} s, {each:.1f} ms a picture with reading"),
    ]
    lines = "".join(
        f"<tr><th scope=row>{safe(name)}</th><td>{safe(value)}</td></tr>"
        for name, value in facts
        if value != ""
    )
    shown = f"<pre>{safe(command)}</pre>" if command else ""
    backends = about.get("backends", "")
    table = ""
    if backends:
        table = f"<details><summary>Backends</summary><pre>{safe(backends)}</pre></details>"
    return (
        f"<section><h2>How this was made</h2>{shown}<div class=scroll>"
        f'<table class="facts"><tbody>{lines}</tbody></table></div>{table}</section>'
    )


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
