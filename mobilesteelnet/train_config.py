"""The options of a training run: their defaults are the paper's protocol."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("none", "cosine")
SELECTIONS = ("val_loss", "val_accuracy", "last")
AUGMENTATIONS = ("published", "texture", "none")
MIXES = ("none", "mixup", "cutmix")
AVERAGINGS = ("none", "ema", "swa")
BAD_FILE_RULES = ("skip", "fatal")

WHOLE_NUMBERS: dict[str, tuple[int, int]] = {
    "seed": (0, 2**63 - 1),
    "size": (1, 8192),
    "epochs": (1, 1_000_000),
    "batch_size": (1, 1_000_000),
    "warmup_epochs": (0, 1_000_000),
    "patience": (0, 1_000_000),
    "validate_every": (1, 1_000_000),
}
NUMBERS: dict[str, tuple[float, float]] = {
    "learning_rate": (0.0, 1e3),
    "weight_decay": (0.0, 1e3),
    "momentum": (0.0, 1.0),
    "gradient_clip": (0.0, 1e12),
    "width": (0.0, 64.0),
    "crop_scale": (0.0, 1.0),
    "light": (0.0, 1.0),
    "mix_alpha": (0.0, 100.0),
    "label_smoothing": (0.0, 1.0),
    "dropout": (0.0, 1.0),
    "average_decay": (0.0, 1.0),
    "average_from": (0.0, 1.0),
    "small_share": (0.0, 1.0),
}
ABOVE_ZERO = ("learning_rate", "width", "crop_scale", "mix_alpha")
BELOW_ONE = ("label_smoothing", "light", "dropout", "average_decay", "average_from", "small_share")
SWITCHES = ("quarter_turns", "recalibrate_bn")
CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "select": SELECTIONS,
    "on_bad_file": BAD_FILE_RULES,
    "augmentation": AUGMENTATIONS,
    "mix": MIXES,
    "averaging": AVERAGINGS,
}


# What changes nothing unless another option has one of these values.
_NEEDED: dict[str, tuple[str, tuple[str, ...]]] = {
    "crop_scale": ("augmentation", ("texture",)),
    "light": ("augmentation", ("texture",)),
    "quarter_turns": ("augmentation", ("texture",)),
    "mix_alpha": ("mix", MIXES[1:]),
    "momentum": ("optimizer", ("sgd",)),
    "average_decay": ("averaging", ("ema",)),
    "average_from": ("averaging", ("swa",)),
}


def refuse_idle(config: TrainConfig, given: Iterable[str]) -> None:
    """Refuse options that someone gave and that change nothing beside the others.

    Raises:
        ValueError: One does; the message names it and what it needs.
    """
    for name in given:
        needs, values = _NEEDED.get(name, ("", ()))
        if needs and getattr(config, needs) not in values:
            raise ValueError(
                f"{name}={getattr(config, name)!r} changes nothing without "
                f"{needs}={' or '.join(values)}"
            )
        if name == "small_share" and config.small_size is None:
            raise ValueError(f"small_share={config.small_share} changes nothing without small_size")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run learns. Plain types only, so that it can be stored.

    Attributes:
        data: Folder or zip of ``<class>/<picture>``.
        fractions: Shares of training, validation and test pictures, in sum 1
            (paper: 5/5/90 %).
        seed: Decides the first weights, the order of pictures and the augmentation.
        split_seed: Decides the split; None takes ``seed``.
        size: Height and width of the network's input in pixels.
        small_size: That of the training pictures in the first ``small_share`` of the epochs, a
            shorter training (progressive resizing); None trains on ``size`` from the start.
        small_share: See there.
        augmentation: Of the training pictures: ``published`` (see ``transforms.train_transform``),
            ``texture`` (``transforms.texture_transform``) or ``none``.
        crop_scale: Least share of a picture's area that a crop of ``texture`` keeps.
        light: How far ``texture`` changes brightness and contrast: factors from 1 - light to
            1 + light.
        quarter_turns: Whether ``texture`` turns pictures by multiples of 90 degrees; where the
            rolling direction tells classes apart, it should not.
        mix: ``none``, ``mixup`` or ``cutmix``: each training picture is blended with another one.
        mix_alpha: Parameter of the Beta distribution of the blend.
        on_bad_file: ``skip`` or ``fatal``.
        network: ``mobilesteelnet``, or one of ``networks.BASELINES``.
        attention, fusion, activation, width, bn_statistics, dropout: See ``MobileSteelNet``.
        init_from: Checkpoint whose weights the training starts from, or ``shipped``; None starts
            from scratch.
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
        validate_every: Validate (and perhaps keep) each so many epochs, and the last one; above 1
            only without ``patience``.
        averaging: Which weights are validated and kept: those of the step (``none``), their
            exponential moving average (``ema``), or from a point on their mean over the ends of
            epochs (``swa``).
        average_decay: Of the moving average, a step.
        average_from: Share of the epochs after which ``swa`` begins.
        recalibrate_bn: Before each validation the batch norms' buffers of the weights that are kept
            are computed anew over the unaugmented training pictures. ``swa`` always does so.
    """

    data: str
    fractions: tuple[float, float, float] = (0.05, 0.05, 0.90)
    seed: int = 42
    split_seed: int | None = None
    size: int = 224
    small_size: int | None = None
    small_share: float = 0.75
    augmentation: str = "published"
    crop_scale: float = 0.5
    light: float = 0.3
    quarter_turns: bool = True
    mix: str = "none"
    mix_alpha: float = 0.2
    on_bad_file: str = "skip"
    network: str = "mobilesteelnet"
    attention: str = "ciema"
    fusion: str = "msff"
    activation: str | None = None
    width: float = 1.0
    bn_statistics: str = "sequential"
    dropout: float = 0.0
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
    validate_every: int = 1
    averaging: str = "none"
    average_decay: float = 0.98
    average_from: float = 0.75
    recalibrate_bn: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "init_from"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "init_from" and value is None):
                raise ValueError(f"{name}={value!r}: must be a path as text")
        for name, (low, high) in WHOLE_NUMBERS.items():
            _check_whole(name, getattr(self, name), low, high)
        if self.split_seed is not None:
            _check_whole("split_seed", self.split_seed, *WHOLE_NUMBERS["seed"])
        if self.small_size is not None:
            _check_whole("small_size", self.small_size, 1, self.size)
        for name, (least, most) in NUMBERS.items():
            _check_number(name, getattr(self, name), least, most)
        for name in ABOVE_ZERO:
            if getattr(self, name) == 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be above 0")
        for name in BELOW_ONE:
            if getattr(self, name) == 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be below 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}"
                )
        for name in SWITCHES:
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be true or false")
        if self.validate_every > 1 and self.patience:
            raise ValueError(
                f"validate_every={self.validate_every}: patience={self.patience} counts validated "
                "epochs, so that each has to be"
            )
        before = self.epochs_before_swa
        if self.averaging == "swa" and 0 < self.patience <= before:
            raise ValueError(
                f"averaging='swa' begins at epoch {before + 1}, and patience={self.patience} may "
                "stop the training before: give patience=0"
            )
        _check_fractions(self.fractions)

    @property
    def seed_of_split(self) -> int:
        """What decides the split."""
        return self.seed if self.split_seed is None else self.split_seed

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

    def validates(self, epoch: int) -> bool:
        """Whether an epoch, counted from 1, ends with a validation."""
        return epoch % self.validate_every == 0 or epoch == self.epochs

    @property
    def epochs_before_swa(self) -> int:
        """How many epochs from the first ``averaging="swa"`` leaves out."""
        return int(self.average_from * self.epochs)

    @property
    def small_epochs(self) -> int:
        """How many epochs from the first train on pictures of ``small_size``."""
        return 0 if self.small_size is None else int(self.small_share * self.epochs)

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

    @property
    def device(self) -> str:
        """Where its results are judged: a name for ``predict.choose_device``."""
        return "cpu" if self.accelerator == "cpu" else "auto"

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
