"""The grouped stages on the CPU: arguments of the ops made ready for the native slab kernels.

In evaluation both forwards are native. Batch statistics in training and both backwards are the
reference's, which keeps the same tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import native
from .reference import cross_spatial as reference

_pack = native.kernel("cross_spatial_pack")
_packed = native.kernel("cross_spatial_packed")
_coordinate_attention = native.kernel("coordinate_attention")


def _floats(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float32).contiguous()


def coordinate_attention(
    e: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, ...]:
    """Arguments and results of the op `coordinate_attention`."""
    results: tuple[torch.Tensor, ...] = _coordinate_attention(
        e, _floats(weight), _floats(bias), groups, eps
    )
    return results


def pack_cross_spatial(
    parameters: Sequence[torch.Tensor],
    attention_eps: float,
    reduce_eps: float,
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """The op's nineteen parameters, in its order, as `cross_spatial_packed` wants them.

    Args:
        parameters: gn_weight … alpha, running statistics among them.
        attention_eps: of the batch norm over 3c channels.
        reduce_eps: of the batch norm over c channels.
        size: height and width of the maps to come; None for any.

    Returns:
        Float32 numbers for this processor's instruction set; not a format to store.
    """
    height, width = size or (-1, -1)
    values = [_floats(parameter) for parameter in parameters]
    packed: torch.Tensor = _pack(*values, attention_eps, reduce_eps, height, width)
    return packed


def cross_spatial(*args: Any) -> tuple[torch.Tensor, ...]:
    """Arguments and results of the op `cross_spatial`."""
    e, *vectors = args[:5]
    parameters = args[5:24]
    groups, training, _, attention_eps, reduce_eps = args[24:]
    if training:
        return reference.forward(*args)
    packed = pack_cross_spatial(parameters, attention_eps, reduce_eps, (e.shape[2], e.shape[3]))
    results = _packed(e, *(_floats(vector) for vector in vectors), packed, groups)
    c = e.shape[1] // groups
    none = [torch.empty(0, n, device=e.device) for n in (3 * c, 3 * c, c, c)]
    return (*results, *none)
