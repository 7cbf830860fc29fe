"""Convolutions of the reference, forward and backward, in the dtype of `contract.product_dtype`."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.nn import grad as gradients

from ...contract import product_dtype


def library_layout(x: torch.Tensor) -> torch.Tensor:
    """Slabs (N, c, H, W) in the layout that the library convolves quickest at few channels.

    On a CPU that is channels_last: at c = 32, 56×56 a block's five products take half the time.
    """
    if x.device.type != "cpu" or torch._C._are_functorch_transforms_active():  # vmap knows it not
        return x
    return x.contiguous(memory_format=torch.channels_last)


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolution with zero padding that keeps H×W: x (N, I, H, W), weight (O, I, k, k), k odd."""
    dtype = product_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return F.conv2d(x.to(dtype), weight.to(dtype), bias, padding=weight.shape[-1] // 2)


def convolve_input_backward(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gradient of `convolve` for its input: a convolution with the mirrored, transposed weight."""
    return convolve(grad, weight.transpose(0, 1).flip(2, 3))


def convolve_weight_backward(grad: torch.Tensor, x: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Gradient of `convolve` for its weight, (O, I, k, k), summed in float32 or better."""
    if kernel_size == 1:
        return pointwise_weight_backward(grad, x)[:, :, None, None]
    dtype = product_dtype(x)
    shape = (grad.shape[1], x.shape[1], kernel_size, kernel_size)
    return gradients.conv2d_weight(x.to(dtype), shape, grad.to(dtype), padding=kernel_size // 2)


def pointwise_weight_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Σ over samples and pixels of grad·xᵀ, (O, I)."""
    dtype = product_dtype(x)
    per_sample = torch.bmm(grad.to(dtype).flatten(2), x.to(dtype).flatten(2).transpose(1, 2))
    return per_sample.sum(0)
