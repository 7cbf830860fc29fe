"""Channel statistics (first pass of spec.md 2.1) on CUDA, both directions: one launch each."""

from __future__ import annotations

import torch

from ...contract import memory_format
from ..maps import is_channels_last, readable, strides
from .launch import launch


def _sizes(x: torch.Tensor) -> dict[str, int | float]:
    batch, channels, height, width = x.shape
    stride_b, stride_c, stride_s = strides(x)
    return {
        **{"batch": batch, "channels": channels, "pixels": height * width},
        **{"stride_b": stride_b, "stride_c": stride_c, "stride_s": stride_s},
        "channels_last": int(is_channels_last(x)),
        "warps_per_plane": 0,
    }


def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, maximum float32 and the maximum's first position int64 of each channel, (B, C)."""
    x = readable(x)
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    maximum, argmax = torch.empty_like(mean), torch.empty_like(mean, dtype=torch.int64)
    writes = {"mean": mean, "maximum": maximum, "argmax": argmax}
    launch("channel_statistics", x.dtype, reads={"x": x}, writes=writes, numbers=_sizes(x))
    return mean, maximum, argmax


def backward(
    grad_mean: torch.Tensor, grad_maximum: torch.Tensor, argmax: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Gradient for x, in its memory format."""
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    reads = {
        "grad_mean": grad_mean.float().contiguous(),
        "grad_maximum": grad_maximum.float().contiguous(),
        "saved_argmax": argmax.contiguous(),
    }
    launch(
        *("channel_statistics_backward", x.dtype),
        reads=reads,
        writes={"grad_x": grad_x},
        numbers=_sizes(grad_x),
    )
    return grad_x
