"""The grouped stages on the CPU: arguments of the ops made ready for the native slab kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import native

_pack = native.kernel("cross_spatial_pack")
_packed = native.kernel("cross_spatial_packed")
_pack_gate = native.kernel("coordinate_attention_pack")
_gates_backward = native.kernel("coordinate_attention_backward")
_gates = native.kernel("coordinate_attention_packed")
_both = native.kernel("coordinate_cross_spatial_packed")
_train = native.kernel("cross_spatial_train")
_backward = native.kernel("cross_spatial_backward")

# Where the running statistics stand among the op's nineteen parameters, gn_weight … alpha.
_RUNNING = (10, 11, 15, 16)


def _floats(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float32).contiguous()


def pack_coordinate_attention(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """K and b as the native kernels want them; for this processor, not a format to store."""
    gate: torch.Tensor = _pack_gate(_floats(weight), _floats(bias))
    return gate


def coordinate_attention(
    e: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, ...]:
    """Arguments and results of the op `coordinate_attention`."""
    results: tuple[torch.Tensor, ...] = _gates(
        e, pack_coordinate_attention(weight, bias), groups, eps
    )
    return results


def coordinate_attention_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    """Arguments and results of the op `coordinate_attention_backward`."""
    e, (weight, bias, groups) = args[4], args[9:]
    grads, vectors = ([_floats(value) for value in args[i : i + 4]] for i in (0, 5))
    grad_e, grad_weight, grad_bias = _gates_backward(*grads, e, *vectors, _floats(weight), groups)
    return grad_e, grad_weight.reshape(weight.shape).to(weight.dtype), grad_bias.to(bias.dtype)


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


def both_stages(
    e: torch.Tensor, gate: torch.Tensor, eps: float, packed: torch.Tensor, groups: int
) -> torch.Tensor:
    """e → w in evaluation, both grouped stages in one pass over e.

    Args:
        e: the map (B, C, H, W).
        gate: from `pack_coordinate_attention`.
        eps: of the group norm.
        packed: from `pack_cross_spatial`.
        groups: G.
    """
    w: torch.Tensor = _both(e, gate, eps, packed, groups)
    return w


def _trained(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [p for i, p in enumerate(parameters) if i not in _RUNNING]


def cross_spatial(*args: Any) -> tuple[torch.Tensor, ...]:
    """Arguments and results of the op `cross_spatial`."""
    e, parameters = args[0], args[5:24]
    vectors = [_floats(vector) for vector in args[1:5]]
    groups, training, bn_statistics, *eps = args[24:]
    results: tuple[torch.Tensor, ...]
    if training:
        trained = [_floats(p) for p in _trained(parameters)]
        results = _train(e, *vectors, trained, groups, bn_statistics == "pooled", *eps)
        return results
    packed = pack_cross_spatial(parameters, eps[0], eps[1], (e.shape[2], e.shape[3]))
    results = _packed(e, *vectors, packed, groups)
    c = e.shape[1] // groups
    none = [torch.empty(0, n, dtype=torch.float32, device=e.device) for n in (3 * c, 3 * c, c, c)]
    return (*results, *none)


def cross_spatial_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    """Arguments and results of the op `cross_spatial_backward`."""
    grad_w, e, w, parameters = args[0], args[1], args[6], args[13:32]
    vectors, softmaxes, statistics = (
        [_floats(value) for value in args[i:j]] for i, j in ((2, 6), (7, 9), (9, 13))
    )
    groups, training, bn_statistics, *eps = args[32:]
    if not training:
        statistics = [_floats(parameters[i]) for i in _RUNNING]
    trained = _trained(parameters)
    *grads, flat = _backward(
        *(_floats(grad_w), e, *vectors, _floats(w), *softmaxes, *statistics),
        *([_floats(p) for p in trained], groups, not training),
        *(training and bn_statistics == "pooled", *eps),
    )
    shares = flat.split([p.numel() for p in trained])
    pairs = zip(shares, trained, strict=True)
    # Copies: results of an op must not share memory.
    return (*grads, *(share.reshape(p.shape).to(p.dtype, copy=True) for share, p in pairs))
