"""Named sets of training options: the published recipe, ours, and what ours was chosen from.

A recipe says only where it differs from the defaults of :class:`TrainConfig`, which are the
published protocol. Nothing in one belongs to a certain picture set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .train_config import TrainConfig

PUBLISHED, OURS = "published", "ours"

# A schedule that ends instead of a stop on a noisy loss, many small steps at a high rate, batch
# norms that belong to the weights, and a mild augmentation for textures: what cross-validation
# chose (`mobilesteelnet reproduce recipe`; RESULTS.md has its figures).
_OURS: dict[str, Any] = {
    "schedule": "cosine",
    "warmup_epochs": 5,
    "learning_rate": 3e-3,
    "epochs": 100,
    "batch_size": 16,
    "size": 128,
    "patience": 0,
    "select": "last",
    "validate_every": 10,
    "bn_statistics": "pooled",
    "recalibrate_bn": True,
    "activation": "relu",
    "augmentation": "texture",
    "crop_scale": 0.8,
    "light": 0.6,
    "quarter_turns": False,
    "label_smoothing": 0.1,
}

RECIPES: dict[str, dict[str, Any]] = {PUBLISHED: {}, OURS: _OURS}

SEARCH: dict[str, Any] = {"fusion": "none", "epochs": 80, "validate_every": 20}
"""What the candidates are judged on: a sixth of the network's work."""

_STRONG: dict[str, Any] = {"quarter_turns": True, "crop_scale": 0.5}
_LOWER: dict[str, Any] = {"learning_rate": 1e-3}
_CHANGES: dict[str, dict[str, Any]] = {
    "no-activation": {"activation": None},
    "relu-output": {"activation": "relu-output"},
    "strong-augmentation": _STRONG,
    "lower-rate-strong-augmentation": {**_STRONG, **_LOWER},
    "lower-rate-strong-augmentation-no-activation": {**_STRONG, **_LOWER, "activation": None},
    "lower-rate-published-augmentation": {**_STRONG, **_LOWER, "augmentation": "published"},
    "smaller-crops": {"crop_scale": 0.6},
    "less-light": {"light": 0.3},
    "sequential-statistics": {"bn_statistics": "sequential"},
    "no-recalibration": {"recalibrate_bn": False},
    "no-label-smoothing": {"label_smoothing": 0.0},
    "moving-average": {"averaging": "ema"},
    "stochastic-average": {"averaging": "swa"},
    "mixup": {"mix": "mixup"},
    "cutmix": {"mix": "cutmix", "mix_alpha": 1.0},
    "dropout": {"dropout": 0.2},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.05},
    "lower-rate": _LOWER,
    "higher-rate": {"learning_rate": 1e-2},
    "large-batches": {"batch_size": 32},
    "longer": {"epochs": 160},
    "size-96": {"size": 96},
    "size-160": {"size": 160},
    "size-224": {"size": 224},
    "small-pictures-first": {"size": 160, "small_size": 96},
}
# Each is our recipe with something changed, one thing in most, so that a difference has one cause.
CANDIDATES: dict[str, dict[str, Any]] = {
    PUBLISHED: {"size": _OURS["size"], "fusion": SEARCH["fusion"]},
    OURS: {**_OURS, **SEARCH},
    **{name: {**_OURS, **SEARCH, **change} for name, change in _CHANGES.items()},
}


def recipe_options(name: str) -> dict[str, Any]:
    """The options of a recipe that differ from the defaults.

    Raises:
        ValueError: There is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r}: must be one of {', '.join(RECIPES)}")
    return dict(RECIPES[name])


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Options given as ``name=value``, converted to the types that :class:`TrainConfig` has.

    Raises:
        ValueError: A text is not of that form, its option is unknown, or its value does not fit.
    """
    kinds = {item.name: str(item.type) for item in fields(TrainConfig)}
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"setting {text!r}: must be <option>=<value>, as label_smoothing=0.1")
        if name not in kinds:
            raise ValueError(f"setting {text!r}: there is no option {name!r}, see train --help")
        try:
            settings[name] = _convert(value.strip(), kinds[name])
        except ValueError:
            raise ValueError(f"setting {text!r}: {value!r} does not fit {name}") from None
    return settings


def _convert(value: str, kind: str) -> Any:
    if kind.endswith("| None") and value == "none":
        return None
    if kind.startswith("tuple"):
        return tuple(float(part) for part in value.split(","))
    if kind.startswith("bool"):
        if value not in ("true", "false"):
            raise ValueError(value)
        return value == "true"
    if kind.startswith("int"):
        return int(value)
    return float(value) if kind.startswith("float") else value
