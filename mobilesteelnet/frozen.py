"""The frozen network: `fused.optimize_for_inference(network)`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fused import FusedCIEMA, FusedMSFF
from fused.backends import requested
from fused.contract import statistics_dtype
from fused.folding import Product, fold
from fused.frozen import Frozen, FrozenCIEMA, guarded
from fused.fused_block import Part, own_call, parts_of, why_called
from fused.separable import Layer, separable, stem, why_not_native

from .model import MobileSteelNet


def freeze(network: MobileSteelNet, dtype: torch.dtype | None) -> nn.Module | str:
    """The frozen form of a private copy of a network, or why there is none."""
    if type(network) is not MobileSteelNet:
        return f"{type(network).__name__} is a subclass, whose own methods would be lost"
    reason = why_called(network, _parts(network.config, blocks=True))
    if reason is not None:
        return reason
    if network.attention is not None:
        return f"attention is a {type(network.attention).__name__}"
    for name, block in (("msff", network.msff), ("ciema", network.ciema)):
        if isinstance(block, (FusedMSFF, FusedCIEMA)):
            result = block.frozen_for_inference(dtype)
            if isinstance(result, str):
                return f"{name}: {result}"
            setattr(network, name, result)
    return FrozenMobileSteelNet.of(network, dtype)


def _parts(config: dict[str, Any], *, blocks: bool) -> tuple[Part, ...]:
    """What a network of this configuration holds, with or without MSFF and CIEMA."""
    with torch.device("meta"):
        template = MobileSteelNet.from_config(config)
    if not blocks:
        template.msff = template.ciema = None
    return parts_of(template)


class _Plan(NamedTuple):
    stem: Layer
    stages: list[list[Layer]]
    fc: Product


class FrozenMobileSteelNet(Frozen, MobileSteelNet):
    """MobileSteelNet, frozen: folded backbone, channels_last inside, no last map."""

    def _make_plan(self) -> _Plan:
        conv: Any = self.initial_conv[0]
        first = stem(fold(conv, self.initial_conv[1]), self.map_dtype, natively=self._natively())
        stages = [
            [self._separable(block) for block in stage]
            for stage in (self.stage1, self.stage2, self.stage3)
        ]
        dtype = statistics_dtype(self.map_dtype)
        return _Plan(first, stages, Product(self.fc.weight, self.fc.bias).to(dtype))

    def _why_not_followed(self) -> str | None:
        for name, block in (("msff", self.msff), ("ciema", self.ciema)):
            own = None if block is None else own_call(block)
            if own is not None:
                return f"{name} {own}"
        return why_called(self, _parts(self.config, blocks=False))

    def _requested(self) -> str | None:
        backend: str | None = self.config["backend"]
        return backend

    def _natively(self) -> bool:
        if requested(self._requested()) == "reference":
            return False
        return why_not_native(self.fc.weight.device, self.map_dtype) is None

    def _separable(self, block: Any) -> Layer:
        depthwise = Product(block.depthwise.weight.double(), None)
        if block.depthwise_bn is not None:
            depthwise = fold(block.depthwise, block.depthwise_bn)
        return separable(
            *(depthwise, fold(block.pointwise, block.bn), block.depthwise.stride[0]),
            *((block.depthwise_bn is not None, block.has_relu), self.map_dtype),
            natively=self._natively(),
        )

    @guarded
    def backbone(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of the three stages, in the maps' dtype."""
        self._check_images(images)
        plan = self._plan()
        x, maps = plan.stem(images), []
        for stage in plan.stages:
            for block in stage:
                x = block(x)
            maps.append(x)
        return maps

    @guarded
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, in_channels, H, W) → logits (B, num_classes), of the images' dtype."""
        fc = self._plan().fc
        if isinstance(self.ciema, FrozenCIEMA):
            # Nobody keeps MSFF's map: an eighth of the peak memory.
            means = self.ciema.mean_after(self.ciema.interact(self.features(images)))
        else:
            means = self.features(images).mean((2, 3), dtype=fc.weight.dtype)
        return F.linear(means, *fc).to(images.dtype)

    @guarded
    def spatial_gate(self, images: torch.Tensor) -> torch.Tensor | None:
        """The gate w (B, G, h, w) of CIEMA over the images; None without CIEMA."""
        gate = super().spatial_gate(images)
        return None if gate is None else gate.to(images.dtype)
