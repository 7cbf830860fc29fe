"""Measuring a checkpoint on labelled pictures: accuracies, confusion matrix, each prediction."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .calibration import LEAST_PICTURES, Calibration, calibrate, fit_temperature
from .checkpoint import Checkpoint
from .data import BadFile, DataError, PictureSet, Split
from .predict import Change, Progress, classify
from .run_folder import RunFolder

WHOSE = {
    "test": "which the training never saw",
    "val": "on which the training was watched",
    "train": "from which the training learnt",
    "all": "the whole set, with any that the training saw",
}
"""The parts of a set, and what a figure on them must say of them."""

SPLITS = tuple(WHOSE)


@dataclass(frozen=True)
class ClassResult:
    """One class's figures, fractions of 1.

    Attributes:
        name: The class.
        pictures: How many pictures are of this class.
        accuracy: Share of them that were found (recall); None without pictures.
        precision: Share of the pictures called so that are so; 0 if none was called so.
        f1: Harmonic mean of the two; None without pictures.
    """

    name: str
    pictures: int
    accuracy: float | None
    precision: float
    f1: float | None

    @property
    def recall(self) -> float | None:
        """The other name of the accuracy of a class."""
        return self.accuracy


@dataclass(frozen=True)
class PictureResult:
    """One picture's outcome.

    Attributes:
        name: Path below the data's root.
        true: Its class.
        predicted: The class the network chose.
        probabilities: Of all classes, in their order.
    """

    name: str
    true: str
    predicted: str
    probabilities: list[float]


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation; fractions of 1.

    Attributes:
        split: ``test``, ``val``, ``train`` or ``all``.
        classes: Names in the order of the matrix.
        average_accuracy: Mean of the classes' accuracies (the paper's "average accuracy").
        overall_accuracy: Share of all pictures that are right.
        precision, recall, f1: Means over the classes that have pictures.
        per_class: One entry a class.
        confusion: Counts, ``confusion[true][predicted]``.
        predictions: One entry a picture.
        seconds: Time for reading and classifying.
        about: Where it comes from: data, checkpoint, versions, backends.
        calibration: Whether the probabilities can be trusted.
    """

    split: str
    classes: list[str]
    average_accuracy: float
    overall_accuracy: float
    precision: float
    recall: float
    f1: float
    per_class: list[ClassResult]
    confusion: list[list[int]]
    predictions: list[PictureResult]
    seconds: float
    about: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form of everything."""
        return asdict(self)

    @property
    def loss(self) -> float:
        """Cross-entropy of the probabilities, a picture."""
        chances = (item.probabilities[self.classes.index(item.true)] for item in self.predictions)
        # What underflows in float32 counts as its least number.
        return -math.fsum(math.log(max(chance, 1e-38)) for chance in chances) / len(
            self.predictions
        )

    @property
    def wrong(self) -> list[PictureResult]:
        """The wrong ones, the most confident mistakes first."""
        wrong = [item for item in self.predictions if item.true != item.predicted]
        return sorted(wrong, key=lambda item: (-max(item.probabilities), item.name))


def evaluate(
    checkpoint: Checkpoint,
    pictures: PictureSet,
    indexes: Sequence[int],
    *,
    split: str = "all",
    batch_size: int = 32,
    progress: Progress | None = None,
    change: Change | None = None,
) -> Evaluation:
    """Classify labelled pictures and count.

    Args:
        checkpoint: The network.
        pictures: The labelled set.
        indexes: Which pictures to take.
        split: The name of that part, for the record.
        batch_size: Pictures a forward.
        progress: Called with (done, total).
        change: Applied to each picture before it is resized.

    Raises:
        DataError: There is nothing to evaluate, the classes differ, or a picture cannot be read.
        CheckpointError: The network gives a value that is not finite.
    """
    if not len(indexes):
        raise DataError(f"split={split!r} holds no pictures")
    places = _match_classes(checkpoint, pictures)
    classes = checkpoint.classes if checkpoint.named_classes else pictures.classes
    started = time.perf_counter()
    results: list[PictureResult] = []
    truth: list[int] = []
    for index, found in classify(
        checkpoint, pictures, indexes, batch_size=batch_size, progress=progress, change=change
    ):
        if isinstance(found, BadFile):
            raise DataError(found.reason)
        true = places[pictures.labels[index]]
        truth.append(true)
        results.append(
            PictureResult(
                pictures.items[index].name,
                classes[true],
                classes[int(found.argmax())],
                found.tolist(),
            )
        )
    seconds = time.perf_counter() - started
    chosen = torch.tensor([classes.index(item.predicted) for item in results])
    figures = _count(chosen, torch.tensor(truth), list(classes))
    about = _about(checkpoint, pictures)
    return Evaluation(
        split=split,
        classes=list(classes),
        predictions=results,
        seconds=seconds,
        about=about,
        calibration=calibrate(
            torch.tensor([r.probabilities for r in results]), torch.tensor(truth)
        ),
        **figures,
    )


def find_temperature(
    checkpoint: Checkpoint,
    pictures: PictureSet,
    indexes: Sequence[int],
    *,
    split: str = "val",
    least: int = LEAST_PICTURES,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> tuple[float, Evaluation, Evaluation]:
    """The temperature that fits pictures which the network did not learn from.

    Args:
        checkpoint: The network.
        pictures: The labelled set.
        indexes: Which pictures to take.
        split: The name of that part, for the record.
        least: Fewer pictures are refused.
        batch_size: Pictures a forward.
        progress: Called with (done, total).

    Returns:
        The temperature, and the evaluations at that of the checkpoint and at it. It is that of the
        checkpoint where the fitted one does not have a lower loss on these pictures.

    Raises:
        DataError: There are too few pictures, or as :func:`evaluate`.
        CheckpointError: As :func:`evaluate`.
    """
    if len(indexes) < least:
        raise DataError(
            f"split={split!r} holds {len(indexes)} pictures: a temperature is fitted to {least} or "
            "more that the training did not learn from"
        )
    plain = evaluate(
        replace(checkpoint, temperature=1.0),
        pictures,
        indexes,
        split=split,
        batch_size=batch_size,
        progress=progress,
    )
    chances = torch.tensor([item.probabilities for item in plain.predictions])
    truth = torch.tensor([plain.classes.index(item.true) for item in plain.predictions])
    # Up to a number of each row, which a softmax takes out, these are the logits.
    logits = chances.clamp_min(torch.finfo(chances.dtype).tiny).log()

    def at(temperature: float) -> Evaluation:
        rows = (logits / temperature).softmax(1)
        predictions = [
            replace(item, probabilities=row)
            for item, row in zip(plain.predictions, rows.tolist(), strict=True)
        ]
        about = {**plain.about, "temperature": temperature}
        found = calibrate(rows, truth)
        return replace(plain, predictions=predictions, calibration=found, about=about)

    fitted = fit_temperature(logits, truth)
    before, after = at(checkpoint.temperature), at(fitted)
    # The fit holds back where all pictures are right, which can cost loss beside a bolder one.
    if after.loss >= before.loss:
        return checkpoint.temperature, before, before
    return fitted, before, after


def pick_split(pictures: PictureSet, split: str, run: RunFolder | None) -> list[int]:
    """The indexes of a part of the pictures, by the run's ``split.json``.

    Args:
        pictures: The labelled set.
        split: ``test``, ``val``, ``train`` or ``all``.
        run: The run that divided the pictures; None has no parts.

    Raises:
        ValueError: ``split`` is unknown, or is a part without a run.
        DataError: The pictures are not those of the run.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}")
    if split == "all":
        return list(range(len(pictures)))
    if run is None:
        raise ValueError(
            f"split={split!r}: only a run folder knows its parts; use 'all' or give the run folder"
        )
    parts = Split.from_dict(run.read_json(run.split), pictures)
    indexes: list[int] = list(getattr(parts, split))
    return indexes


