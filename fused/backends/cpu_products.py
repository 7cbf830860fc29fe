"""Stages built on the native products: their weights are packed a call, 4 MB for 1024 × 1024.

A frozen network packs once and calls the `_packed` ops itself (native.py has their schemas).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .native import kernel


def pack(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A weight (M, K) or (M, K, 1, 1) packed for products with maps of the dtype of `x`."""
    packed: torch.Tensor = kernel("pack_product_weight")(weight.float(), x.dtype == torch.bfloat16)
    return packed


def channel_interaction(
    x: torch.Tensor,
    squeeze_weight: torch.Tensor,
    excite_weight: torch.Tensor,
    interaction_weight: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return e (B, C, H, W), the gate a (B, C), and x's mean, maximum and argmax (B, C)."""
    results: tuple[torch.Tensor, ...] = kernel("channel_interaction_packed")(
        x, squeeze_weight.float(), excite_weight.float(), pack(interaction_weight, x)
    )
    return results


KERNELS: Mapping[str, Callable[..., object]] = {"channel_interaction": channel_interaction}
