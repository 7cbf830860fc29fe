"""RESULTS.md: every table again, beside the paper's figures, made from the result files alone."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from ..recipes import OURS, PUBLISHED, SEARCH
from ..run_folder import RunFolderError, write_atomically, write_text
from . import drawings
from .grid import COST_TABLES, FIRST_SEED, NETWORKS, TABLES, PlannedRun, paper_figures
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
    if not found.rows and not found.costs:
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
    parts = [
        "# Results",
        "Made by `mobilesteelnet reproduce page` from the files in `results/`; nothing here is "
        "written by hand but the reasons in `results/notes.json`. Accuracies are the mean of the "
        "classes' accuracies on the test pictures, in per cent, mean ± standard deviation over the "
        f"seeds; the split is fixed (seed {FIRST_SEED}), every network is trained from scratch. "
        "The test pictures were read once a run, after its training (and of the weights that the "
        "package brings once more, to measure what storing them in eight bits costs).",
        f"Paper: {paper['citation']}.",
        _ours(found, links),
    ]
    for name in ("table7", "table9", "table5", "table4"):
        parts.append(_accuracy_table(name, found, paper["accuracy"].get(name, {})))
        if name == "table7":
            parts += [_image(links, "confusion", "Confusion matrices of the ablation")]
            parts += [_image(links, "curves", "Training curves of the ablation")]
    parts.append(_cost_table(found, paper))
    parts.append(_image(links, "cost", "Accuracy against cost of all networks"))
    parts.append(_modules_table(found, paper))
    parts.append(_contrast(found, paper, links))
    parts.append(_recipe(found))
    parts.append(_robustness(found))
    remarks = "\n".join(f"* {remark}" for remark in paper["remarks"])
    parts.append(f"## Where the paper does not add up\n\n{remarks}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _image(links: dict[str, str], name: str, alt: str) -> str:
    return f"![{alt}]({links[name]})" if name in links else ""


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
    sentences = [*_strays(rows), *sentences]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = (
        "Of a class: the mean here, in brackets the paper's figure where it gives one. "
        f"Published recipe; command: `mobilesteelnet reproduce {name} --data NEU-DET.zip`."
    )
    told = "\n".join(f"* {sentence}" for sentence in sentences)
    return "\n\n".join(p for p in (f"## {TABLES[name].title}", text, note, told) if p)


def _strays(rows: list[Row]) -> list[str]:
    """What a reader must know first: results that were not made by the recipe as it stands."""
    told = []
    for row in rows:
        result = row.results[0]
        wanted = PlannedRun(row.network, result["recipe"], result["seed"]).config("", {}).to_dict()
        other = [
            f"{key} {value}"
            for key, value in result["config"].items()
            if key != "data" and value != wanted.get(key)
        ]
        if other:
            told.append(
                f"{NETWORKS[row.network].name} was **not** made by the recipe as it stands: "
                f"{', '.join(other)}."
            )
    return told


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
        "split and pictures, from scratch, and the same network but for what the recipe says. "
        "Command: `mobilesteelnet reproduce ours --data NEU-DET.zip`; one network: "
        "`mobilesteelnet train --recipe ours --data NEU-DET.zip`.",
        f"By class: {classes}.",
        *_strays([row]),
        "The recipe: " + ", ".join(_option(k, options[k]) for k in _changed(options)) + ".",
        _effort(row),
    ]
    if errors:
        mean = 100 * sum(errors) / len(errors)
        parts.append(f"Expected calibration error {mean:.2f} % (mean over the seeds).")
        parts.append(_coverage_table(row))
        parts.append(_image(links, "calibration", "Calibration of our recipe"))
    parts.append(_hard_cases(row))
    return "\n\n".join(part for part in parts if part)


def _seeds(row: Row) -> str:
    count = len(row.results)
    return f"{count} seeds" if count > 1 else f"one seed ({row.results[0]['seed']})"


def _effort(row: Row) -> str:
    """What the trainings took, and on what."""
    minutes = sorted({round(result["training"]["seconds"] / 60) for result in row.results})
    took = " to ".join(f"{end}" for end in dict.fromkeys((minutes[0], minutes[-1])))
    places = sorted(
        {f"{r['machine']['device']}, {r['machine'].get('precision', '?')}" for r in row.results}
    )
    note = "by the clock, with the pauses and whatever ran beside it"
    return f"A training took {took} minutes {note} ({'; '.join(places)})."


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


def _cost_table(found: Results, paper: dict[str, Any]) -> str:
    rows = [key for key in COST_TABLES["table6"].rows if key in found.costs]
    if not rows:
        return ""
    head = (
        "| network | parameters | MB in float32 | GFLOP | paper | images/s | paper | ms an image |"
    )
    lines = [head, "|---" + "|---:" * 7 + "|"]
    for key in rows:
        cost, figures = found.costs[key], paper["cost"].get(key, {})
        gflop = f"{cost['flop'] / 1e9:.2f}"
        if cost["published_flop"] != cost["flop"]:
            gflop += f" (published form {cost['published_flop'] / 1e9:.2f})"
        cells = [NETWORKS[key].name, f"{cost['parameters']:,}"]
        cells += [f"{cost['float32_bytes'] / 1e6:.1f}", gflop, _number(figures.get("gflop"))]
        cells += [f"{cost['images_per_second']:.2f}", _number(figures.get("images_per_second"))]
        lines.append("| " + " | ".join([*cells, f"{1000 * cost['forward_seconds']:.2f}"]) + " |")
    size = found.costs[rows[0]]["input_size"]
    machines = sorted({found.costs[key]["machine"]["device"] for key in rows})
    return (
        f"## {COST_TABLES['table6'].title}\n\n" + "\n".join(lines) + "\n\n"
        f"Measured on {'; '.join(machines)}, one image of {size}×{size}, float32, evaluation mode, "
        "median; two FLOP a multiply-add (the paper's figures of other networks count one). The "
        "paper's speeds are those of an RTX 3090. Command: `mobilesteelnet reproduce table6`."
    )


def _modules_table(found: Results, paper: dict[str, Any]) -> str:
    rows = [key for key in COST_TABLES["table8"].rows if key in found.costs]
    if "backbone" not in rows or "mobilesteelnet" not in rows:
        return ""
    base = found.costs["backbone"]
    lines = ["| network | training, ms an image | test, ms an image |", "|---|---:|---:|"]
    for key in rows:
        cost = found.costs[key]
        train, test = cost["training_seconds_an_image"], cost["forward_seconds"]
        ratio = train / base["training_seconds_an_image"]
        lines.append(
            f"| {NETWORKS[key].name} | {1000 * train:.1f} (×{ratio:.2f}) | {1000 * test:.2f} "
            f"({1000 * (test - base['forward_seconds']):+.2f}) |"
        )
    figures = paper["table8"]
    return (
        f"## {COST_TABLES['table8'].title}\n\n" + "\n".join(lines) + "\n\n"
        f"The paper has training time +{figures['training_time_percent']} % and test time "
        f"+{figures['test_milliseconds']} ms of MobileSteelNet over MobileNetV1, on an RTX 3090. "
        f"Training steps here hold {base['training_batch']} images. Command: "
        "`mobilesteelnet reproduce table8`."
    )


def _contrast(found: Results, paper: dict[str, Any], links: dict[str, str]) -> str:
    if not found.contrast:
        return ""
    names = ("min", "max", "mean", "median", "std")
    lines = ["| class | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|"]
    for item in found.contrast:
        figures = paper["contrast"].get(item["class"], {})
        cells = [
            f"{item[name]:.2f}" + (f" ({figures[name]:.2f})" if name in figures else "")
            for name in names
        ]
        lines.append(f"| {item['class']} | " + " | ".join(cells) + " |")
    return "\n\n".join(
        part
        for part in (
            "## Table 3: contrast (standard deviation of the grey levels)",
            "\n".join(lines),
            "In brackets the paper's figures.",
            _image(links, "contrast", "Contrast of the classes"),
        )
        if part
    )


def _recipe(found: Results) -> str:
    if not found.candidates:
        return ""
    ranked = sorted(found.candidates.items(), key=lambda item: -item[1]["average_accuracy"])
    head = "| candidate | accuracy | loss | calibration error | fits |"
    lines = [head, "|---" + "|---:" * 4 + "|"]
    search = ", ".join(_option(name, value) for name, value in SEARCH.items())
    for name, item in ranked:
        fits = len(item["folds"])
        figure = f"{100 * item['average_accuracy']:.2f}"
        if item["deviation"] is not None:
            figure += f" ± {100 * item['deviation']:.2f}"
        error = f"{100 * item['calibration_error']:.2f}"
        lines.append(f"| {name} | {figure} | {item['loss']:.3f} | {error} | {fits} |")
    return (
        "## How the recipe was chosen\n\nCross-validation inside the training and validation "
        "pictures (10 % of the set); the test pictures took no part. Each candidate is `ours` with "
        f"a change, judged on a cheaper network ({search}); but `published`, which is favoured: "
        "it stops, and chooses its epoch, on the pictures that it is judged on. A fit is judged on "
        "half of those pictures: differences of a few points may be chance, which is why the loss "
        "stands beside the accuracy.\n\n" + "\n".join(lines) + "\n\n"
        "Command: `mobilesteelnet reproduce recipe --data NEU-DET.zip --fits FITS`."
    )


def _robustness(found: Results) -> str:
    rows = found.robustness.get("rows", [])
    if not rows:
        return ""
    lines = ["| change | level | accuracy | calibration error |", "|---|---:|---:|---:|"]
    for row in rows:
        level = "–" if row["change"] == "none" else f"{row['level']:g}"
        figures = (row["average_accuracy"], row["calibration_error"])
        cells = [row["change"], level, *(f"{100 * value:.2f}" for value in figures)]
        lines.append("| " + " | ".join(cells) + " |")
    return (
        "## Changed pictures\n\n" + "\n".join(lines) + "\n\nLevels: brightness and contrast a "
        "factor, blur the radius in pixels, noise the standard deviation in grey levels, jpeg the "
        "quality. Command: `mobilesteelnet robustness RUN --json results/robustness.json`."
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
