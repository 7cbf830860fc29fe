"""What the kernels of gated_fusion share: tiles of maps, products of them, batch-norm statistics.

Every tile is (BLOCK_P pixels of one sample, channels): pixels are rows, so that the operand with a
prologue (gate, norm) is the left one, which tensor cores take from registers. The pixel tiles of
all samples are numbered, sample·tiles + tile: such a number is called a part. Programs of one part
and successive channels follow each other, so that a map comes once from memory, then from L2.

A product reads weight[k, o] by two strides; either axis may be the contiguous one. Its operands are
rounded to the map's dtype, it sums in float32. Moments (parts, 2, C) are the mean and the sum of
squared deviations of every channel in a part; both are of the values as stored, because those are
normalised.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...contract import memory_format
from . import configs, launch
from .device import merge_moments, offset

# Programs of an elementwise kernel: enough for the largest GPU, few enough that each may begin by
# merging all parts of its channels.
TARGET_PROGRAMS = 512


# ------------------------------------------------------------------------------------------- tiles


@triton.jit
def place(part, tiles, pixels, BLOCK_P: tl.constexpr):
    """Sample of a part, its pixels h·W + w, and which of these there are."""
    pixel = (part % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    return tl.cast(part // tiles, tl.int64), pixel, pixel < pixels


@triton.jit
def tile_offsets(pixel, channel, strides, WIDE: tl.constexpr):
    """Offsets of a tile into its sample of a map of `strides` (batch, channel, pixel)."""
    along_pixels = offset(pixel[:, None], strides[2], WIDE)
    return along_pixels + offset(channel[None, :], strides[1], WIDE)


@triton.jit
def load_tile(x, sample, pixel, channel, ok, strides, WIDE: tl.constexpr):
    """A tile of the map x in float32, zero where not ok."""
    at = x + sample * strides[0] + tile_offsets(pixel, channel, strides, WIDE)
    return tl.load(at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load_gates(w, sample, pixel, channel, ok, size, strides, WIDE: tl.constexpr):
    """w spread over the `size` channels of its groups, as a tile in float32."""
    return load_tile(w, sample, pixel, channel // size, ok, strides, WIDE)


@triton.jit
def store_tile(x, value, sample, pixel, channel, ok, strides, WIDE: tl.constexpr):
    """Store a tile of the map x."""
    at = x + sample * strides[0] + tile_offsets(pixel, channel, strides, WIDE)
    tl.store(at, value.to(x.dtype.element_ty), mask=ok)


@triton.jit
def load_vector(x, index, ok):
    """Values of a vector in float32, zero where not ok."""
    return tl.load(x + index, mask=ok, other=0.0).to(tl.float32)


# ---------------------------------------------------------------------------------------- products


@triton.jit
def add_gated_product(
    acc, e, w, weight, sample, pixel, inside, column, known, channels, size,
    e_strides, w_strides, weight_strides,
    BLOCK_K: tl.constexpr, ONE_GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Acc + Σ_k s[p, k]·weight[k, column] with s = e ⊙ w, over all channels.

    ONE_GROUP: BLOCK_K channels never straddle groups, so a row of w serves a tile.
    """
    lane = tl.arange(0, BLOCK_K)
    e += sample * e_strides[0]
    w += sample * w_strides[0]
    e_at = tile_offsets(pixel, lane, e_strides, WIDE)
    weight_at = lane[:, None] * weight_strides[0] + column[None, :] * weight_strides[1]
    w_at = offset(pixel, w_strides[2], WIDE)
    for k in range(0, channels, BLOCK_K):
        some = k + lane < channels
        ok = inside[:, None] & some[None, :]
        first = tl.cast(k, tl.int64)
        value = tl.load(e + first * e_strides[1] + e_at, mask=ok, other=0.0)
        if ONE_GROUP:
            row = w + first // size * w_strides[1]
            gate = tl.load(row + w_at, mask=inside, other=0.0)[:, None]
        else:
            spread = offset((k + lane) // size, w_strides[1], WIDE)
            gate = tl.load(w + spread[None, :] + w_at[:, None], mask=ok, other=0.0)
        if w.dtype == e.dtype:
            s = value * gate
        else:
            s = (value.to(tl.float32) * gate.to(tl.float32)).to(value.dtype)
        factor = tl.load(
            weight + first * weight_strides[0] + weight_at,
            mask=some[:, None] & known[None, :],
            other=0.0,
        )
        acc = tl.dot(s, factor.to(s.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_product(
    acc, x, weight, affine, sample, pixel, inside, column, known, inputs, x_strides, weight_strides,
    RELU: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Acc + Σ_k f(x[p, k])·weight[k, column]; f is affine (scale, shift: (2, inputs)) and RELU.

    Without `affine` f is the identity.
    """
    lane = tl.arange(0, BLOCK_K)
    x += sample * x_strides[0]
    x_at = tile_offsets(pixel, lane, x_strides, WIDE)
    weight_at = lane[:, None] * weight_strides[0] + column[None, :] * weight_strides[1]
    for k in range(0, inputs, BLOCK_K):
        some = k + lane < inputs
        first = tl.cast(k, tl.int64)
        ok = inside[:, None] & some[None, :]
        value = tl.load(x + first * x_strides[1] + x_at, mask=ok, other=0.0)
        if affine is not None:
            value = apply_affine(value, affine, k + lane, some, inputs, RELU)
        factor = tl.load(
            weight + first * weight_strides[0] + weight_at,
            mask=some[:, None] & known[None, :],
            other=0.0,
        )
        acc = tl.dot(value, factor.to(value.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def apply_affine(value, affine, channel, some, channels, RELU: tl.constexpr):
    """A batch norm as scale and shift (2, channels), then perhaps ReLU; rounded as `value` is."""
    scale = tl.load(affine + channel, mask=some, other=0.0)
    shift = tl.load(affine + channels + channel, mask=some, other=0.0)
    result = value.to(tl.float32) * scale[None, :] + shift[None, :]
    if RELU:
        result = tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return result.to(value.dtype)


# ------------------------------------------------------------------------------------------- norms


@triton.jit
def norm_affine(mean, var, weight, bias, eps):
    """Scale and shift of a batch norm."""
    scale = weight * tl.rsqrt(var + eps)
    return scale, bias - mean * scale


@triton.jit
def store_with_moments(
    acc, out, moments, part, sample, pixel, inside, column, known, columns, out_strides,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Store a product's tile, and its moments unless that is None."""
    value = acc.to(out.dtype.element_ty)
    ok = inside[:, None] & known[None, :]
    store_tile(out, value, sample, pixel, column, ok, out_strides, WIDE)
    if moments is not None:
        value = value.to(tl.float32)
        count = tl.sum(inside.to(tl.float32), axis=0)
        mean = tl.sum(tl.where(inside[:, None], value, 0.0), axis=0) / count
        deviation = tl.where(inside[:, None], value - mean[None, :], 0.0)
        row = moments + tl.cast(part, tl.int64) * 2 * columns + column
        tl.store(row, mean, mask=known)
        tl.store(row + columns, tl.sum(deviation * deviation, axis=0), mask=known)


@triton.jit
def batch_statistics(
    moments, channel, known, channels, parts, tiles, pixels,
    TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of channels from the moments of all parts of TILE pixels."""
    mean = tl.zeros((ROWS, BLOCK_C), tl.float32)
    m2 = tl.zeros((ROWS, BLOCK_C), tl.float32)
    seen = tl.zeros((ROWS,), tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        count = tl.minimum(pixels - part % tiles * TILE, TILE)
        count = tl.where(part < parts, count, 0).to(tl.float32)
        row = moments + part.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        ok = (part < parts)[:, None] & known[None, :]
        # Chan's formula for two parts: rows keep a union each, merged behind the loop.
        total = tl.maximum(seen + count, 1.0)
        delta = tl.load(row, mask=ok, other=0.0) - mean
        share = (count / total)[:, None]
        m2 += tl.load(row + channels, mask=ok, other=0.0) + delta * delta * seen[:, None] * share
        mean += delta * share
        seen += count
    mean, m2, total = merge_moments(mean, m2, seen[:, None])
    return mean, m2 / total


# -------------------------------------------------------------------------------------- host side


class Tiling(NamedTuple):
    """How a product's programs cover its result.

    Attributes:
        config: blocks, warps, stages.
        tiles: pixel tiles of one sample.
        parts: pixel tiles of all samples.
        column_tiles: channel tiles.
    """

    config: configs.Config
    tiles: int
    parts: int
    column_tiles: int

    @property
    def grid(self) -> launch.Grid:
        """One program a part and channel tile."""
        return (self.parts * self.column_tiles,)

    @property
    def block_p(self) -> int:
        """Pixels of a tile."""
        return self.config.blocks["BLOCK_P"]


class Spans(NamedTuple):
    """How the programs of an elementwise kernel cover a map: channel blocks × runs of parts.

    Attributes:
        config: blocks, warps, stages.
        tiles: pixel tiles of one sample.
        parts: pixel tiles of all samples.
        run: parts that one program walks through.
        runs: programs along the parts.
        blocks: channel blocks.
    """

    config: configs.Config
    tiles: int
    parts: int
    run: int
    runs: int
    blocks: int

    @property
    def grid(self) -> launch.Grid:
        """One program a run and channel block."""
        return (self.runs * self.blocks,)


class Norm(NamedTuple):
    """One batch norm; mean and var are running statistics in evaluation, outputs in training."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    eps: float


class Case:
    """The maps of one call and the sizes that its launches need.

    Attributes:
        e: the map (B, C, H, W), its pixels one axis.
        w: the gates (B, G, H, W), likewise.
        squeezed: C // 4.
        size: C / G.
        pixels: H·W.
        total: B·H·W.
        wide: whether offsets need 64 bits.
        precision: of products.
    """

    def __init__(self, e: torch.Tensor, w: torch.Tensor, *others: torch.Tensor) -> None:
        """From the op's maps; `others` also count for `wide`."""
        self.e, self.w = launch.flat(e), launch.flat(w)
        self.batch, self.channels, height, width = e.shape
        self.squeezed, self.size = self.channels // 4, self.channels // w.shape[1]
        self.pixels = height * width
        self.total = self.batch * self.pixels
        self.shape = (height, width)
        self.memory_format = memory_format(e)
        self.wide = launch.is_wide(self.e, self.w, *others)
        self.precision = launch.dot_precision(e)

    @property
    def strides(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Strides of e and of w."""
        return launch.strides(self.e), launch.strides(self.w)

    def new_map(self, channels: int) -> torch.Tensor:
        """An empty map (B, channels, H, W) in e's dtype and memory format."""
        shape = (self.batch, channels, *self.shape)
        e = self.e
        return torch.empty(
            shape, dtype=e.dtype, device=e.device, memory_format=self.memory_format
        )

    def new_floats(self, *shape: int) -> torch.Tensor:
        """Empty float32 scratch."""
        return torch.empty(shape, dtype=torch.float32, device=self.e.device)

    def norm(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        eps: float,
        channels: int,
        *,
        training: bool,
    ) -> Norm:
        """A norm of the running statistics, or in training with room for the batch's."""
        if training:
            mean, var = self.new_floats(channels), self.new_floats(channels)
            return Norm(weight, bias, mean, var, eps)
        assert running_mean is not None  # the contract refuses evaluation without them
        assert running_var is not None
        return Norm(weight, bias, running_mean, running_var, eps)

    def tiling(self, kernel: Any, columns: int) -> Tiling:
        """Tiles of a product with `columns` output channels."""
        config = configs.choose(kernel.__name__, self.e, self.total)
        tiles = launch.cdiv(self.pixels, config.blocks["BLOCK_P"])
        column_tiles = launch.cdiv(columns, config.blocks["BLOCK_O"])
        return Tiling(config, tiles, self.batch * tiles, column_tiles)

    def spans(self, kernel: Any) -> Spans:
        """Runs of an elementwise kernel over all C channels."""
        config = configs.choose(kernel.__name__, self.e, self.total)
        tiles = launch.cdiv(self.pixels, config.blocks["BLOCK_P"])
        blocks = launch.cdiv(self.channels, config.blocks["BLOCK_C"])
        parts = self.batch * tiles
        run = launch.cdiv(parts, launch.cdiv(TARGET_PROGRAMS, blocks))
        return Spans(config, tiles, parts, run, launch.cdiv(parts, run), blocks)

    def one_group(self, tiling: Tiling) -> bool:
        """Whether a product's BLOCK_K channels of s lie in one group."""
        return self.size % tiling.config.blocks["BLOCK_K"] == 0


def matrix_strides(weight: torch.Tensor) -> tuple[int, int]:
    """Strides of a 1×1 convolution's weight (O, I, 1, 1) as weight[i, o]."""
    return weight.stride(1), weight.stride(0)
