"""Coordinate attention and cross-spatial learning in evaluation, e → w, on CUDA.

Two launches either way. Where a block a slab (one sample's group) fills the GPU: the weights are
packed, then a block does both stages. With fewer slabs: coordinate attention, whose launch packs
the weights too, then the form of `cross_spatial.py` that cuts slabs into bands.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..maps import readable
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
    parameters = {n: t for n, t in named.items() if isinstance(t, torch.Tensor)}
    norms = named["attention_eps"], named["reduce_eps"]
    if e.shape[0] * groups >= cross_spatial.slabs_that_fill(e):
        return cross_spatial.coordinate_cross_spatial(
            *(e, conv1x1_weight, conv1x1_bias, eps, parameters, groups, *norms)
        )
    e = readable(e)
    work = cross_spatial.packing(e, groups, parameters, *norms)
    vectors = coordinate_attention.forward(e, conv1x1_weight, conv1x1_bias, groups, eps, work)
    return cross_spatial.learn(e, vectors, work.packed, groups)[0]
