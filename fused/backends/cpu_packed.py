"""CIEMA and MSFF of a frozen network on the CPU: weights folded and packed once, not a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import folding
from . import cpu_products, cpu_slabs
from .native import kernel

_CROSS_SPATIAL = (
    *("gn.weight", "gn.bias", "conv3x3.weight", "conv3x3.bias"),
    *(f"cross_spatial_learning.spatial_conv{k}.weight" for k in (1, 3, 5)),
    "cross_spatial_learning.spatial_attention.0.weight",
    *(
        f"cross_spatial_learning.spatial_attention.1.{name}"
        for name in ("weight", "bias", "running_mean", "running_var")
    ),
    "cross_spatial_learning.ms_reduce.0.weight",
    *(
        f"cross_spatial_learning.ms_reduce.1.{name}"
        for name in ("weight", "bias", "running_mean", "running_var")
    ),
    *("cross_spatial_learning.channel_feat.weight", "cross_spatial_learning.alpha"),
)


class PackedCIEMA:
    """The stages of a CIEMA block, for maps of one dtype."""

    def __init__(self, block: Any, probe: torch.Tensor) -> None:
        """From a block with plain children; `probe` has the dtype of the maps to come."""
        state = block.state_dict()
        first = block.channel_interaction
        self.interaction = (
            *(first.fc[0].weight.float(), first.fc[2].weight.float()),
            cpu_products.pack(first.channel_interaction.weight, probe, kept=True),
        )
        weights = (block.conv1x1.weight, block.conv1x1.bias)
        self.coordinate = cpu_slabs.pack_coordinate_attention(*weights)
        net = block.cross_spatial_learning
        self.cross = cpu_slabs.pack_cross_spatial(
            [state[name] for name in _CROSS_SPATIAL],
            net.spatial_attention[1].eps,
            net.ms_reduce[1].eps,
        )
        self.groups, self.eps = block.groups, block.gn.eps
        self.fusion = self._fusion(folding.fold_fusion(block), probe)

    def _fusion(self, fusion: folding.Fusion, probe: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The op's arguments between w and mean_only; scales are in the weights already."""
        squeeze, bias = fusion.squeeze
        assert bias is not None
        weights = (squeeze, fusion.of_s, fusion.of_r)
        packed = [cpu_products.pack(weight, probe, kept=True) for weight in weights]
        return (
            *(packed[0], torch.ones_like(bias).float(), bias.float()),
            *packed[1:],
            *(torch.ones_like(fusion.bias).float(), fusion.bias.float()),
        )

    def interact(self, x: torch.Tensor) -> torch.Tensor:
        """x → e."""
        e: torch.Tensor = kernel("channel_interaction_packed")(x, *self.interaction)[0]
        return e

    def gate(self, e: torch.Tensor) -> torch.Tensor:
        """e → w (B, G, H, W)."""
        return cpu_slabs.both_stages(e, self.coordinate, self.eps, self.cross, self.groups)

    def fuse(self, e: torch.Tensor, w: torch.Tensor, *, mean_only: bool) -> torch.Tensor:
        """e, w → out, or only its mean over H×W, float32 (B, C)."""
        out: torch.Tensor = kernel("gated_fusion_packed")(e, w, *self.fusion, mean_only)
        return out


class PackedMSFF:
    """MSFF, for maps of one dtype and whatever channel counts they come with."""

    def __init__(self, block: Any, probe: torch.Tensor) -> None:
        """From a block with plain children; `probe` has the dtype of the maps to come."""
        conv, norm, _ = block.fusion_conv
        scale, shift = folding.Affine.of(norm)
        self.affine = (scale.float(), shift.float())
        self.weight, self.probe = conv.weight, probe
        known = block.stage_channels
        self.packed = None if known is None else self._pack(known)

    def _pack(self, channels: Sequence[int]) -> list[torch.Tensor]:
        parts = self.weight.split(channels, 1)
        return [cpu_products.pack(part, self.probe, kept=True) for part in parts]

    def __call__(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps (B, C_i, H_i, W_i) → (B, C_out, max H_i, max W_i), in the first map's format."""
        packed = self.packed or self._pack([f.shape[1] for f in features])
        out: torch.Tensor = kernel("msff_packed")(list(features), packed, *self.affine)
        return out
