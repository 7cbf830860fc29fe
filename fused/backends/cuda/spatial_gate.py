"""Coordinate attention and cross-spatial learning in evaluation, e → w, on CUDA.

Two launches, pack and forward, where a block a slab (one sample's group) fills the GPU; with fewer
slabs three, coordinate attention before the form of `cross_spatial.py` that cuts slabs into bands.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from . import coordinate_attention, cross_spatial

_NAMES = tuple(inspect.signature(cross_spatial.forward).parameters)[5:]


def forward(
    e: torch.Tensor,
    conv1x1_weight: torch.Tensor,
    conv1x1_bias: torch.Tensor,
    eps: float,
    *rest: Any,
) -> torch.Tensor:
    """w (B, G, H, W); `rest` as cross-spatial learning takes it after rstd."""
    named = dict(zip(_NAMES, rest, strict=True))
    groups: int = named["groups"]
    if e.shape[0] * groups >= cross_spatial.slabs_that_fill(e):
        parameters = {n: t for n, t in named.items() if isinstance(t, torch.Tensor)}
        return cross_spatial.coordinate_cross_spatial(
            *(e, conv1x1_weight, conv1x1_bias, eps, parameters, groups),
            *(named["attention_eps"], named["reduce_eps"]),
        )
    vectors: Any = coordinate_attention.forward(e, conv1x1_weight, conv1x1_bias, groups, eps)
    return cross_spatial.forward(e, *vectors, *rest)[0]
