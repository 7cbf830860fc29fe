"""Coordinate attention and cross-spatial learning in evaluation, e → w, on CUDA.

Two launches: coordinate attention, whose launch packs the weights of cross-spatial learning too,
and then that.
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
    e = readable(e)
    work = cross_spatial.packing(e, groups, parameters, *norms)
    vectors = coordinate_attention.forward(e, conv1x1_weight, conv1x1_bias, groups, eps, work)
    return cross_spatial.learn(e, vectors, work.packed, groups)[0]
