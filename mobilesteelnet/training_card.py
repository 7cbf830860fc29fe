"""What a training says of itself: in the checkpoint, and of pictures that its weights know."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from .splits import recognise, seen_pictures
from .train_config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from .data import PictureSet
    from .splits import Split


def tell_of_known_pictures(
    config: TrainConfig, split: Split, pictures: PictureSet, seen: Any, console: Console | None
) -> None:
    """Say which held-out pictures the training before this one learnt from or was chosen by."""
    known = recognise(seen, pictures)
    if known is None or console is None:
        return
    learnt, chosen = set(known["train"]), {*known["train"], *known["val"]}
    val, test = len(learnt & set(split.val)), len(chosen & set(split.test))
    if val or test:
        console.print(
            f"init-from {config.init_from}: its training saw {val} of the {len(split.val)} "
            f"validation pictures and {test} of the {len(split.test)} test pictures. Validation "
            "figures look too good for it; eval leaves those test pictures out",
            markup=False,
            highlight=False,
        )


def tell_of_contradictions(pictures: PictureSet, console: Console | None) -> None:
    """Say which classes have a picture in common: one of them is taught what is not true."""
    if console is None:
        return
    counts: Counter[str] = Counter()
    for group in pictures.duplicate_groups():
        names = sorted({pictures.class_of(i) for i in group})
        counts[", ".join(names)] += len(names) > 1
    for shared, count in (+counts).items():
        what = "1 picture is" if count == 1 else f"{count} pictures are"
        text = f"{what} the same in {shared}: data check tells which"
        console.print(text, markup=False, highlight=False)


def training_card(
    config: TrainConfig, split: Split, pictures: PictureSet, earlier: Any
) -> dict[str, Any]:
    """What the checkpoint says about its training; no paths, since checkpoints travel."""
    options = config.to_dict()
    options["data"] = Path(config.data).name
    options["init_from"] = Path(config.init_from).name if config.init_from else None
    return {
        "options": options,
        "pictures": {"train": len(split.train), "val": len(split.val), "test": len(split.test)},
        "seen": seen_pictures(split, pictures, earlier),
        "versions": {"torch": torch.__version__, "lightning": L.__version__},
    }
