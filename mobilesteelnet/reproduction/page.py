"""RESULTS.md: every table again, beside the paper's figures, made from the result files alone."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from ..recipes import OURS, PUBLISHED
from ..run_folder import RunFolderError, write_atomically, write_text
from . import drawings
from .grid import FIRST_SEED, NETWORKS, TABLES, paper_figures
from .made_how import machines, named, precisions, strays
from .page_measured import (
    contrast_section,
    cost_table,
    image,
    modules_table,
    robustness_section,
)
from .page_trials import recipe_section, sets_section
from .summary import Results, Row, read_results

# Differences that are told apart from the spread of the seeds: in points, and in deviations.
LEAST_POINTS, LEAST_DEVIATIONS = 1.0, 2.0
MOST_HARD_CASES = 12
NO_REASON = "no reason is known yet."


def write_page(results: Path, out: Path, figures: Path) -> list[Path]:
    """Write the page and its figures.

    Args:
        results: The folder of the result files.
        out: The Markdown file.
        figures: Folder of the PNG files that the page shows; made if missing.

    Returns:
        The files that were written.

    Raises:
        RunFolderError: There are no results, or some are damaged.
        OSError: A file cannot be written.
    """
    found = read_results(results)
    if not found:
        raise RunFolderError(f"results={str(results)!r} holds no results")
    out.parent.mkdir(parents=True, exist_ok=True)
    images = drawings.draw_all(found)
    written = []
    for name, content in images.items():
        figures.mkdir(parents=True, exist_ok=True)
        path = figures / f"{name}.png"
        write_atomically(path, partial(_write, content=content))
        written.append(path)
    links = {path.stem: os.path.relpath(path, out.parent).replace(os.sep, "/") for path in written}
    write_text(out, make_page(found, links))
    return [out, *written]


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def make_page(found: Results, links: dict[str, str]) -> str:
    """The page's text; ``links`` are the figures by name."""
    paper = paper_figures()
    again = "and of the weights that the package brings once more, to measure what storing them in "
    again += "eight bits costs"
    if found.robustness.get("split") == "test":
        again += ", and once for each change of the pictures, at the end of this page"
    parts = [
        "# Results",
        "Made by `mobilesteelnet reproduce page` from the files in `results/`; nothing here is "
        "written by hand but the reasons in `results/notes.json`. Accuracies are the mean of the "
        "classes' accuracies on the test pictures, in per cent, mean ± standard deviation over the "
        f"seeds; the split is fixed (seed {FIRST_SEED}), every network is trained from scratch. "
        f"The test pictures were read once a run, after its training ({again}).",
        f"Paper: {paper['citation']}.",
        _ours(found, links),
        _ours_ablation(found),
    ]
    for name in ("table7", "table9", "table5", "table4"):
        parts.append(_accuracy_table(name, found, paper["accuracy"].get(name, {})))
        if name == "table7":
            parts += [image(links, "confusion", "Confusion matrices of the ablation")]
            parts += [image(links, "curves", "Training curves of the ablation")]
    parts.append(cost_table(found, paper))
    parts.append(image(links, "cost", "Accuracy against cost of all networks"))
    parts.append(modules_table(found, paper))
    parts.append(contrast_section(found, paper, links))
    parts.append(recipe_section(found))
    parts.append(sets_section(found))
    parts.append(robustness_section(found))
    remarks = "\n".join(f"* {remark}" for remark in paper["remarks"])
    parts.append(f"## Where the paper does not add up\n\n{remarks}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _accuracy_table(name: str, found: Results, paper: dict[str, Any]) -> str:
    rows = found.table(name, PUBLISHED)
    if not any(row.network != "mobilesteelnet" for row in rows):
        return ""
    classes = rows[0].classes
    head = ["network", "runs", "here", "paper", "difference", *classes]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    sentences = []
    for row in rows:
        figures = paper.get(row.network, {})
        average = figures.get("average")
        difference = "" if average is None else f"{100 * row.accuracy.mean - average:+.2f}"
        cells = [NETWORKS[row.network].name, str(len(row.results)), row.accuracy.percent()]
        cells += ["–" if average is None else f"{average:.2f}", difference or "–"]
        lines.append(cells + [_class_cell(row, item, figures) for item in classes])
        sentences += _sentences(name, row, figures, found.notes)
    sentences = [*strays(rows), *sentences]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = (
        "Of a class: the mean here, in brackets the paper's figure where it gives one. "
        f"Published recipe; command: `mobilesteelnet reproduce {name} --data NEU-DET.zip`."
    )
    note += precisions(named(rows))
    told = "\n".join(f"* {sentence}" for sentence in sentences)
    return "\n\n".join(p for p in (f"## {TABLES[name].title}", text, note, told) if p)


def _class_cell(row: Row, name: str, figures: dict[str, Any]) -> str:
    spread = row.class_accuracy(name)
    text = "–" if spread is None else f"{100 * spread.mean:.1f}"
    paper = figures.get("classes", {}).get(name)
    return text if paper is None else f"{text} ({paper:.1f})"


def _sentences(
    table: str, row: Row, figures: dict[str, Any], notes: dict[str, dict[str, str]]
) -> list[str]:
    """One sentence where the mean differs from the paper by more than the seeds explain."""
    average = figures.get("average")
    reason = notes.get(table, {}).get(row.network, "")
    if average is None:
        return [f"{NETWORKS[row.network].name}: {reason}"] if reason else []
    points = 100 * row.accuracy.mean - average
    spread = 100 * (row.accuracy.deviation or 0.0)
    if abs(points) < max(LEAST_POINTS, LEAST_DEVIATIONS * spread):
        return [f"{NETWORKS[row.network].name}: {reason}"] if reason else []
    side = "above" if points > 0 else "below"
    return [
        f"{NETWORKS[row.network].name} is {abs(points):.2f} points {side} the paper's figure: "
        f"{reason or NO_REASON}"
    ]


def _ours(found: Results, links: dict[str, str]) -> str:
    row = found.rows.get((OURS, "mobilesteelnet"))
    if row is None:
        return ""
    options = row.results[0]["config"]
    published = found.rows.get((PUBLISHED, "mobilesteelnet"))
    compared = f"; the published recipe gives {published.accuracy.percent()} %" if published else ""
    errors = [
        result["test"]["calibration"]["expected_error"]
        for result in row.results
        if result["test"]["calibration"]
    ]
    classes = " · ".join(
        f"{name} {spread.percent()}"
        for name in row.classes
        if (spread := row.class_accuracy(name)) is not None
    )
    parts = [
        "## MobileSteelNet by our recipe",
        f"**{row.accuracy.percent()} %** over {_seeds(row)} (paper: 91.36 %{compared}). The same "
        "split and pictures, from scratch, and the same network but for what the recipe says: "
        "`activation relu` puts a batch norm and a ReLU behind each depthwise convolution, and a "
        "ReLU behind each block. "
        "Command: `mobilesteelnet reproduce ours --data NEU-DET.zip`; one network: "
        "`mobilesteelnet train --recipe ours --data NEU-DET.zip`.",
        f"By class: {classes}.",
        *strays([row]),
        "The recipe: " + ", ".join(_option(k, options[k]) for k in _changed(options)) + ".",
        _effort(row),
    ]
    if errors:
        mean = 100 * sum(errors) / len(errors)
        parts.append(f"Expected calibration error {mean:.2f} % (mean over the seeds).")
        parts += found.notes.get("ours", {}).values()
        parts.append(_coverage_table(row))
        parts.append(image(links, "calibration", "Calibration of our recipe"))
    parts.append(_hard_cases(row))
    return "\n\n".join(part for part in parts if part)


def _ours_ablation(found: Results) -> str:
    """The networks of the ablations by our recipe, whose trainings do not stop early."""
    tables = [TABLES[name].rows for name in ("table7", "table9", "table5")]
    networks = dict.fromkeys(network for rows in tables for network in rows)
    rows = [found.rows[OURS, network] for network in networks if (OURS, network) in found.rows]
    if len(rows) < 2:
        return ""
    classes = rows[0].classes
    head = ["network", "runs", "our recipe", "published recipe", *classes]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        other = found.rows.get((PUBLISHED, row.network))
        cells = [NETWORKS[row.network].name, str(len(row.results)), row.accuracy.percent()]
        cells.append("–" if other is None else other.accuracy.percent())
        lines.append(cells + [_class_cell(row, name, {}) for name in classes])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    told = [*strays(rows), *found.notes.get("ours ablation", {}).values()]
    return "\n\n".join(
        part
        for part in (
            "## The modules by our recipe",
            "What MSFF and CIEMA add where a training ends with its schedule, not at a chance rise "
            "of the validation loss. Command: "
            "`mobilesteelnet reproduce table7 --recipe ours --data NEU-DET.zip`."
            f"{precisions(named(rows))}",
            text,
            "\n".join(f"* {sentence}" for sentence in told),
        )
        if part
    )


def _seeds(row: Row) -> str:
    count = len(row.results)
    return f"{count} seeds" if count > 1 else f"one seed ({row.results[0]['seed']})"


def _effort(row: Row) -> str:
    """What the trainings took, and on what."""
    minutes = sorted({round(result["training"]["seconds"] / 60) for result in row.results})
    took = " to ".join(f"{end}" for end in dict.fromkeys((minutes[0], minutes[-1])))
    note = "by the clock, with the pauses and whatever ran beside it"
    return f"A training took {took} minutes {note}.{machines(row.results)}"


def _changed(options: dict[str, Any]) -> list[str]:
    """The options that differ from the published recipe."""
    from ..train_config import TrainConfig

    plain = TrainConfig(data="").to_dict()
    skipped = ("data", "seed", "split_seed")
    return [key for key in options if key not in skipped and options[key] != plain.get(key)]


def _option(name: str, value: Any) -> str:
    return f"{name} {value}"


def _coverage_table(row: Row) -> str:
    """Accuracy and share of the pictures that a least confidence leaves, means over the seeds."""
    curves = [result["test"]["calibration"]["coverage"] for result in row.results]
    lines = ["| `--min-confidence` | accepted | accuracy of the accepted |", "|---:|---:|---:|"]
    for items in zip(*curves, strict=True):
        accuracies = [item["accuracy"] for item in items if item["accuracy"] is not None]
        share = 100 * sum(item["coverage"] for item in items) / len(items)
        mean = f"{100 * sum(accuracies) / len(accuracies):.2f}" if accuracies else "–"
        lines.append(f"| {items[0]['threshold']:g} | {share:.1f} | {mean} |")
    return "\n".join(lines)


def _hard_cases(row: Row) -> str:
    """The pictures that most of the seeds get wrong, by name: the pictures are not ours to show."""
    wrong = Counter(name for result in row.results for name, *_ in result["test"]["wrong"])
    hard = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:MOST_HARD_CASES]
    if not hard:
        return ""
    chosen = {name: label for result in row.results for name, label, _ in result["test"]["wrong"]}
    listed = ", ".join(
        f"`{name}` taken for {chosen[name]} ({count} of {len(row.results)})" for name, count in hard
    )
    return (
        f"Hardest pictures: {listed}. `mobilesteelnet eval RUN` draws them with the spatial gate "
        "over them; the data set's pictures are not part of this project."
    )
