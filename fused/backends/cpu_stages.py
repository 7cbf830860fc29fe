"""The ops of the stages built on the native products, for evaluation and training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import cpu_products, cpu_training, native
from .reference.msff import nothing, unknown_statistics


def gated_fusion(e: torch.Tensor, w: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    """As the reference's `forward`."""
    *parameters, save = rest
    p = cpu_products.FusionParameters(*parameters)
    if p.training or save:
        return cpu_training.gated_fusion_forward(e, w, p, save)
    out = cpu_products.gated_fusion_folded(e, w, p)
    return out, *nothing(e, 2), *nothing(torch.empty(0, dtype=torch.float32), 6)


def gated_fusion_mean(e: torch.Tensor, w: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Means over H×W of evaluation's out, (B, C) float32; the map is never written (5.6)."""
    p = cpu_products.FusionParameters._make((*rest[:-3], False, *rest[-3:]))
    return cpu_products.gated_fusion_folded(e, w, p, mean_only=True)


def msff(
    features: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bn_weight: torch.Tensor,
    bn_bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    eps: float,
    statistics: bool = False,
) -> tuple[torch.Tensor, ...]:
    """As the reference's `forward`."""
    none = torch.empty(0, dtype=torch.float32)
    if training:
        out, *of_batch = cpu_training.msff_forward(features, weight, bn_weight, bn_bias, eps)
    else:
        norm = (bn_weight, bn_bias, running_mean, running_var, eps)
        out, of_batch = cpu_products.msff_folded(features, weight, *norm), list(nothing(none, 2))
    known = native.kernel("channel_statistics")(out) if statistics else unknown_statistics(none)
    return out, *of_batch, *known


KERNELS: Mapping[str, Callable[..., object]] = {
    "msff": msff,
    "msff_backward": cpu_training.msff_backward,
    "channel_interaction": cpu_products.channel_interaction,
    "channel_interaction_backward": cpu_training.channel_interaction_backward,
    "gated_fusion": gated_fusion,
    "gated_fusion_mean": gated_fusion_mean,
    "gated_fusion_backward": cpu_training.gated_fusion_backward,
}
