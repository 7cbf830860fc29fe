"""The page's sections on trials of recipes: the choice among candidates, and other picture sets."""

from __future__ import annotations

from typing import Any

from ..recipes import CANDIDATES, OURS, PUBLISHED, SEARCH
from ..train_config import TrainConfig
from .grid import FIRST_SEED, NETWORKS
from .made_how import machines, other_options, precisions, strays
from .sets import NETWORK, SETS
from .summary import Results


def recipe_section(found: Results) -> str:
    """How the recipe was chosen."""
    if not found.candidates:
        return ""
    ranked = sorted(found.candidates.items(), key=lambda item: -item[1]["average_accuracy"])
    lines = [
        "| candidate | accuracy | loss | calibration error | fits |",
        "|---" + "|---:" * 4 + "|",
    ]
    for name, item in ranked:
        figure = f"{100 * item['average_accuracy']:.2f}"
        if item["deviation"] is not None:
            figure += f" ± {100 * item['deviation']:.2f}"
        error = f"{100 * item['calibration_error']:.2f}"
        lines.append(f"| {name} | {figure} | {item['loss']:.3f} | {error} | {len(item['folds'])} |")
    search = ", ".join(f"{name} {value}" for name, value in SEARCH.items())
    favoured = (
        f"; but `{PUBLISHED}`, which is favoured: it stops, and chooses its epoch, on the pictures "
        "that it is judged on"
        if PUBLISHED in found.candidates
        else ""
    )
    return "\n\n".join(
        part
        for part in (
            "## How the recipe was chosen",
            "Cross-validation inside the training and validation pictures (10 % of the set); the "
            "test pictures took no part. Each candidate is `ours` with a change, judged on a "
            f"cheaper network ({search}){favoured}. A fit is judged on half of those pictures: "
            "differences of a few points may be chance, which is why the loss stands beside the "
            "accuracy.",
            "\n".join(lines),
            "\n".join(f"* {text}" for text in _changed_candidates(found.candidates)),
            "Command: `mobilesteelnet reproduce recipe --data NEU-DET.zip --fits FITS`."
            f"{machines(item for _, item in ranked)}",
            *found.notes.get("recipe", {}).values(),
        )
        if part
    )


def _changed_candidates(found: dict[str, dict[str, Any]]) -> list[str]:
    """The candidates whose results are of other options than they have here."""
    told = []
    for name, item in found.items():
        if name not in CANDIDATES:
            told.append(f"{name} is no candidate of this version.")
            continue
        # An option that came after a result has its default there.
        stored = TrainConfig.from_dict({**item["config"], "data": ""}).to_dict()
        wanted = TrainConfig(**{"data": "", "seed": FIRST_SEED, **CANDIDATES[name]}).to_dict()
        changed = other_options(stored, wanted)
        if changed:
            told.append(f"{name} was **not** judged as it stands: {changed}.")
    return told


def sets_section(found: Results) -> str:
    """Both recipes on other picture sets."""
    if not found.sets:
        return ""
    recipes = (PUBLISHED, OURS)
    lines = [
        "| set | classes | published recipe | our recipe | seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    named, changed = [], []
    for name, rows in found.sets.items():
        some = next(iter(rows.values()))
        title = f"{name}: {SETS[name].title}" if name in SETS else name
        cells = [rows[recipe].accuracy.percent() if recipe in rows else "–" for recipe in recipes]
        seeds = str(min(len(row.results) for row in rows.values()))
        lines.append("| " + " | ".join([title, str(len(some.classes)), *cells, seeds]) + " |")
        named += [(f"{name} by {recipe}", row) for recipe, row in rows.items()]
        for recipe, row in rows.items():
            changed += [f"* {text}" for text in strays([row], f"{name} by {recipe}: ")]
    told = [f"* {name}: {text}" for name, text in found.notes.get("sets", {}).items()]
    return "\n\n".join(
        part
        for part in (
            "## Other picture sets",
            "Both recipes as they stand, 5 % of the pictures to train on, 5 % to validate, tested "
            "on the rest; nothing was chosen on these sets. The network is "
            f"{NETWORKS[NETWORK].name} of table 7. Command: `mobilesteelnet reproduce sets`."
            f"{precisions(named)}",
            "\n".join(lines),
            "\n".join([*changed, *told]),
        )
        if part
    )