def _match_classes(checkpoint: Checkpoint, pictures: PictureSet) -> list[int]:
    """For each class of the pictures, its place among the network's outputs."""
    if not checkpoint.named_classes:
        if len(checkpoint.classes) != len(pictures.classes):
            raise DataError(
                f"the checkpoint has {len(checkpoint.classes)} unnamed classes, the pictures have "
                f"{len(pictures.classes)}"
            )
        return list(range(len(pictures.classes)))
    unknown = [name for name in pictures.classes if name not in checkpoint.classes]
    if unknown:
        raise DataError(
            f"the pictures have classes that the checkpoint does not know: {', '.join(unknown)} "
            f"(it knows {', '.join(checkpoint.classes)})"
        )
    return [checkpoint.classes.index(name) for name in pictures.classes]


def _count(chosen: torch.Tensor, truth: torch.Tensor, classes: list[str]) -> dict[str, Any]:
    try:
        from torchmetrics import classification
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'evaluation needs torchmetrics: pip install "mobilesteelnet[train]"',
            name="torchmetrics",
        ) from None
    number = len(classes)
    matrix = classification.MulticlassConfusionMatrix(number)(chosen, truth)
    precision = classification.MulticlassPrecision(number, average=None)(chosen, truth).tolist()
    recall = classification.MulticlassRecall(number, average=None)(chosen, truth).tolist()
    f1 = classification.MulticlassF1Score(number, average=None)(chosen, truth).tolist()
    support = matrix.sum(dim=1).tolist()
    per_class = [
        ClassResult(
            name=name,
            pictures=int(support[place]),
            accuracy=recall[place] if support[place] else None,
            precision=precision[place],
            f1=f1[place] if support[place] else None,
        )
        for place, name in enumerate(classes)
    ]
    present = [place for place in range(number) if support[place]]

    def mean(values: list[float]) -> float:
        return math.fsum(values[place] for place in present) / len(present)

    return {
        "average_accuracy": mean(recall),
        "overall_accuracy": int(matrix.diagonal().sum()) / int(matrix.sum()),
        "precision": mean(precision),
        "recall": mean(recall),
        "f1": mean(f1),
        "per_class": per_class,
        "confusion": [[int(value) for value in row] for row in matrix.tolist()],
    }


def _about(checkpoint: Checkpoint, pictures: PictureSet) -> dict[str, Any]:
    import fused

    try:
        backends = str(fused.explain(checkpoint.model))
    except ValueError:  # the ablations without MSFF and CIEMA
        backends = "no fused blocks"
    return {
        "data": Path(pictures.path).name,
        "bad_files": [str(file) for file in pictures.bad],
        "input_size": checkpoint.input_size,
        "temperature": checkpoint.temperature,
        "device": str(next(checkpoint.model.parameters()).device),
        "network": dict(getattr(checkpoint.model, "config", {})),
        "training": checkpoint.training,
        "torch": torch.__version__,
        "backends": backends,
    }
