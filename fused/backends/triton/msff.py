"""Multi-scale feature fusion (spec.md 1 and 5.1), forward; `msff_backward.py` has its gradient.

    z = Σ_i resize(W_i ∗ f_i)     out = relu((z − mean) / sqrt(var + eps) · γ + β)

resize is bilinear to the largest H and W (align_corners=False); every product is taken at its map's
own size. The first map that has the target size needs no resize and is multiplied where z is made.
Layouts: maps (B, C, H, W) by strides, W row-major. Launches, for n maps:
1. `msff_product_kernel` for each of the other maps: W_i ∗ f_i as (B, h·w, C_out) float32, so that
   the four neighbours of a pixel are read in runs of channels. Tile and grid as in launch 2.
2. `msff_forward_kernel`: one program for `BLOCK_M` output channels × `BLOCK_N` pixels of a sample,
   tiles of channels being neighbours. Product of the map of target size (if there is one) plus the
   other products resized, then batch norm and ReLU. The position of a neighbour is a quotient of
   integers, so it is exact.
3. Where the channel statistics of out are wanted, launch 2 leaves each tile's and
   `msff_statistics.py` joins them; channel interaction then spares its first pass over the map.
In training launch 2 is made twice. First it leaves the moments of its tile of z, float32: (parts,
{mean, M2}, C_out), parts = B·tiles of pixels; one program of `msff_moments_kernel` for a tile of
channels merges them in order (Chan); then it makes out. To multiply the map of target size again,
128 of 1664 channels in the network, costs less than to write z and read it, and z, whose sign
decides on gradients, is never rounded. For the same reason float32 weights of half-precision maps
keep their precision here: they are multiplied as a sum of two half-precision parts.
Bytes: every map once, the small products in float32 twice (their reads come from the second-level
cache), out once; the map of target size and the products once more in training. Products, resize
and statistics are float32; operands of the products have the maps' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...contract import memory_format
from ..reference.msff import unknown_statistics
from . import configs
from .channel_interaction import pointwise_product, relu
from .channel_statistics import mean_and_first_maximum, tile_offsets
from .device import merge_moments, offset
from .launch import cdiv, dot_precision, flat, is_wide, launch, strides
from .msff_statistics import empty_parts, join_parts

# ------------------------------------------------------------------------------------------ tiles


@triton.jit
def bilinear(position, size, target, WIDE: tl.constexpr):
    """The two neighbours along an axis of `size` for positions of an axis of `target`.

    Returns:
        The first neighbour, the second, and the second's weight.
    """
    if WIDE:
        position = tl.cast(position, tl.int64)
    numerator = tl.maximum((2 * position + 1) * size - target, 0)
    first = numerator // (2 * target)
    weight = (numerator - first * 2 * target).to(tl.float32) / (2 * target)
    first = first.to(tl.int32)
    return first, tl.minimum(first + 1, size - 1), weight


@triton.jit
def fused_product(
    x, x_strides, channels, weight, weight_strides, products, sizes, batch, row, pixel, rows,
    pixels, width,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z for `BLOCK_M` output channels × `BLOCK_N` pixels of one sample, in float32.

    Args:
        x: the map of target size, or None.
        x_strides: along batch, channel and pixel.
        channels: of x.
        weight: its columns of W.
        weight_strides: along rows and channels.
        products: tuple of (B, h·w, C_out) float32, the other maps' products.
        sizes: tuple of their (h, w).
        batch: the sample, int64.
        row: (BLOCK_M,) output channels.
        pixel: (BLOCK_N,) pixels.
        rows: C_out.
        pixels: H·W.
        width: W.
        WIDE: offsets need 64 bits, or positions while they are resized.
        PRECISION: of the product, as `tl.dot` calls it.
        BLOCK_M: length of `row`.
        BLOCK_N: length of `pixel`.
        BLOCK_K: input channels a step.
    """
    if x is not None:
        total = pointwise_product(
            *(weight, weight_strides, x + batch * x_strides[0], x_strides, None, row, pixel),
            *(rows, channels, pixels, True, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K),
        )
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mask = (row < rows)[:, None] & (pixel < pixels)[None, :]
    resized = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.static_range(len(sizes)):
        h, w = sizes[k]
        product = products[k] + batch * (h * w) * rows
        y0, y1, down = bilinear(pixel // width, h, pixels // width, WIDE)
        x0, x1, right = bilinear(pixel % width, w, width, WIDE)
        for corner in tl.static_range(4):
            line = y0 if corner < 2 else y1
            column = x0 if corner % 2 == 0 else x1
            share = 1.0 - down if corner < 2 else down
            share *= 1.0 - right if corner % 2 == 0 else right
            where = offset(line * w + column, rows, WIDE)[None, :] + row[:, None]
            resized += tl.load(product + where, mask=mask, other=0.0) * share[None, :]
    total += resized
    return total


@triton.jit
def place(rows, pixels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's output channels and pixels, the part that its pixels are, and its sample."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    pixel_tiles = tl.cdiv(pixels, BLOCK_N)
    part = tl.program_id(0) // row_tiles
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = part % pixel_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, pixel, part, (part // pixel_tiles).to(tl.int64)


@triton.jit
def load_row(vector, row, inside):
    """Values of a vector in float32, 0 outside."""
    return tl.load(vector + row, mask=inside, other=0.0).to(tl.float32)


# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def msff_product_kernel(
    x, weight, out, rows, channels, pixels, x_strides, weight_strides, out_strides,
    SPLIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """weight ∗ x for `BLOCK_M` output channels × `BLOCK_N` pixels of one sample."""
    row, pixel, _, batch = place(rows, pixels, BLOCK_M, BLOCK_N)
    total = pointwise_product(
        *(weight, weight_strides, x + batch * x_strides[0], x_strides, None, row, pixel),
        *(rows, channels, pixels, SPLIT, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K),
    )
    out += batch * out_strides[0] + tile_offsets(row, pixel, out_strides, WIDE)
    mask = (row < rows)[:, None] & (pixel < pixels)[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def msff_forward_kernel(
    x, weight, products, sizes, bn_weight, bn_bias, mean, var, out, moments, extremes, positions,
    rows, channels, pixels, width, eps, x_strides, weight_strides, out_strides,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out of `BLOCK_M` channels × `BLOCK_N` pixels of one sample; without out, z's moments.

    With extremes (parts, {mean's share, maximum}, C_out) and positions (parts, C_out) the tile's
    part of out's channel statistics goes there.
    """
    row, pixel, part, batch = place(rows, pixels, BLOCK_M, BLOCK_N)
    z = fused_product(
        *(x, x_strides, channels, weight, weight_strides, products, sizes, batch, row, pixel),
        *(rows, pixels, width, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K),
    )
    inside, known = row < rows, pixel < pixels
    if out is None:
        average = tl.sum(z, axis=1) / tl.sum(known.to(tl.float32), axis=0)
        deviation = tl.where(known[None, :], z - average[:, None], 0.0)
        moments += part.to(tl.int64) * 2 * rows + row
        tl.store(moments, average, mask=inside)
        tl.store(moments + rows, tl.sum(deviation * deviation, axis=1), mask=inside)
    else:
        scale = load_row(bn_weight, row, inside) * tl.rsqrt(load_row(var, row, inside) + eps)
        shift = load_row(bn_bias, row, inside) - load_row(mean, row, inside) * scale
        y = relu(z * scale[:, None] + shift[:, None]).to(out.dtype.element_ty)
        out += batch * out_strides[0] + tile_offsets(row, pixel, out_strides, WIDE)
        tl.store(out, y, mask=inside[:, None] & known[None, :])
        if extremes is not None:
            value = y.to(tl.float32)
            total = tl.where(known[None, :], value, 0.0)
            best = tl.where(known[None, :], value, -float("inf"))
            position = tl.broadcast_to(pixel[None, :], (BLOCK_M, BLOCK_N))
            share, largest, first = mean_and_first_maximum(total, best, position, pixels)
            extremes += part.to(tl.int64) * 2 * rows + row
            tl.store(extremes, share, mask=inside)
            tl.store(extremes + rows, largest, mask=inside)
            tl.store(positions + part.to(tl.int64) * rows + row, first, mask=inside)


@triton.jit
def msff_moments_kernel(
    moments, mean, var, rows, parts, pixels, tile_pixels,
    BLOCK_C: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of `BLOCK_C` channels from the moments (parts, 2, C_out)."""
    row = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = row < rows
    tiles = tl.cdiv(pixels, tile_pixels)
    average = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    seen = 0.0
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        ok = part < parts
        count = tl.minimum(pixels - part % tiles * tile_pixels, tile_pixels)
        count = tl.where(ok, count, 0).to(tl.float32)
        at = moments + part.to(tl.int64)[:, None] * 2 * rows + row[None, :]
        mask = ok[:, None] & inside[None, :]
        averages = tl.load(at, mask=mask, other=0.0)
        m2s = tl.load(at + rows, mask=mask, other=0.0)
        other, other_m2, _ = merge_moments(averages, m2s, count[:, None])
        here = tl.sum(count, axis=0)
        share = here / (seen + here)
        delta = other - average
        average += delta * share
        m2 += other_m2 + delta * delta * (seen * share)
        seen += here
    tl.store(mean + row, average, mask=inside)
    tl.store(var + row, m2 / seen, mask=inside)


# -------------------------------------------------------------------------------------- launchers


def is_far(size: Sequence[int], target: Sequence[int]) -> bool:
    """Whether positions pass 32 bits between maps of (h, w) and (H, W), as `bilinear` counts."""
    return any(2 * t * (s + 2) >= 2**31 for s, t in zip(size, target, strict=True))


class Inputs(NamedTuple):
    """What both directions read: the maps, and the products at their own sizes.

    Attributes:
        maps: the maps, each `flat`.
        weights: each map's columns of W, (C_out, C_i, 1, 1) views of a row-major tensor.
        native: index of the map that is multiplied at the target size, or None.
        products: (B, h·w, C_out) float32 of every other map.
        sizes: their (h, w).
        shape: (B, C_out, H, W).
    """

    maps: list[torch.Tensor]
    weights: tuple[torch.Tensor, ...]
    native: int | None
    products: tuple[torch.Tensor, ...]
    sizes: tuple[tuple[int, int], ...]
    shape: tuple[int, int, int, int]

    def product_names(self) -> Iterator[str]:
        """What `launch` calls the products, which are scratch."""
        return (f"products[{index}]" for index in range(len(self.products)))

    def is_wide(self, *others: torch.Tensor) -> bool:
        """Whether what a launch reads needs 64 bits, or one of `others`."""
        far = any(is_far(size, self.shape[2:]) for size in self.sizes)
        return far or is_wide(*self.maps, *self.products, *others)

    def native_arguments(self) -> tuple[object, object, int, object, tuple[int, int]]:
        """The map of target size, its strides and channels, its weights and their strides."""
        if self.native is None:
            return None, None, 0, None, (0, 0)
        x, weight = self.maps[self.native], self.weights[self.native]
        return x, strides(x), x.shape[1], weight, (weight.stride(0), weight.stride(1))


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_strides: tuple[int, int],
    out: torch.Tensor,
    split: bool = False,
) -> None:
    """Launch out (B, O, h, w) = weight ∗ x (B, I, h, w).

    Args:
        x: a `flat` map.
        weight: a tensor that holds the weight.
        weight_strides: its strides along O and I.
        out: a `flat` map.
        split: a weight wider than x keeps its precision; its result is scratch of the op.
    """
    batch, rows, height, width = out.shape
    pixels = height * width
    config = configs.choose("msff_product_kernel", x, pixels)
    tiles = cdiv(rows, config.blocks["BLOCK_M"]) * cdiv(pixels, config.blocks["BLOCK_N"])
    launch(
        msff_product_kernel,
        (batch * tiles,),
        *(x, weight, out, rows, x.shape[1], pixels, strides(x), weight_strides, strides(out)),
        config=config,
        scratch=("out",) if split else ("x",),
        SPLIT=split,
        WIDE=is_wide(x, out),
        PRECISION=dot_precision(x),
    )


def prepare(features: Sequence[torch.Tensor], weight: torch.Tensor) -> Inputs:
    """Launch the products at the maps' own sizes."""
    maps, weight = [flat(f) for f in features], weight.contiguous()
    weights = weight.split([f.shape[1] for f in maps], 1)
    size = max(f.shape[2] for f in maps), max(f.shape[3] for f in maps)
    batch, rows = maps[0].shape[0], weight.shape[0]
    native = next((i for i, f in enumerate(maps) if tuple(f.shape[2:]) == size), None)
    products, sizes = [], []
    for index, (x, part) in enumerate(zip(maps, weights, strict=True)):
        if index == native:
            continue
        height, width = x.shape[2:]
        out = torch.empty((batch, height * width, rows), dtype=torch.float32, device=x.device)
        as_map = out.transpose(1, 2).unflatten(2, (height, width))
        product(x, part, (part.stride(0), part.stride(1)), as_map, split=True)
        products.append(out)
        sizes.append((height, width))
    return Inputs(maps, weights, native, tuple(products), tuple(sizes), (batch, rows, *size))


def _fused(
    inputs: Inputs,
    vectors: tuple[torch.Tensor | None, ...],
    out: torch.Tensor | None,
    moments: torch.Tensor | None,
    eps: float,
    parts: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> None:
    """Launch 2: out (B, C_out, H, W) from γ, β, mean and variance, or the moments of z's tiles.

    `parts`: where the tiles leave their parts of out's channel statistics.
    """
    like, (batch, rows, height, width) = inputs.maps[0], inputs.shape
    pixels = height * width
    x, x_strides, channels, part, part_strides = inputs.native_arguments()
    config = configs.choose("msff_forward_kernel", like, pixels)
    tiles = cdiv(rows, config.blocks["BLOCK_M"]) * cdiv(pixels, config.blocks["BLOCK_N"])
    launch(
        msff_forward_kernel,
        (batch * tiles,),
        *(x, part, inputs.products, inputs.sizes, *vectors, out, moments, *parts),
        *(rows, channels, pixels, width, eps, x_strides, part_strides),
        None if out is None else strides(out),
        config=config,
        scratch=("moments", "extremes", "positions", *inputs.product_names()),
        WIDE=inputs.is_wide(*(() if out is None else (out,))),
        PRECISION=dot_precision(like),
    )


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
) -> tuple[torch.Tensor, ...]:
    """Return relu(BN(W ∗ cat)) (B, C_out, H, W), and statistics of the batch and of the channels.

    Of the batch: mean and biased variance, (C_out,) in training and (0,) in evaluation. Of out's
    channels, if asked for: mean, maximum, its first position, (B, C_out) each, else (0,).
    """
    inputs, like = prepare(features, weight), features[0]
    out = torch.empty(
        inputs.shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like)
    )
    norm = (bn_weight.contiguous(), bn_bias.contiguous())
    if not training:
        assert running_mean is not None
        assert running_var is not None
        vectors = (*norm, running_mean.contiguous(), running_var.contiguous())
        of_channels = _finish(inputs, vectors, out, eps, statistics)
        mean = torch.empty(0, dtype=torch.float32, device=like.device)
        return out, mean, torch.empty_like(mean), *of_channels
    batch, rows, height, width = inputs.shape
    tile_pixels = configs.choose("msff_forward_kernel", like, height * width).blocks["BLOCK_N"]
    parts = batch * cdiv(height * width, tile_pixels)
    moments = torch.empty((parts, 2, rows), dtype=torch.float32, device=like.device)
    _fused(inputs, (None,) * 4, None, moments, eps)
    mean, var = moments.new_empty(rows), moments.new_empty(rows)
    config = configs.choose("msff_moments_kernel", like, height * width)
    launch(
        msff_moments_kernel,
        (cdiv(rows, config.blocks["BLOCK_C"]),),
        *(moments, mean, var, rows, parts, height * width, tile_pixels),
        config=config,
        scratch=("moments",),
    )
    of_channels = _finish(inputs, (*norm, mean, var), out, eps, statistics)
    return out, mean, var, *of_channels


def _finish(
    inputs: Inputs,
    vectors: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    eps: float,
    statistics: bool,
) -> tuple[torch.Tensor, ...]:
    """Launch 2 for out, and with `statistics` launch 3; the channel statistics, or (0,) each."""
    like, (batch, rows, height, width) = inputs.maps[0], inputs.shape
    if not statistics:
        _fused(inputs, vectors, out, None, eps)
        return unknown_statistics(torch.empty(0, dtype=torch.float32, device=like.device))
    pixels = height * width
    tile = configs.choose("msff_forward_kernel", like, pixels).blocks["BLOCK_N"]
    parts = empty_parts(batch * cdiv(pixels, tile), rows, like.device)
    _fused(inputs, vectors, out, None, eps, parts)
    return join_parts(*parts, batch)
