"""The options of a training run: their defaults are the paper's protocol."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("none", "cosine")
SELECTIONS = ("val_loss", "val_accuracy", "last")
BAD_FILE_RULES = ("skip", "fatal")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run learns. Plain types only, so that it can be stored.

    Attributes:
        data: Folder or zip of ``<class>/<picture>``.
        fractions: Shares of training, validation and test pictures, in sum 1
            (paper: 5/5/90 %).
        seed: Decides the split, the first weights, the order of pictures and the augmentation.
        size: Height and width of the network's input in pixels.
        augment: Random crop, flip, rotation, colour jitter and affine map of the training pictures.
        on_bad_file: ``skip`` or ``fatal``.
        attention, fusion, activation, width, bn_statistics: See ``MobileSteelNet``.
        init_from: Checkpoint whose weights the training starts from; None starts from scratch.
        epochs: At most so many passes over the training pictures.
        batch_size: Pictures a step and device.
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        learning_rate: Peak rate, reached after the warm-up.
        weight_decay: L2 term of Adam and SGD, decoupled for AdamW.
        momentum: Of SGD only.
        warmup_epochs: Epochs of linear warm-up. The paper has a warm-up but gives no length: 5.
        schedule: ``none`` (constant after the warm-up) or ``cosine`` (to 0 at the last step).
        label_smoothing: Of the cross-entropy, 0 to below 1.
        gradient_clip: Largest norm of the gradient; 0 does not clip.
        patience: Stop after so many epochs without a lower validation loss; 0 never stops early.
        select: Which epoch becomes ``best.safetensors``: lowest ``val_loss``, highest
            ``val_accuracy`` or the ``last``.
    """

    data: str
    fractions: tuple[float, float, float] = (0.05, 0.05, 0.90)
    seed: int = 42
    size: int = 224
    augment: bool = True
    on_bad_file: str = "skip"
    attention: str = "ciema"
    fusion: str = "msff"
    activation: str | None = None
    width: float = 1.0
    bn_statistics: str = "sequential"
    init_from: str | None = None
    epochs: int = 200
    batch_size: int = 32
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup_epochs: int = 5
    schedule: str = "none"
    label_smoothing: float = 0.0
    gradient_clip: float = 0.0
    patience: int = 10
    select: str = "val_loss"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("seed", 0, 2**63 - 1),
            ("size", 1, 8192),
            ("epochs", 1, 1_000_000),
            ("batch_size", 1, 1_000_000),
            ("warmup_epochs", 0, 1_000_000),
            ("patience", 0, 1_000_000),
        ):
            _check_whole(name, getattr(self, name), low, high)
        for name, least, most in (
            ("learning_rate", 0.0, 1e3),
            ("weight_decay", 0.0, 1e3),
            ("momentum", 0.0, 1.0),
            ("gradient_clip", 0.0, 1e12),
            ("width", 0.0, 64.0),
        ):
            _check_number(name, getattr(self, name), least, most)
        for name in ("learning_rate", "width"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be above 0")
        _check_number("label_smoothing", self.label_smoothing, 0.0, 1.0)
        if self.label_smoothing == 1:
            raise ValueError("label_smoothing=1.0: must be below 1")
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("select", SELECTIONS),
            ("on_bad_file", BAD_FILE_RULES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}"
                )
        _check_fractions(self.fractions)

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON-able values."""
        return {**asdict(self), "fractions": list(self.fractions)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The options that :meth:`to_dict` gave.

        Raises:
            ValueError: An option is unknown, missing or out of range.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown or "data" not in values:
            raise ValueError(f"config: unknown options {unknown}, data={values.get('data')!r}")
        fractions = values.get("fractions", cls.fractions)
        try:
            return cls(**{**values, "fractions": tuple(fractions)})
        except TypeError as error:
            raise ValueError(f"config: {error}") from None

    def learning_rate_factor(self, step: int, steps_per_epoch: int) -> float:
        """What the peak learning rate is multiplied with at an optimizer step (counted from 0)."""
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "none":
            return 1.0
        total = max(self.epochs * steps_per_epoch - warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * min(step - warmup, total) / total))


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes; may differ between a run and its resumption.

    Attributes:
        accelerator, devices, num_nodes, strategy, precision: As in Lightning's ``Trainer``. Under
            torchrun and SLURM, Lightning takes the processes' places from the environment.
        sync_batchnorm: Batch-norm statistics over all devices (by way of the reference backend).
        workers: Processes that read pictures; None takes 0 on a CPU and 4 on a GPU. The result does
            not depend on it.
        backend: Backend of the fused stages; None lets the registry choose.
        compile: Run the network through ``torch.compile``.
    """

    accelerator: str = "auto"
    devices: str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    sync_batchnorm: bool = False
    workers: int | None = None
    backend: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        _check_whole("num_nodes", self.num_nodes, 1, 100_000)
        if self.workers is not None:
            _check_whole("workers", self.workers, 0, 1024)


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int:
        raise ValueError(f"{name}={value!r}: must be a whole number")
    if not low <= value <= high:
        raise ValueError(f"{name}={value}: must be from {low} to {high}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if type(value) not in (int, float):
        raise ValueError(f"{name}={value!r}: must be a number")
    if not low <= float(value) <= high:  # type: ignore[arg-type]  # int or float, by the line above
        raise ValueError(f"{name}={value}: must be from {low} to {high}")


def _check_fractions(fractions: object) -> None:
    if not isinstance(fractions, tuple) or len(fractions) != 3:
        raise ValueError(f"fractions={fractions!r}: must be three shares: train, val, test")
    if not all(type(part) in (int, float) and 0 <= part <= 1 for part in fractions):
        raise ValueError(f"fractions={fractions!r}: each share must be from 0 to 1")
    if fractions[0] == 0 or fractions[1] == 0:
        raise ValueError(f"fractions={fractions!r}: training and validation need a share above 0")
    if abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions={fractions!r}: must sum to 1")
