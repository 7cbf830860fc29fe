"""Mean, maximum and the maximum's position of each channel (spec.md 2.1), and their gradient.

    mean = Σ_p x / P     maximum = max_p x     argmax = the first p that holds it, P = H·W

Layouts: x (B, C, H, W) by strides, mean and maximum (B, C) float32, argmax (B, C) int64.
Forward: one program for a sample's `BLOCK_C` channels goes over all of their pixels, so x is read
once and nothing is merged between programs. Each lane keeps sum, maximum and position of its own
pixels in float32 and int32; the lanes meet once, at the end. A NaN is the maximum, the first one
wins, as in torch. For channel interaction the program also multiplies its statistics by its columns
of V1 (`SQUEEZE`): partials (B, tiles of channels, {mean, maximum}, hidden) float32, which the next
launch sums in the order of the tiles.
Backward: one program for a tile, writes grad_x once and reads only vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...contract import memory_format
from . import configs
from .device import offset
from .launch import cdiv, flat, is_wide, launch, strides


@triton.jit
def tile_offsets(channel, pixel, strides, WIDE: tl.constexpr):
    """Offsets of a tile (channels, pixels) into its sample of a map of `strides`."""
    along_channels = offset(channel, strides[1], WIDE)
    return along_channels[:, None] + offset(pixel, strides[2], WIDE)[None, :]


@triton.jit
def mean_and_first_maximum(total, best, position, pixels):
    """Join the lanes along axis 1: mean, maximum, and the first position that holds it."""
    nan = best != best
    any_nan = tl.max(nan.to(tl.int32), axis=1) > 0
    maximum = tl.max(tl.where(nan, -float("inf"), best), axis=1)
    holds = tl.where(any_nan[:, None], nan, best == maximum[:, None])
    first = tl.min(tl.where(holds, position, 0x7FFFFFFF), axis=1)
    return tl.sum(total, axis=1) / pixels, tl.where(any_nan, float("nan"), maximum), first


@triton.jit
def channel_statistics_forward_kernel(
    x,  # or None
    given,  # without x: its mean, maximum and argmax, (B, C) each
    squeeze_weight,  # (hidden, C), or None
    mean,
    maximum,
    argmax,
    partials,  # (B, tiles, 2, hidden), or None
    channels,
    pixels,
    hidden,
    x_strides,
    SQUEEZE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Statistics of `BLOCK_C` channels of one sample, and with `SQUEEZE` V1's share of them.

    Without x the statistics are known and copied.
    """
    tiles = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0) % tiles
    batch = tl.program_id(0) // tiles
    channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    row = batch.to(tl.int64) * channels + channel
    if x is not None:
        lane = tl.arange(0, BLOCK_P)
        x += batch.to(tl.int64) * x_strides[0]
        total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        best = tl.full((BLOCK_C, BLOCK_P), -float("inf"), tl.float32)
        position = tl.broadcast_to(lane[None, :], (BLOCK_C, BLOCK_P))  # of a lane of −inf only
        for start in tl.range(0, pixels, BLOCK_P, num_stages=4):
            pixel = start + lane
            mask = inside[:, None] & (pixel < pixels)[None, :]
            value = tl.load(x + tile_offsets(channel, pixel, x_strides, WIDE), mask=mask, other=0.0)
            value = value.to(tl.float32)
            total += value
            value = tl.where(mask, value, -float("inf"))
            better = (value > best) | ((value != value) & (best == best))
            best = tl.where(better, value, best)
            position = tl.where(better, pixel[None, :], position)
        average, largest, first = mean_and_first_maximum(total, best, position, pixels)
    else:
        average = tl.load(given[0] + row, mask=inside, other=0.0)
        largest = tl.load(given[1] + row, mask=inside, other=0.0)
        first = tl.load(given[2] + row, mask=inside, other=0)
    tl.store(mean + row, average, mask=inside)
    tl.store(maximum + row, largest, mask=inside)
    tl.store(argmax + row, first.to(tl.int64), mask=inside)
    if SQUEEZE:
        largest = tl.where(inside, largest, 0.0)
        partials += (batch.to(tl.int64) * tiles + tile) * 2 * hidden
        for start in range(0, hidden, BLOCK_HIDDEN):
            unit = start + tl.arange(0, BLOCK_HIDDEN)
            known = unit < hidden
            where = unit[:, None] * channels + channel[None, :]
            weight = tl.load(
                squeeze_weight + where, mask=known[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            tl.store(partials + unit, tl.sum(weight * average[None, :], axis=1), mask=known)
            tl.store(
                partials + hidden + unit, tl.sum(weight * largest[None, :], axis=1), mask=known
            )


@triton.jit
def channel_statistics_backward_kernel(
    grad_mean,
    grad_maximum,
    argmax,
    grad_x,
    channels,
    pixels,
    grad_strides,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """grad_x of `BLOCK_C` channels × `BLOCK_P` pixels of one sample."""
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0) % channel_tiles
    rest = tl.program_id(0) // channel_tiles
    pixel_tiles = tl.cdiv(pixels, BLOCK_P)
    batch = rest // pixel_tiles
    channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = rest % pixel_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = channel < channels
    row = batch.to(tl.int64) * channels + channel
    everywhere = tl.load(grad_mean + row, mask=inside, other=0.0) / pixels
    there = tl.load(grad_maximum + row, mask=inside, other=0.0)
    position = tl.load(argmax + row, mask=inside, other=-1).to(tl.int32)
    at_maximum = position[:, None] == pixel[None, :]
    grad = everywhere[:, None] + tl.where(at_maximum, there[:, None], 0.0)
    grad_x += batch.to(tl.int64) * grad_strides[0]
    tl.store(
        grad_x + tile_offsets(channel, pixel, grad_strides, WIDE),
        grad.to(grad_x.dtype.element_ty),
        mask=inside[:, None] & (pixel < pixels)[None, :],
    )


def launch_statistics(
    x: torch.Tensor,
    squeeze_weight: torch.Tensor | None = None,
    known: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch the forward kernel on a `flat` map.

    Args:
        x: (B, C, H, W).
        squeeze_weight: V1 (hidden, C), contiguous.
        known: mean, maximum and argmax, if they are; then x is not read.

    Returns:
        mean, maximum (B, C) float32, argmax (B, C) int64, and with V1 its products with the
        statistics of each tile of channels, (B, tiles, 2, hidden) float32, else None.
    """
    batch, channels, height, width = x.shape
    config = configs.choose("channel_statistics_forward_kernel", x, height * width)
    tiles = cdiv(channels, config.blocks["BLOCK_C"])
    mean = torch.empty((batch, channels), dtype=torch.float32, device=x.device)
    maximum = torch.empty_like(mean)
    argmax = torch.empty((batch, channels), dtype=torch.int64, device=x.device)
    hidden, partials = 0, None
    if squeeze_weight is not None:
        hidden = squeeze_weight.shape[0]
        partials = mean.new_empty((batch, tiles, 2, hidden))
    launch(
        channel_statistics_forward_kernel,
        (batch * tiles,),
        *(x if known is None else None, known, squeeze_weight, mean, maximum, argmax, partials),
        *(channels, height * width, hidden, strides(x)),
        config=config,
        scratch=("partials",),
        SQUEEZE=squeeze_weight is not None,
        WIDE=is_wide(x),
    )
    return mean, maximum, argmax, partials


def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, maximum and the maximum's first position h·W + w of each channel, (B, C) each."""
    mean, maximum, argmax, _ = launch_statistics(flat(x))
    return mean, maximum, argmax


def backward(
    grad_mean: torch.Tensor, grad_maximum: torch.Tensor, argmax: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Gradient for x: the mean's everywhere, the maximum's at its position."""
    batch, channels, height, width = x.shape
    pixels = height * width
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    config = configs.choose("channel_statistics_backward_kernel", x, pixels)
    tiles = cdiv(channels, config.blocks["BLOCK_C"]) * cdiv(pixels, config.blocks["BLOCK_P"])
    launch(
        channel_statistics_backward_kernel,
        (batch * tiles,),
        *(grad_mean.contiguous(), grad_maximum.contiguous(), argmax.contiguous(), grad_x),
        *(channels, pixels, strides(grad_x)),
        config=config,
        WIDE=is_wide(grad_x),
    )
    return grad_x
