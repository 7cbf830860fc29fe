"""The networks of the paper's table 4 by name: MobileSteelNet, and those it is compared with.

The others come from torchvision and timm, without pre-trained weights, with a head of the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .blocks import timm_module
from .model import MobileSteelNet, describe, parameter_count
from .shufflenet_v1 import ShuffleNetV1

MOBILESTEELNET = "mobilesteelnet"


@dataclass(frozen=True)
class Baseline:
    """One network to compare with.

    Attributes:
        name: As the paper writes it.
        source: The library and the name there.
        build: Number of classes → network.
    """

    name: str
    source: str
    build: Callable[[int], nn.Module]


def _torchvision(name: str, model: str) -> Baseline:
    def build(num_classes: int) -> nn.Module:
        try:
            from torchvision import models
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f'{name} needs torchvision: pip install "mobilesteelnet[train]"', name="torchvision"
            ) from None
        network: nn.Module = models.get_model(model, weights=None, num_classes=num_classes)
        return network

    return Baseline(name, f"torchvision {model}", build)


def _timm(name: str, model: str) -> Baseline:
    def build(num_classes: int) -> nn.Module:
        network: nn.Module = timm_module("").create_model(
            model, pretrained=False, num_classes=num_classes
        )
        return network

    return Baseline(name, f"timm {model}", build)


BASELINES: dict[str, Baseline] = {
    "resnet18": _torchvision("ResNet18", "resnet18"),
    "resnet34": _torchvision("ResNet34", "resnet34"),
    "resnet50": _torchvision("ResNet50", "resnet50"),
    "mobilenetv1": _timm("MobileNetV1 (Howard et al.)", "mobilenetv1_100"),
    "mobilenetv2": _torchvision("MobileNetV2", "mobilenet_v2"),
    "mobilenetv3": _torchvision("MobileNetV3-Large", "mobilenet_v3_large"),
    "shufflenetv1": Baseline("ShuffleNetV1 (3 groups)", "its paper", ShuffleNetV1),
    "shufflenetv2": _torchvision("ShuffleNetV2 1.0×", "shufflenet_v2_x1_0"),
    "mobileone_s0": _timm("MobileOne-S0", "mobileone_s0"),
    "edgenext_small": _timm("EdgeNeXt-S", "edgenext_small"),
    "repvit_m1": _timm("RepViT-M1", "repvit_m1"),
    "fastvit_sa12": _timm("FastViT-SA12", "fastvit_sa12"),
}


def check_network(name: str) -> None:
    """Raise ValueError if there is no such network."""
    known = (MOBILESTEELNET, *BASELINES)
    if name not in known:
        raise ValueError(f"network={name!r}: must be one of {', '.join(known)}")


class BaselineNetwork(nn.Module):
    """A network of :data:`BASELINES` with what training and checkpoints need to know of it.

    Args:
        network: Its name.
        num_classes: Size of the head.

    Raises:
        ValueError: There is no such network.
        ModuleNotFoundError: Its library is not installed.
    """

    def __init__(self, network: str, num_classes: int = 6) -> None:
        super().__init__()
        check_network(network)
        self.config: dict[str, Any] = {"network": network, "num_classes": num_classes}
        self.network = BASELINES[network].build(num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) → logits (B, num_classes)."""
        logits: torch.Tensor = self.network(images)
        return logits

    def spatial_gate(self, images: torch.Tensor) -> None:
        """None: only CIEMA has one."""


def build_network(config: dict[str, Any]) -> nn.Module:
    """The network that ``config``, a network's ``.config``, describes.

    Raises:
        ValueError: An option is out of range, or there is no such network.
        TypeError: An option is not known.
        ModuleNotFoundError: Its library is not installed.
    """
    options = dict(config)
    name = options.pop("network", MOBILESTEELNET)
    if name == MOBILESTEELNET:
        return MobileSteelNet.from_config(options)
    options.pop("backend", None)
    return BaselineNetwork(name, **options)


def describe_network(model: nn.Module, input_size: int) -> dict[str, Any]:
    """Parameters and FLOP of one image of ``input_size``² pixels; see ``model.describe``."""
    if isinstance(model, MobileSteelNet):
        return {"network": "MobileSteelNet", **describe(model, input_size)}
    config: Any = model.config
    twin = build_network(config).to("meta").eval()
    images = torch.empty(1, 3, input_size, input_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(images)
    flop = counter.get_total_flops()
    return {
        "network": BASELINES[config["network"]].name,
        "input_size": input_size,
        "parameters": parameter_count(model),
        "float32_bytes": sum(4 * t.numel() for t in model.state_dict().values()),
        "backbone_flop": flop,
        "other_flop": 0,
        "published_flop": flop,
        "flop": flop,
        "stages": [],
        "backends": "no fused blocks",
    }
