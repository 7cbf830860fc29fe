"""Channel interaction (spec.md 2.1), forward; its gradient is in `channel_interaction_backward.py`.

    a = σ(V2·(relu(V1·mean) + relu(V1·maximum)))     e = a ⊙ x + (1 − a) ⊙ (Wci ∗ x)

Layouts: x and e (B, C, H, W) by strides, vectors (B, C) float32, weights row-major.
Two launches:
1. `channel_statistics_forward_kernel` (there): one program for a sample's tile of channels; x is
   read, unless its statistics are known (MSFF can leave them).
2. `channel_interaction_forward_kernel`: one program for `BLOCK_M` output channels × `BLOCK_N`
   pixels of a sample. Tiles of channels are neighbours in the grid, so that the pixels of x which
   they share are read from memory once. Prologue: the gates of its own rows, from the partial
   products of launch 1 (summed in the order of the tiles, a few kB from the second-level cache;
   recomputed by every tile of pixels, written by the first). Loop: Wci ∗ x over input channels.
   Epilogue: x at its output channels, still in that cache, and e.
Bytes: x twice (once), e once. Accumulators: product, MLP and gate in float32; operands of the
product in the map's dtype. Nothing is kept but what the backward reads.
Looked at and left out: row and column sums of e, which coordinate attention reads e for, from this
epilogue. The column sums of a tile of few rows are half a map in float32, more bytes than the pass
over e, in that cache at least in part, which they would save.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...contract import memory_format
from . import configs
from .channel_statistics import launch_statistics, tile_offsets
from .device import offset
from .launch import cdiv, dot_precision, flat, is_wide, launch, strides


@triton.jit
def relu(value):
    """max(value, 0), and NaN where value is NaN."""
    return tl.where(value < 0, 0.0, value)


@triton.jit
def pointwise_product(
    weight, weight_strides, x, x_strides, gate, row, pixel, rows, channels, pixels,
    SPLIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W ∗ x for `BLOCK_M` output channels × `BLOCK_N` pixels of one sample, in float32.

    Args:
        weight: (rows, channels), any dtype; it is rounded to that of x.
        weight_strides: along rows and channels.
        x: the sample's map.
        x_strides: along batch, channel and pixel.
        gate: the sample's a (channels,), then column k of W is multiplied by 1 − a[k]; or None.
        row: (BLOCK_M,) output channels.
        pixel: (BLOCK_N,) pixels.
        rows: number of output channels.
        channels: number of input channels.
        pixels: number of pixels.
        SPLIT: what the rounding takes from a wider weight is multiplied too.
        WIDE: offsets need 64 bits.
        PRECISION: of the product, as `tl.dot` calls it.
        BLOCK_M: length of `row`.
        BLOCK_N: length of `pixel`.
        BLOCK_K: input channels a step.
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    weight += offset(row, weight_strides[0], WIDE)[:, None]
    for start in range(0, channels, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        known = channel < channels
        w = tl.load(
            weight + offset(channel, weight_strides[1], WIDE)[None, :],
            mask=(row < rows)[:, None] & known[None, :],
            other=0.0,
        )
        if gate is not None:
            complement = 1.0 - tl.load(gate + channel, mask=known, other=0.0)
            w = w.to(tl.float32) * complement[None, :]
        value = tl.load(
            x + tile_offsets(channel, pixel, x_strides, WIDE),
            mask=known[:, None] & (pixel < pixels)[None, :],
            other=0.0,
        )
        rounded = w.to(value.dtype)
        total = tl.dot(rounded, value, total, input_precision=PRECISION)
        if SPLIT and w.dtype != value.dtype:
            rest = (w - rounded.to(w.dtype)).to(value.dtype)
            total = tl.dot(rest, value, total, input_precision=PRECISION)
    return total


@triton.jit
def _gate(
    partials,
    excite_weight,
    row,
    rows,
    hidden,
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """The gates (BLOCK_M,) of the channels `row` from one sample's partials (tiles, 2, hidden)."""
    logit = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, hidden, BLOCK_HIDDEN):
        unit = start + tl.arange(0, BLOCK_HIDDEN)
        known = unit < hidden
        from_mean = tl.zeros((BLOCK_HIDDEN,), tl.float32)
        from_maximum = tl.zeros((BLOCK_HIDDEN,), tl.float32)
        for first in range(0, tiles, BLOCK_TILES):
            tile = first + tl.arange(0, BLOCK_TILES)
            mask = (tile < tiles)[:, None] & known[None, :]
            part = partials + tile[:, None] * 2 * hidden + unit[None, :]
            from_mean += tl.sum(tl.load(part, mask=mask, other=0.0), axis=0)
            from_maximum += tl.sum(tl.load(part + hidden, mask=mask, other=0.0), axis=0)
        activation = relu(from_mean) + relu(from_maximum)
        weight = tl.load(
            excite_weight + row[:, None] * hidden + unit[None, :],
            mask=(row < rows)[:, None] & known[None, :],
            other=0.0,
        ).to(tl.float32)
        logit += tl.sum(weight * activation[None, :], axis=1)
    return tl.sigmoid(logit)


