"""Coordinate attention (spec.md 2.2) on CUDA: one launch forward, two backward."""

from __future__ import annotations

import torch

from ...contract import memory_format
from ..maps import is_channels_last, readable
from .cross_spatial import Packing
from .launch import floats, geometry, launch
from .parameter_sums import sum_partials

# A block's tables of H + W positions, in floats; longer ones lie in scratch.
SHARED_TABLES = 18_000


def _sizes(e: torch.Tensor, groups: int) -> dict[str, int | float]:
    batch, channels, height, width = e.shape
    return {
        **{"slabs": batch * groups, "groups": groups, "group_channels": channels // groups},
        **{"height": height, "width": width},
        **geometry("e", e),
    }


def _tables(e: torch.Tensor, groups: int, count: int) -> torch.Tensor | None:
    """Scratch for `count` tables of every slab, if shared memory is too small for a slab's."""
    batch, channels, height, width = e.shape
    rows, length = channels // groups, height + width
    if is_channels_last(e):
        rows, length = length, rows
    size = count * rows * ((length + 11) // 8 * 8 - 4)
    if size <= SHARED_TABLES:
        return None
    return e.new_empty((batch * groups, size), dtype=torch.float32)


def forward(
    e: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    also: Packing | None = None,
) -> tuple[torch.Tensor, ...]:
    """As the reference's: alpha_h (B, C, H), alpha_w (…, W), mean and rstd (B, C); one launch.

    `also`: weights of cross-spatial learning that the same launch packs.
    """
    e = readable(e)
    batch, channels, height, width = e.shape
    alpha_h = e.new_empty((batch, channels, height), dtype=torch.float32)
    alpha_w = alpha_h.new_empty((batch, channels, width))
    mean, rstd = alpha_h.new_empty((batch, channels)), alpha_h.new_empty((batch, channels))
    launch(
        *("coordinate_attention", e.dtype),
        reads={
            **{"e": e, "weight": floats(weight), "bias": floats(bias)},
            **(also.reads if also is not None else {}),
        },
        writes={
            **{"alpha_h": alpha_h, "alpha_w": alpha_w, "mean": mean, "rstd": rstd},
            **(also.writes if also is not None else {}),
        },
        scratch={"tables": _tables(e, groups, 2)},
        numbers={
            **(also.numbers if also is not None else {}),
            **_sizes(e, groups),
            "eps": float(eps),
        },
    )
    return alpha_h, alpha_w, mean, rstd


def backward(
    grad_alpha_h: torch.Tensor,
    grad_alpha_w: torch.Tensor,
    grad_mean: torch.Tensor,
    grad_rstd: torch.Tensor,
    e: torch.Tensor,
    alpha_h: torch.Tensor,
    alpha_w: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
) -> tuple[torch.Tensor, ...]:
    """As the reference's: gradients for e, K and b; two launches."""
    wanted = memory_format(e)
    e = readable(e)
    layout = torch.channels_last if is_channels_last(e) else torch.contiguous_format
    grad_e = torch.empty_like(e, memory_format=layout)
    c = e.shape[1] // groups
    partials = e.new_empty((e.shape[0] * groups, c * c + c), dtype=torch.float32)
    upstream = {
        **{"grad_alpha_h": grad_alpha_h, "grad_alpha_w": grad_alpha_w},
        **{"grad_mean": grad_mean, "grad_rstd": grad_rstd},
    }
    saved = {
        **{"saved_alpha_h": alpha_h, "saved_alpha_w": alpha_w},
        **{"saved_mean": mean, "saved_rstd": rstd, "weight": weight},
    }
    launch(
        *("coordinate_attention_backward", e.dtype),
        reads={"e": e, **{name: floats(t) for name, t in (upstream | saved).items()}},
        writes={"grad_e": grad_e, "partials": partials},
        scratch={"tables": _tables(e, groups, 3)},
        numbers={**_sizes(e, groups), **geometry("grad", grad_e)},
    )
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = torch.empty_like(bias)
    sum_partials([(partials, 0, grad_weight), (partials, c * c, grad_bias)])
    return grad_e.contiguous(memory_format=wanted), grad_weight, grad_bias
