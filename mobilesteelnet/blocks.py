"""The attention blocks that stand in CIEMA's place in the paper's tables 5 and 9.

SE, ECA, CBAM and coordinate attention come from timm, EMA is written from its paper's equations,
and the ablations of CIEMA leave out one of its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fused


class EMA(nn.Module):
    """Efficient multi-scale attention, (B, C, H, W) → (B, C, H, W).

    From the equations of Ouyang et al., *Efficient Multi-Scale Attention Module with Cross-Spatial
    Learning*, ICASSP 2023: on each group of c channels, with the same weights for all groups,
    coordinate attention and group norm give x1, a 3×3 convolution gives x2, and the gate is
    σ(softmax_c(mean x1)·x2 + softmax_c(mean x2)·x1), one value a pixel.

    Args:
        channels: C.
        groups: must divide C.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"EMA: groups={groups} must divide channels={channels}")
        self.groups = groups
        width = channels // groups
        self.conv1x1 = nn.Conv2d(width, width, 1)
        self.conv3x3 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x times its gate."""
        batch, _, height, width = x.shape
        slabs = x.reshape(batch * self.groups, -1, height, width)
        rows, columns = slabs.mean(3, keepdim=True), slabs.mean(2, keepdim=True).mT
        gates = self.conv1x1(torch.cat([rows, columns], 2)).sigmoid()
        gate_h, gate_w = gates.split([height, width], 2)
        x1 = self.norm(slabs * gate_h * gate_w.mT)
        x2 = self.conv3x3(slabs)
        weight1 = x1.mean((2, 3), keepdim=True).softmax(1)
        weight2 = x2.mean((2, 3), keepdim=True).softmax(1)
        gate = ((weight1 * x2).sum(1, keepdim=True) + (weight2 * x1).sum(1, keepdim=True)).sigmoid()
        return (slabs * gate).reshape(x.shape)


class _ReducedCIEMA(fused.FusedCIEMA):
    """CIEMA without one of its children."""

    missing: str

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        setattr(self, self.missing, None)

    def _goes_modular(self) -> bool:
        if super()._goes_modular():
            raise ValueError(f"{type(self).__name__} cannot run: {self.modular_reason()}")
        return False


class CIEMAWithoutChannelInteraction(_ReducedCIEMA):
    """Table 9: e = x, the rest of CIEMA as it is."""

    missing = "channel_interaction"
    fused_stages = ("coordinate_attention", "cross_spatial", "gated_fusion")

    def _interact(self, x: torch.Tensor, statistics: object = None) -> torch.Tensor:
        return x


class CIEMAWithoutCrossSpatial(_ReducedCIEMA):
    """Table 9: y = X, the cross-attention joins both branches without having learnt on them."""

    missing = "cross_spatial_learning"
    fused_stages = ("channel_interaction", "gated_fusion")

    def _cross(self, e: torch.Tensor, *, update: bool) -> torch.Tensor:
        return self._spatial_gate(e)

    def _learn(
        self, x1: torch.Tensor, x2: torch.Tensor, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x1, x2


CIEMA_FORMS: dict[str, type[fused.FusedCIEMA]] = {
    "ciema": fused.FusedCIEMA,
    "ciema-no-channel-interaction": CIEMAWithoutChannelInteraction,
    "ciema-no-cross-spatial": CIEMAWithoutCrossSpatial,
}


def _from_timm(module: str, name: str, **options: Any) -> Callable[[int, int], nn.Module]:
    def make(channels: int, groups: int) -> nn.Module:
        kind: Callable[..., nn.Module] = getattr(timm_module(f"layers.{module}"), name)
        return kind(channels, **options)

    return make


# ECA's kernel size follows from the channels, CBAM and SE reduce by 16, all as in their papers;
# coordinate attention reduces by 32, as in its paper.
OTHER_ATTENTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "se": _from_timm("squeeze_excite", "SEModule"),
    "eca": _from_timm("eca", "EcaModule"),
    "cbam": _from_timm("cbam", "CbamModule"),
    "ca": _from_timm("coord_attn", "CoordAttn", rd_ratio=1 / 32, se_factor=1.0),
    "ema": EMA,
}


def timm_module(name: str) -> Any:
    """`timm` (name "") or one of its modules.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    import importlib

    try:
        return importlib.import_module(f"timm.{name}" if name else "timm")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'this network needs timm: pip install "mobilesteelnet[reproduce]"', name="timm"
        ) from None
