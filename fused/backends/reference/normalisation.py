"""Batch normalisation from explicit statistics, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def batch_statistics(z: torch.Tensor, dims: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance over `dims`, kept as dimensions of size one; two passes."""
    var, mean = torch.var_mean(z, tuple(dims), correction=0, keepdim=True)
    return mean, var


def affine(
    z: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """(z − mean) / sqrt(var + eps) · weight + bias; all statistics broadcast against z."""
    scale = weight * (var + eps).rsqrt()
    return torch.addcmul(bias - mean * scale, z, scale)


def normalised(z: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, eps: float) -> torch.Tensor:
    """(z − mean) / sqrt(var + eps)."""
    return (z - mean) * (var + eps).rsqrt()


def backward(
    grad: torch.Tensor,
    n: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dims: Sequence[int] | None,
) -> torch.Tensor:
    """Gradient for z of `affine`.

    Args:
        grad: gradient of the result.
        n: the normalised z.
        var: variance, broadcast against z.
        weight: scale, broadcast against z.
        eps: as in the forward.
        dims: over which the statistics were taken; None if they were constants (evaluation).
    """
    if dims is not None:
        dims = tuple(dims)
        grad = grad - grad.mean(dims, keepdim=True) - n * (grad * n).mean(dims, keepdim=True)
    return grad * (weight * (var + eps).rsqrt())
