"""Channel interaction (spec.md 2.1) on CUDA: statistics, gate, and the product between x and e.

Three launches, two where the statistics of x are known. The backward is the library's products
with the statistics' own kernel (`channel_statistics.py`).
"""

from __future__ import annotations

import torch

from ...contract import memory_format
from ..reference import channel_interaction as reference
from . import channel_statistics, product
from .launch import floats, geometry, launch

# Blocks that a small batch's gates are cut into; each computes the hidden units again.
_PIECES = 8


def _gate(
    mean: torch.Tensor,
    maximum: torch.Tensor,
    squeeze_weight: torch.Tensor,
    excite_weight: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """a (B, C) float32 from the statistics of a map of `dtype`."""
    weights = squeeze_weight.contiguous(), excite_weight.contiguous()
    if any(weight.dtype != dtype for weight in weights):
        weights = floats(weights[0]), floats(weights[1])
    gate = torch.empty_like(mean)
    batch, channels = mean.shape
    pieces = max(1, _PIECES // batch)
    launch(
        *("channel_interaction_gate", dtype),
        reads={
            **{"mean": mean, "maximum": maximum},
            **{"squeeze_weight": weights[0], "excite_weight": weights[1]},
        },
        writes={"gate": gate},
        numbers={
            **{"batch": batch, "channels": channels, "hidden": squeeze_weight.shape[0]},
            "piece": -(-channels // pieces),
            "weight_is_float": int(weights[0].dtype == torch.float32),
        },
    )
    return gate


def forward(
    x: torch.Tensor,
    squeeze_weight: torch.Tensor,
    excite_weight: torch.Tensor,
    interaction_weight: torch.Tensor,
    x_mean: torch.Tensor | None = None,
    x_maximum: torch.Tensor | None = None,
    x_argmax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return e (B, C, H, W), the gate a (B, C), and x's mean, maximum and argmax (B, C)."""
    e = torch.empty_like(x, memory_format=memory_format(x))
    x = product.in_layout_of(x, e)
    if x_mean is None or x_maximum is None or x_argmax is None:
        mean, maximum, argmax = channel_statistics.forward(x)
    else:  # an op's outputs may not be its inputs
        mean, maximum = floats(x_mean).clone(), floats(x_maximum).clone()
        argmax = x_argmax.contiguous().clone()
    gate = _gate(mean, maximum, squeeze_weight, excite_weight, x.dtype)
    batch, channels, height, width = x.shape
    shape = (batch, channels, height * width)
    weight = product.rows_of(interaction_weight)
    tile = product.choose_tile(x, *shape)
    launch(
        *("channel_interaction", x.dtype),
        reads={"x": x, "weight": weight, "gate": gate},
        writes={"e": e},
        numbers={
            **product.numbers(e, weight, shape, tile),
            **geometry("x", x),
            **geometry("e", e),
            "weight_stride": weight.stride(0),
        },
    )
    return e, gate, mean, maximum, argmax


def backward(
    grad_e: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    mean: torch.Tensor,
    maximum: torch.Tensor,
    argmax: torch.Tensor,
    squeeze_weight: torch.Tensor,
    excite_weight: torch.Tensor,
    interaction_weight: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients for x and the three weights."""
    return reference.backward(
        *(grad_e, x, gate, mean, maximum, argmax),
        *(squeeze_weight, excite_weight, interaction_weight),
        statistics_backward=channel_statistics.backward,
    )
