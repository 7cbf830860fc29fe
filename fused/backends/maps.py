"""How GPU kernels take maps (B, C, H, W): their pixels as one axis, and how products round them."""

from __future__ import annotations

import torch


def flat(x: torch.Tensor) -> torch.Tensor:
    """A map (B, C, H, W) whose H×W are one axis of a single stride: x itself, or a copy of it."""
    if x.shape[2] == 1 or x.shape[3] == 1 or x.stride(2) == x.shape[3] * x.stride(3):
        return x
    return x.contiguous()


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides in elements of a `flat` map along batch, channel and pixel h·W + w."""
    pixel = x.stride(2) if x.shape[3] == 1 else x.stride(3)
    return x.stride(0), x.stride(1), pixel


def readable(x: torch.Tensor) -> torch.Tensor:
    """A `flat` map in which pixels or channels are neighbours: x itself, or a copy of it.

    What the CUDA kernels take: "rows", pixel stride 1, or "channels_last", channel stride 1.
    """
    x = flat(x)
    _, channel, pixel = strides(x)
    neighbours = (
        *(pixel == 1, channel == 1),
        *(x.shape[1] == 1, x.shape[2] * x.shape[3] == 1),  # then the other stride is never used
    )
    return x if any(neighbours) else x.contiguous()


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a `readable` map has its channels as neighbours, not its pixels.

    Where both are, as in a map of one pixel, the longer axis counts.
    """
    _, channel, pixel = strides(x)
    pixels = x.shape[2] * x.shape[3]
    channels_run = channel == 1 or x.shape[1] == 1
    pixels_run = pixel == 1 or pixels == 1
    return channels_run and not (pixels_run and pixels >= x.shape[1])


def allows_tf32() -> bool:
    """Whether torch lets float32 products round their operands to tf32, by whichever switch.

    `allow_tf32` cannot be read once `fp32_precision` was set; that one follows the older switches.
    """
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"
