"""The published form of CIEMA and MSFF: child modules called one group and branch at a time.

It defines the children, their names and their initialisation; `fused.modules` inherits them and
replaces the computation. It is what exotic children run through (hooks, parametrisations,
SyncBatchNorm, …), and what the benchmarks call `published`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...contract import (
    EPS,
    check_bn_statistics,
    check_count,
    check_dtype,
    check_groups,
    check_whole,
)

CHANNEL_INTERACTION_REDUCTION = 16
FUSION_REDUCTION = 4  # C → C//4 in multi_scale_fusion, fixed by the paper


class ChannelInteraction(nn.Module):
    """Channel interaction, spec.md 2.1: (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels: int, reduction: int, **factory: Any) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False, **factory),
            nn.ReLU(),
            nn.Linear(hidden, channels, bias=False, **factory),
        )
        self.channel_interaction = nn.Conv2d(channels, channels, 1, bias=False, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return e."""
        # Not amax, which shares the gradient among equal maxima: pooling gives it to the first.
        maximum = x.flatten(2).max(2).values
        a = (self.fc(x.mean((2, 3))) + self.fc(maximum)).sigmoid()[:, :, None, None]
        return a * x + (1 - a) * self.channel_interaction(x)


class CrossSpatialLearning(nn.Module):
    """The small network that all groups and both branches share, spec.md 2.3: X → y."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **factory)

        self.spatial_conv1 = conv(channels, channels, 1)
        self.spatial_conv3 = conv(channels, channels, 3)
        self.spatial_conv5 = conv(channels, channels, 5)
        self.spatial_attention = nn.Sequential(
            conv(3 * channels, 3 * channels, 1),
            nn.BatchNorm2d(3 * channels, EPS, **factory),
            nn.Sigmoid(),
        )
        self.ms_reduce = nn.Sequential(
            conv(3 * channels, channels, 1), nn.BatchNorm2d(channels, EPS, **factory)
        )
        self.channel_feat = conv(channels, channels, 1)
        self.alpha = nn.Parameter(torch.ones(1, **factory))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, c, H, W) → y (N, c, H, W)."""
        f = torch.cat([self.spatial_conv1(x), self.spatial_conv3(x), self.spatial_conv5(x)], 1)
        return self.ms_reduce(self.spatial_attention(f) * f) + self.alpha * self.channel_feat(x)


class PublishedCIEMA(nn.Module):
    """CIEMA in its published form: 2·groups calls of the cross-spatial network a forward.

    Args:
        channels: C, at least 4.
        factor: the number of groups G; must divide C.
        reduction: r of the channel-interaction MLP.
        bn_statistics: "sequential" as published, or "pooled" (spec.md 3).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an argument is out of range; the message names it and its value.
    """

    def __init__(
        self,
        channels: int,
        factor: int = 32,
        reduction: int = CHANNEL_INTERACTION_REDUCTION,
        bn_statistics: str = "sequential",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("channels", channels, FUSION_REDUCTION)
        check_whole("factor", factor)
        check_count("reduction", reduction)
        check_dtype("dtype", dtype)
        check_groups(type(self).__name__, channels, factor)
        check_bn_statistics(bn_statistics)
        self.channels, self.groups, self.reduction = channels, factor, reduction
        self.bn_statistics = bn_statistics
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width, hidden = channels // factor, channels // FUSION_REDUCTION
        self.channel_interaction = ChannelInteraction(channels, reduction, **factory)
        self.conv1x1 = nn.Conv2d(width, width, 1, **factory)
        self.conv3x3 = nn.Conv2d(width, width, 3, padding=1, **factory)
        self.gn = nn.GroupNorm(width, width, EPS, **factory)
        self.cross_spatial_learning = CrossSpatialLearning(width, **factory)
        self.multi_scale_fusion = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False, **factory),
            nn.BatchNorm2d(hidden, EPS, **factory),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False, **factory),
            nn.BatchNorm2d(channels, EPS, **factory),
        )
        self.final_fusion = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1, bias=False, **factory),
            nn.BatchNorm2d(channels, EPS, **factory),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        e = self.channel_interaction(x)
        w = self._spatial_gate(e)
        s = e * w.repeat_interleave(self.channels // self.groups, 1)
        phi = self.final_fusion(torch.cat([s, self.multi_scale_fusion(s)], 1))
        return phi * e + (1 - phi) * s

    def _spatial_gate(self, e: torch.Tensor) -> torch.Tensor:
        """e → w (B, G, H, W), spec.md 2.2 and 2.3."""
        batch, _, height, width = e.shape
        slabs = e.reshape(batch * self.groups, -1, height, width)
        pooled = torch.cat([slabs.mean(3, keepdim=True), slabs.mean(2, keepdim=True).mT], 2)
        gate_h, gate_w = self.conv1x1(pooled).sigmoid().split([height, width], 2)
        x1 = self.gn(slabs * gate_h * gate_w.mT)
        x2 = self.conv3x3(slabs)
        y1, y2 = self._learn(x1, x2, batch)
        weight1 = y1.mean((2, 3)).softmax(1)[:, :, None, None]
        weight2 = y2.mean((2, 3)).softmax(1)[:, :, None, None]
        w = ((weight1 * y2).sum(1) + (weight2 * y1).sum(1)).sigmoid()
        return w.reshape(batch, self.groups, height, width)

    def _learn(
        self, x1: torch.Tensor, x2: torch.Tensor, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y of both branches (B·G, c, H, W); the order of calls decides the running buffers."""
        if self.bn_statistics == "pooled":
            y1, y2 = self.cross_spatial_learning(torch.cat([x1, x2])).chunk(2)
            return y1, y2
        branches = [x.reshape(batch, self.groups, *x.shape[1:]) for x in (x1, x2)]
        results: list[list[torch.Tensor]] = [[], []]
        for group in range(self.groups):
            for branch, result in zip(branches, results, strict=True):
                result.append(self.cross_spatial_learning(branch[:, group]))
        y1, y2 = (torch.stack(result, 1).flatten(0, 1) for result in results)
        return y1, y2


class PublishedMSFF(nn.Module):
    """MSFF in its published form: resize, concatenate, convolve (spec.md 1).

    Args:
        stage_channels: C_i of each map.
        out_channels: C_out, the largest C_i by default.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        stage_channels: Sequence[int],
        out_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(stage_channels, str) or not isinstance(stage_channels, Sequence):
            raise TypeError(f"stage_channels={stage_channels!r}, expected a list of numbers")
        if len(stage_channels) == 0:
            raise ValueError("stage_channels=[], expected one number a map")
        for index, channels in enumerate(stage_channels):
            check_count(f"stage_channels[{index}]", channels)
        self.stage_channels: tuple[int, ...] | None = tuple(stage_channels)
        self.out_channels = max(stage_channels) if out_channels is None else out_channels
        check_count("out_channels", self.out_channels)
        check_dtype("dtype", dtype)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fusion_conv = nn.Sequential(
            nn.Conv2d(sum(stage_channels), self.out_channels, 1, bias=False, **factory),
            nn.BatchNorm2d(self.out_channels, EPS, **factory),
            nn.ReLU(),
        )

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps (B, C_i, H_i, W_i) → (B, C_out, max H_i, max W_i)."""
        size = (max(f.shape[2] for f in features), max(f.shape[3] for f in features))
        resized = [
            f
            if tuple(f.shape[2:]) == size
            else F.interpolate(f, size, mode="bilinear", align_corners=False)
            for f in features
        ]
        return self.fusion_conv(torch.cat(resized, 1))
