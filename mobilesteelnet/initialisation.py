"""The network of a run before its first step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from .checkpoint import Checkpoint, CheckpointError, load_checkpoint
from .networks import MOBILESTEELNET, build_network, check_network
from .shipped import is_shipped, load_shipped
from .train_config import TrainConfig

MOBILESTEELNET_OPTIONS = (
    *("attention", "fusion", "activation", "bn_statistics", "width", "dropout"),
)
"""The options of a training that only this network has."""


def first_weights(config: TrainConfig) -> Checkpoint | None:
    """What ``init_from`` names; None where a training starts from scratch.

    Raises:
        CheckpointError: ``init_from`` is no checkpoint.
    """
    if config.init_from is None:
        return None
    return load_shipped() if is_shipped(config.init_from) else load_checkpoint(config.init_from)


def build_model(
    config: TrainConfig,
    classes: list[str],
    backend: str | None = None,
    source: Checkpoint | None = None,
) -> nn.Module:
    """The network of a run before its first step: seeded, or with the weights of ``init_from``.

    Args:
        config: says the network, the seed and ``init_from``.
        classes: of the pictures; others than the first weights' get a new head.
        backend: of the fused stages.
        source: what `first_weights` gave, if it was called already.

    Raises:
        ValueError: The network does not take the options.
        CheckpointError: ``init_from`` is no checkpoint, or one of another network.
    """
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    options = {name: getattr(config, name) for name in MOBILESTEELNET_OPTIONS}
    if config.network != MOBILESTEELNET:
        check_network(config.network)
        given = [name for name, value in options.items() if value != getattr(TrainConfig, name)]
        if given:
            raise ValueError(f"network={config.network!r} does not take the option {given[0]}")
        options = {"network": config.network}
    model = build_network({"num_classes": len(classes), **options, "backend": backend})
    source = source or first_weights(config)
    if source is None:
        return model
    weights = source.model.state_dict()
    own = model.state_dict()
    # Another set of classes gets a new head; everything else has to fit.
    if source.classes != classes:
        head = _head_keys(model)
        weights = {key: value for key, value in weights.items() if key not in head}
        weights |= {key: own[key] for key in head}
    unlike = [key for key in own if key not in weights or weights[key].shape != own[key].shape]
    unlike += [key for key in weights if key not in own]
    if unlike:
        raise CheckpointError(
            f"init_from={config.init_from!r} has another network than the options ask for "
            f"({unlike[0]!r} differs): give the same network, attention, fusion, activation and "
            "width" + ", which --recipe ours does" * is_shipped(str(config.init_from))
        )
    model.load_state_dict(weights)
    return model


def _head_keys(model: nn.Module) -> set[str]:
    """The weights whose shape follows the number of classes."""
    config: Any = model.config
    with torch.device("meta"):
        other = build_network({**config, "num_classes": config["num_classes"] + 1}).state_dict()
    return {key for key, value in model.state_dict().items() if value.shape != other[key].shape}
