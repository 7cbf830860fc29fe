"""Classifying pictures with a checkpoint: one picture, a folder or a zip.

run = predict(load_checkpoint("best.safetensors"), scan("plate.jpg", labelled=False))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from fused.contract import check_count

from .checkpoint import Checkpoint, CheckpointError
from .data import BadFile, DataError, PictureSet, eval_transform
from .pictures import Image

Progress = Callable[[int, int], None]
Change = Callable[[Image.Image, str], Image.Image]
"""(picture, its name) → the picture that is classified in its place."""
LOADING_THREADS = 4


@dataclass(frozen=True)
class Prediction:
    """What the network says about one picture.

    Attributes:
        name: The picture's path below the folder or zip.
        label: The most probable class.
        probability: Its softmax probability at the checkpoint's temperature, 0 to 1.
        top: The most probable classes with their probabilities, falling.
        rejected: Whether the probability is below the least confidence that was asked for.
    """

    name: str
    label: str
    probability: float
    top: list[tuple[str, float]]
    rejected: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "name": self.name,
            "class": self.label,
            "probability": self.probability,
            "rejected": self.rejected,
            "top": [{"class": label, "probability": value} for label, value in self.top],
        }


@dataclass
class Predictions:
    """The predictions of one call.

    Attributes:
        items: One for each picture that could be read, in the order of the names.
        bad: The files that could not, and why.
    """

    items: list[Prediction] = field(default_factory=list)
    bad: list[BadFile] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: ``predictions`` and ``bad_files``."""
        return {
            "predictions": [item.to_dict() for item in self.items],
            "bad_files": [{"name": file.name, "reason": file.reason} for file in self.bad],
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """One flat dict a file, readable or not, for CSV."""
        places = max((len(item.top) for item in self.items), default=1)
        rows: list[dict[str, Any]] = []
        for item in self.items:
            row: dict[str, Any] = {"name": item.name}
            for place in range(places):
                label, value = item.top[place]
                end = "" if place == 0 else f"_{place + 1}"
                row |= {f"class{end}": label, f"probability{end}": f"{value:.6f}"}
            row["rejected"] = "yes" if item.rejected else "no"
            rows.append({**row, "error": ""})
        columns = list(rows[0]) if rows else ["name", "class", "probability", "rejected", "error"]
        for file in self.bad:
            rows.append({**dict.fromkeys(columns, ""), "name": file.name, "error": file.reason})
        return rows


def choose_device(device: str) -> torch.device:
    """The device of a name; ``auto`` is the GPU where there is one, else the CPU.

    Raises:
        ValueError: There is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except Exception as error:  # a dozen kinds, by the device and the build of torch
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"device={device!r} cannot be used: {reason}") from None
    return chosen


def classify(
    checkpoint: Checkpoint,
    pictures: PictureSet,
    indexes: Sequence[int] | None = None,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
    change: Change | None = None,
) -> Iterator[tuple[int, torch.Tensor | BadFile]]:
    """Class probabilities of pictures, in batches, on the device of the network.

    Args:
        checkpoint: The network with its classes, input size and normalisation; it is put in
            evaluation mode.
        pictures: Where the pictures are.
        indexes: Which of them; None takes all.
        batch_size: Pictures a forward.
        progress: Called with (done, total) after each batch.
        change: Applied to each picture before it is resized.

    Yields:
        ``(index, probabilities (num_classes,) float32 on the CPU)``, or the reason why the picture
        could not be read, in the order of ``indexes``.

    Raises:
        ValueError: ``batch_size`` is below 1, or an index is none of a picture.
        CheckpointError: The network gives a value that is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be 1 or more")
    colours = getattr(checkpoint.model, "config", {}).get("in_channels", 3)
    if colours != 3:
        raise CheckpointError(f"the network takes in_channels={colours}, pictures have 3")
    wanted = list(range(len(pictures)) if indexes is None else indexes)
    for index in wanted:
        if not 0 <= index < len(pictures):
            raise ValueError(f"indexes: {index} is none of the {len(pictures)} pictures")
    mean, std = checkpoint.normalisation["mean"], checkpoint.normalisation["std"]
    transform = eval_transform(checkpoint.input_size, mean=mean, std=std)
    device = next(checkpoint.model.parameters()).device
    checkpoint.model.eval()

    def load(index: int) -> torch.Tensor | BadFile:
        try:
            picture = pictures.open(index)
            return transform(
                picture if change is None else change(picture, pictures.items[index].name)
            )
        except DataError as error:
            return BadFile(pictures.items[index].name, str(error))

    with ThreadPoolExecutor(LOADING_THREADS) as pool:
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            loaded = list(pool.map(load, batch))
            images = [item for item in loaded if isinstance(item, torch.Tensor)]
            rows = iter(_probabilities(checkpoint, images, device))
            for index, item in zip(batch, loaded, strict=True):
                if isinstance(item, BadFile):
                    yield index, item
                    continue
                row = next(rows)
                if not bool(torch.isfinite(row).all()):
                    raise CheckpointError(
                        f"the network's output for {pictures.items[index].name!r} is not finite: "
                        "the checkpoint cannot be used"
                    )
                yield index, row
            if progress is not None:
                progress(start + len(batch), len(wanted))


def _probabilities(
    checkpoint: Checkpoint, images: list[torch.Tensor], device: torch.device
) -> torch.Tensor:
    if not images:
        return torch.empty(0, 0)
    with torch.inference_mode():
        logits = checkpoint.model(torch.stack(images).to(device)).float()
        logits /= checkpoint.temperature
    # A softmax would hide an infinite logit, so that it is judged before.
    finite = torch.isfinite(logits).all(dim=1, keepdim=True)
    return torch.where(finite, logits.softmax(dim=1), torch.nan).cpu()


def predict(
    checkpoint: Checkpoint,
    pictures: PictureSet,
    *,
    indexes: Sequence[int] | None = None,
    top_k: int = 1,
    min_confidence: float = 0.0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Predictions:
    """Classify all pictures of a set, going on past files that cannot be read.

    Args:
        checkpoint: See :func:`mobilesteelnet.checkpoint.load_checkpoint`.
        pictures: See :func:`mobilesteelnet.data.scan`, with ``labelled=False``.
        indexes: Which of the pictures; None takes all.
        top_k: How many classes to give for each picture; at most all.
        min_confidence: Pictures whose most probable class is less probable are marked as rejected.
        batch_size: Pictures a forward.
        progress: Called with (done, total).

    Raises:
        ValueError: ``top_k`` or ``batch_size`` is below 1, ``min_confidence`` not from 0 to 1.
        CheckpointError: The network gives a value that is not finite.
    """
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence={min_confidence}: must be from 0 to 1")
    check_count("top_k", top_k)
    result = Predictions(bad=list(pictures.bad))
    places = min(top_k, len(checkpoint.classes))
    found_all = classify(checkpoint, pictures, indexes, batch_size=batch_size, progress=progress)
    for index, found in found_all:
        if isinstance(found, BadFile):
            result.bad.append(found)
            continue
        values, classes = found.topk(places)
        top = [
            (checkpoint.classes[label], value)
            for label, value in zip(classes.tolist(), values.tolist(), strict=True)
        ]
        label, probability = top[0]
        rejected = probability < min_confidence
        name = pictures.items[index].name
        result.items.append(Prediction(name, label, probability, top, rejected))
    return result