@triton.jit
def channel_interaction_forward_kernel(
    x,
    interaction_weight,  # (C, C)
    excite_weight,  # (C, hidden)
    partials,  # (B, tiles, 2, hidden)
    e,
    gate,
    channels,
    pixels,
    hidden,
    tiles,
    x_strides,
    e_strides,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """e of `BLOCK_M` channels × `BLOCK_N` pixels of one sample, and a from the first pixels."""
    row_tiles = tl.cdiv(channels, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    rest = tl.program_id(0) // row_tiles
    pixel_tiles = tl.cdiv(pixels, BLOCK_N)
    pixel_tile = rest % pixel_tiles
    batch = (rest // pixel_tiles).to(tl.int64)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = pixel_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x += batch * x_strides[0]
    e += batch * e_strides[0]
    partials += batch * tiles * 2 * hidden

    product = pointwise_product(
        *(interaction_weight, (channels, 1), x, x_strides, None),
        *(row, pixel, channels, channels, pixels, False, WIDE, PRECISION),
        *(BLOCK_M, BLOCK_N, BLOCK_K),
    )
    a = _gate(
        *(partials, excite_weight, row, channels, hidden, tiles),
        *(BLOCK_M, BLOCK_HIDDEN, BLOCK_TILES),
    )
    if pixel_tile == 0:
        tl.store(gate + batch * channels + row, a, mask=row < channels)
    mask = (row < channels)[:, None] & (pixel < pixels)[None, :]
    own = tile_offsets(row, pixel, x_strides, WIDE)
    value = tl.load(x + own, mask=mask, other=0.0).to(tl.float32)
    value = a[:, None] * value + (1.0 - a)[:, None] * product
    tl.store(e + tile_offsets(row, pixel, e_strides, WIDE), value.to(e.dtype.element_ty), mask=mask)


def forward(
    x: torch.Tensor,
    squeeze_weight: torch.Tensor,
    excite_weight: torch.Tensor,
    interaction_weight: torch.Tensor,
    x_mean: torch.Tensor | None = None,
    x_maximum: torch.Tensor | None = None,
    x_argmax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return e (B, C, H, W), the gate a (B, C), and x's mean, maximum and argmax (B, C).

    Where these three are given, launch 1 only multiplies and copies them.
    """
    batch, channels, height, width = x.shape
    pixels = height * width
    e = torch.empty_like(x, memory_format=memory_format(x))
    x = flat(x)
    known = None
    if x_mean is not None and x_maximum is not None and x_argmax is not None:
        known = (x_mean.contiguous(), x_maximum.contiguous(), x_argmax.contiguous())
    mean, maximum, argmax, partials = launch_statistics(x, squeeze_weight.contiguous(), known)
    assert partials is not None
    gate = torch.empty_like(mean)
    config = configs.choose("channel_interaction_forward_kernel", x, pixels)
    tiles = cdiv(channels, config.blocks["BLOCK_M"]) * cdiv(pixels, config.blocks["BLOCK_N"])
    launch(
        channel_interaction_forward_kernel,
        (batch * tiles,),
        *(x, interaction_weight.contiguous(), excite_weight.contiguous(), partials, e, gate),
        *(channels, pixels, squeeze_weight.shape[0], partials.shape[1]),
        strides(x),
        strides(e),
        config=config,
        scratch=("partials",),
        WIDE=is_wide(x, e),
        PRECISION=dot_precision(x),
    )
    return e, gate, mean, maximum, argmax
