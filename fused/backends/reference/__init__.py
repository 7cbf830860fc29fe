"""The maths of spec.md in plain PyTorch: what everything is compared with, and runs everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from . import (
    channel_interaction,
    coordinate_attention,
    cross_spatial,
    cross_spatial_backward,
    gated_fusion,
    msff,
)

KERNELS: Mapping[str, Callable[..., object]] = {
    "channel_statistics": channel_interaction.channel_statistics,
    "channel_statistics_backward": channel_interaction.channel_statistics_backward,
    "msff": msff.forward,
    "msff_backward": msff.backward,
    "channel_interaction": channel_interaction.forward,
    "channel_interaction_backward": channel_interaction.backward,
    "coordinate_attention": coordinate_attention.forward,
    "coordinate_attention_backward": coordinate_attention.backward,
    "cross_spatial": cross_spatial.forward,
    "cross_spatial_backward": cross_spatial_backward.backward,
    "gated_fusion": gated_fusion.forward,
    "gated_fusion_backward": gated_fusion.backward,
}


def can_run(op: str, x: torch.Tensor) -> str | None:
    """The reference runs every op on every device and floating dtype."""
    return None
