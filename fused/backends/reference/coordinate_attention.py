"""Coordinate attention (spec.md 2.2): directional gates, and the group norm's statistics."""

from __future__ import annotations

import torch

from ...contract import memory_format, statistics_dtype
from .blocks import assemble, blocks, grouped


def _pooled(e: torch.Tensor, groups: int) -> torch.Tensor:
    """Row means then column means of every channel, (B, G, c, H + W)."""
    dtype = statistics_dtype(e.dtype)
    return grouped(torch.cat([e.mean(3, dtype=dtype), e.mean(2, dtype=dtype)], 2), groups)


def forward(
    e: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """Return alpha_h (B, C, H), alpha_w (B, C, W), and mean and rstd (B, C) of u = e·αh·αw."""
    batch, channels, height, width = e.shape
    dtype = statistics_dtype(e.dtype)
    kernel = weight[:, :, 0, 0].to(dtype)
    logits = torch.einsum("oi,bgip->bgop", kernel, _pooled(e, groups))
    gates = (logits + bias.to(dtype)[:, None]).sigmoid().reshape(batch, channels, height + width)
    alpha_h, alpha_w = (part.contiguous() for part in gates.split([height, width], 2))

    size = channels // groups
    means, variances = [], []
    for block in blocks(e, groups, whole_batch=False):
        span = (block.samples, slice(block.groups.start * size, block.groups.stop * size))
        u = e[span].to(dtype) * alpha_h[span][..., None] * alpha_w[span][:, :, None, :]
        variance, mean = torch.var_mean(u, (2, 3), correction=0)
        means.append((block, mean))
        variances.append((block, variance))
    mean, rstd = assemble(means), (assemble(variances) + eps).rsqrt()
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
    """Gradients for e, K and b. The statistics' gradient is affine in u − mean."""
    batch, channels, height, width = e.shape
    dtype = statistics_dtype(e.dtype)
    values = e.to(dtype)
    rows, columns = alpha_h[..., None], alpha_w[:, :, None, :]
    slope = -grad_rstd * rstd.pow(3) / (height * width)
    # u − mean first: the slope of a tiny variance is so large that the other order cancels.
    centred = values * rows * columns - mean[:, :, None, None]
    grad_u = torch.addcmul(
        (grad_mean / (height * width))[:, :, None, None], centred, slope[:, :, None, None]
    )
    through = grad_u * values
    grad_h = grad_alpha_h + (through * columns).sum(3)
    grad_w = grad_alpha_w + (through * rows).sum(2)

    gates = torch.cat([alpha_h, alpha_w], 2)
    grad_logits = grouped(torch.cat([grad_h, grad_w], 2) * gates * (1 - gates), groups)
    kernel = weight[:, :, 0, 0].to(dtype)
    grad_kernel = torch.einsum("bgop,bgip->oi", grad_logits, _pooled(e, groups))
    grad_bias = grad_logits.sum((0, 1, 3))
    grad_pooled = torch.einsum("oi,bgop->bgip", kernel, grad_logits)
    grad_pooled = grad_pooled.reshape(batch, channels, height + width)
    grad_rows, grad_columns = grad_pooled.split([height, width], 2)

    grad_e = grad_u * rows * columns
    grad_e = grad_e + grad_rows[..., None] / width + grad_columns[:, :, None, :] / height
    return (
        grad_e.to(e.dtype).contiguous(memory_format=memory_format(e)),
        grad_kernel[:, :, None, None].to(weight.dtype),
        grad_bias.to(bias.dtype),
    )
