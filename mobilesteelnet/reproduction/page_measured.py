"""The page's sections on what is measured without a training: cost, contrast, robustness."""

from __future__ import annotations

from typing import Any

from .grid import COST_TABLES, NETWORKS
from .summary import Results


def image(links: dict[str, str], name: str, alt: str) -> str:
    """A figure in Markdown; nothing if it was not drawn."""
    return f"![{alt}]({links[name]})" if name in links else ""


def cost_table(found: Results, paper: dict[str, Any]) -> str:
    """Table 6, of the networks that were measured."""
    rows = [key for key in COST_TABLES["table6"].rows if key in found.costs]
    if not rows:
        return ""
    head = (
        "| network | parameters | MB in float32 | GFLOP | paper | images/s | paper | ms an image "
        "| frozen, ms |"
    )
    lines = [head, "|---" + "|---:" * 8 + "|"]
    for key in rows:
        cost, figures = found.costs[key], paper["cost"].get(key, {})
        gflop = f"{cost['flop'] / 1e9:.2f}"
        if cost["published_flop"] != cost["flop"]:
            gflop += f" (published form {cost['published_flop'] / 1e9:.2f})"
        cells = [NETWORKS[key].name, f"{cost['parameters']:,}"]
        cells += [f"{cost['float32_bytes'] / 1e6:.1f}", gflop, _number(figures.get("gflop"))]
        cells += [f"{cost['images_per_second']:.2f}", _number(figures.get("images_per_second"))]
        cells += [_milliseconds(cost["forward_seconds"]), _milliseconds(cost.get("frozen_seconds"))]
        lines.append("| " + " | ".join(cells) + " |")
    sizes = sorted({found.costs[key]["input_size"] for key in rows})
    size = " or ".join(f"{side}×{side}" for side in sizes)
    machines = sorted({found.costs[key]["machine"]["device"] for key in rows})
    return (
        f"## {COST_TABLES['table6'].title}\n\n" + "\n".join(lines) + "\n\n"
        f"Measured on {'; '.join(machines)}, one image of {size}, float32, evaluation mode, "
        "median; two FLOP a multiply-add (the paper's figures of other networks count one). "
        "Frozen: the copy by `fused.optimize_for_inference`, by which `mobilesteelnet predict` "
        "works. The paper's speeds are those of an RTX 3090. Command: "
        "`mobilesteelnet reproduce table6`."
    )


def modules_table(found: Results, paper: dict[str, Any]) -> str:
    """Table 8, of the ablation."""
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
            f"| {NETWORKS[key].name} | {1000 * train:.1f} (×{ratio:.2f}) | {_milliseconds(test)} "
            f"({1000 * (test - base['forward_seconds']):+.2f}) |"
        )
    figures = paper["table8"]
    batches = " or ".join(str(n) for n in sorted({found.costs[k]["training_batch"] for k in rows}))
    return (
        f"## {COST_TABLES['table8'].title}\n\n" + "\n".join(lines) + "\n\n"
        f"The paper has training time +{figures['training_time_percent']} % and test time "
        f"+{figures['test_milliseconds']} ms of MobileSteelNet over MobileNetV1, on an RTX 3090. "
        f"Training steps here hold {batches} images. Command: "
        "`mobilesteelnet reproduce table8`."
    )


def contrast_section(found: Results, paper: dict[str, Any], links: dict[str, str]) -> str:
    """Table 3, of the pictures."""
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
            image(links, "contrast", "Contrast of the classes"),
        )
        if part
    )


def robustness_section(found: Results) -> str:
    """What changes of the pictures do to a network."""
    rows = found.robustness.get("rows", [])
    if not rows:
        return ""
    lines = ["| change | level | accuracy | calibration error |", "|---|---:|---:|---:|"]
    for row in rows:
        level = "–" if row["change"] == "none" else f"{row['level']:g}"
        figures = (row["average_accuracy"], row["calibration_error"])
        cells = [row["change"], level, *(f"{100 * value:.2f}" for value in figures)]
        lines.append("| " + " | ".join(cells) + " |")
    measured = found.robustness
    about = f"{measured['pictures']} pictures ({measured['split']})"
    if "checkpoint" in measured:
        about += f", network {measured['checkpoint']}, softmax at {measured['temperature']:g}"
    return (
        f"## Changed pictures\n\n{about}.\n\n"
        + "\n".join(lines)
        + "\n\nLevels: brightness and contrast a "
        "factor, blur the radius in pixels, noise the standard deviation in grey levels, jpeg the "
        "quality. Command: `mobilesteelnet robustness RUN --json results/robustness.json`."
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _milliseconds(seconds: float | None) -> str:
    return _number(None if seconds is None else 1000 * seconds)
