"""Multi-scale feature fusion (spec.md 1), by identity 5.1: convolve at native size, then resize."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from ...contract import memory_format, product_dtype, statistics_dtype
from . import normalisation
from .channel_interaction import Statistics, channel_statistics
from .products import convolve, convolve_input_backward, convolve_weight_backward

_DIMS = (0, 2, 3)
# f (B, C_in, h, w) and W (C_out, C_in, 1, 1) → W ∗ f.
Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def target_size(features: Sequence[torch.Tensor]) -> tuple[int, int]:
    """The largest H and the largest W of the maps."""
    return max(f.shape[2] for f in features), max(f.shape[3] for f in features)


def _fused_product(
    features: Sequence[torch.Tensor], weight: torch.Tensor, multiply: Multiply = convolve
) -> torch.Tensor:
    """W ∗ cat(resized maps), (B, C_out, H, W), in float32 or better."""
    dtype = statistics_dtype(features[0].dtype)
    size = target_size(features)
    total: torch.Tensor | None = None
    for feature, part in zip(features, _split(features, weight), strict=True):
        z = multiply(feature, part).to(dtype)
        if z.shape[2:] != torch.Size(size):
            z = F.interpolate(z, size, mode="bilinear", align_corners=False)
        total = z if total is None else total + z
    assert total is not None  # the contract refuses an empty list
    return total


def _split(features: Sequence[torch.Tensor], weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.split([f.shape[1] for f in features], 1)


def _resize_matrix(size: int, target: int, like: torch.Tensor) -> torch.Tensor:
    """What bilinear resizing multiplies an axis with, (target, size)."""
    units = torch.eye(size, dtype=like.dtype, device=like.device)
    return F.interpolate(units[None], target, mode="linear", align_corners=False)[0].T


def resize_backward(grad: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Adjoint of bilinear resizing: (B, C, H, W) → (B, C, *size).

    Two products, since the library's own adds with atomics on a GPU: not the same bits in each
    call, and refused under `torch.use_deterministic_algorithms`.
    """
    if grad.shape[2:] == size:
        return grad
    (height, width), (target_height, target_width) = size, grad.shape[2:]
    narrow = grad @ _resize_matrix(width, target_width, grad)
    return _resize_matrix(height, target_height, grad).T @ narrow


def nothing(like: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Empty outputs, each of its own: outputs of an op may not share memory."""
    return tuple(like.new_empty(0) for _ in range(count))


def unknown_statistics(like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Channel statistics that nobody asked for: (0,) each."""
    return *nothing(like, 2), like.new_empty(0, dtype=torch.int64)


def _column(vector: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return vector.to(dtype)[None, :, None, None]


def forward(
    features: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bn_weight: torch.Tensor,
    bn_bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    eps: float,
    statistics: bool = False,
    *,
    statistics_of: Statistics = channel_statistics,
) -> tuple[torch.Tensor, ...]:
    """Return relu(BN(W ∗ cat)) (B, C_out, H, W), and statistics of the batch and of the channels.

    Of the batch: mean and biased variance, (C_out,) in training and (0,) in evaluation. Of out's
    channels, if asked for: mean, maximum, its first position, (B, C_out) each, else (0,).
    """
    dtype = statistics_dtype(features[0].dtype)
    z = _fused_product(features, weight)
    if training:
        mean, var = normalisation.batch_statistics(z, _DIMS)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = _column(running_mean, dtype), _column(running_var, dtype)
    y = normalisation.affine(z, mean, var, _column(bn_weight, dtype), _column(bn_bias, dtype), eps)
    out = y.relu().to(features[0].dtype).contiguous(memory_format=memory_format(features[0]))
    of_batch = (mean.flatten(), var.flatten()) if training else nothing(z, 2)
    return out, *of_batch, *(statistics_of(out) if statistics else unknown_statistics(z))


def backward(
    grad_out: torch.Tensor,
    features: Sequence[torch.Tensor],
    batch_mean: torch.Tensor,
    batch_var: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor,
    bn_bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    eps: float,
    *,
    multiply: Multiply = convolve,
    statistics_anew: bool = False,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for the maps, W, γ and β; z is made again from the small maps, by `multiply`.

    `statistics_anew`: of this z, because it is more exact than that of the forward.
    """
    dtype = statistics_dtype(features[0].dtype)
    z = _fused_product(features, weight, multiply)
    mean, var = (batch_mean, batch_var) if training else (running_mean, running_var)
    assert mean is not None
    assert var is not None
    mean, var = _column(mean, dtype), _column(var, dtype)
    if statistics_anew:
        mean, var = normalisation.batch_statistics(z, _DIMS)
    gamma = _column(bn_weight, dtype)
    n = normalisation.normalised(z, mean, var, eps)
    grad = grad_out.to(dtype) * (torch.addcmul(_column(bn_bias, dtype), n, gamma) > 0)
    grad_gamma, grad_beta = (grad * n).sum(_DIMS), grad.sum(_DIMS)
    grad_z = normalisation.backward(grad, n, var, gamma, eps, _DIMS if training else None)

    grad_features, grad_weights = [], []
    for feature, part in zip(features, _split(features, weight), strict=True):
        native = resize_backward(grad_z, feature.shape[2:]).to(product_dtype(feature))
        grad_weights.append(convolve_weight_backward(native, feature, 1))
        grad = convolve_input_backward(native, part).to(feature.dtype)
        grad_features.append(grad.contiguous(memory_format=memory_format(feature)))
    return (
        grad_features,
        torch.cat(grad_weights, 1).to(weight.dtype),
        grad_gamma.to(bn_weight.dtype),
        grad_beta.to(bn_bias.dtype),
    )
