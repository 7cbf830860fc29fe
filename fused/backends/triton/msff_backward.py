"""Gradient of multi-scale feature fusion (spec.md 1 and 5.1).

With n = (z − mean)·rstd, y = γ·n + β, g = grad_out where y > 0, N values a channel:
    grad_γ = Σ g·n     grad_β = Σ g     grad_z = γ·rstd·(g − [Σ g / N + n·Σ g·n / N in training])
    native_i = resizeᵀ(grad_z)     grad_f_i = W_iᵀ ∗ native_i     grad_W_i = Σ native_i·f_iᵀ

Layouts: maps (B, C, H, W) by strides, W row-major; grad_z and native_i NCHW in the maps' dtype.
Launches, for n maps of which m have not the target size (nothing but the maps was saved):
1. the products at the maps' own sizes, as in the forward (n − 1, or n).
2. `msff_backward_kernel`: grid and tile of the forward; recomputes z, and leaves Σ g·n and Σ g of
   its tile, (parts, 2, C_out) float32; with running statistics also grad_z.
3. `msff_sums_kernel`: one program for a tile of channels adds the parts in order.
4. In training launch 2 again, for grad_z: z is computed a third time rather than kept (see there).
5. `msff_resize_backward_kernel` for each of the m maps: one program for a row of native pixels of a
   tile of channels gathers what it gave: the rows of the target that touch it are added with their
   weights, coalesced, then the columns by a product with the (sparse) matrix of their weights, in
   tf32 for half precision, whose results are rounded more than that. Nothing is scattered.
6. `msff_product_kernel` for each map: W_iᵀ ∗ native_i.
7. `msff_weight_kernel` for each map: one program for a tile of grad_W_i and a share of the pixels
   of all samples; the shares (splits, C_out, ΣC_i) float32 are added by one `sum_partials_kernel`.
Bytes: grad_out twice in training (sums, then grad_z), else once; grad_z written once, read twice
for every map: by its transposed resize about that often, or by the products of a map of its size.
All sums are float32; operands of products have the maps' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...contract import memory_format
from . import configs
from .channel_interaction_backward import pixel_product
from .channel_statistics import tile_offsets
from .device import offset
from .launch import cdiv, dot_precision, flat, is_wide, launch, strides
from .msff import Inputs, bilinear, fused_product, is_far, load_row, place, prepare, product
from .reduction import sum_partials

# Shares of the pixels that weight gradients are summed in: tiles alone do not fill a GPU.
_SPLITS, _SPLIT_PIXELS = 4, 512


@triton.jit
def msff_backward_kernel(
    grad_out, x, weight, products, sizes, bn_weight, bn_bias, mean, var, sums, totals, grad_z,
    rows, channels, pixels, values, width, eps,
    grad_strides, x_strides, weight_strides, grad_z_strides,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ g·n and Σ g of `BLOCK_M` channels × `BLOCK_N` pixels of one sample, and their grad_z.

    Without `sums` or `grad_z` that result is left out; `totals` (2, C_out), Σ g·n and Σ g of all
    `values` of a channel, are given in training once they are known.
    """
    row, pixel, part, batch = place(rows, pixels, BLOCK_M, BLOCK_N)
    z = fused_product(
        *(x, x_strides, channels, weight, weight_strides, products, sizes, batch, row, pixel),
        *(rows, pixels, width, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K),
    )
    inside = row < rows
    mask = inside[:, None] & (pixel < pixels)[None, :]
    gamma = load_row(bn_weight, row, inside)
    beta = load_row(bn_bias, row, inside)
    rstd = tl.rsqrt(load_row(var, row, inside) + eps)
    n = (z - load_row(mean, row, inside)[:, None]) * rstd[:, None]
    grad_out += batch * grad_strides[0] + tile_offsets(row, pixel, grad_strides, WIDE)
    grad = tl.load(grad_out, mask=mask, other=0.0).to(tl.float32)
    grad = tl.where(n * gamma[:, None] + beta[:, None] <= 0, 0.0, grad)  # a NaN lets it through
    if sums is not None:
        sums += part.to(tl.int64) * 2 * rows + row
        tl.store(sums, tl.sum(tl.where(mask, grad * n, 0.0), axis=1), mask=inside)
        tl.store(sums + rows, tl.sum(grad, axis=1), mask=inside)
    if grad_z is not None:
        if totals is not None:
            of_n = load_row(totals, row, inside) / values
            of_one = load_row(totals + rows, row, inside) / values
            grad -= of_one[:, None] + n * of_n[:, None]
        grad *= (gamma * rstd)[:, None]
        grad_z += batch * grad_z_strides[0] + tile_offsets(row, pixel, grad_z_strides, WIDE)
        tl.store(grad_z, grad.to(grad_z.dtype.element_ty), mask=mask)


@triton.jit
def msff_sums_kernel(
    sums, grad_gamma, grad_beta, totals, rows, parts,
    BLOCK_C: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Σ over the parts (parts, 2, C_out) for `BLOCK_C` channels, also as totals (2, C_out)."""
    row = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = row < rows
    gamma = tl.zeros((BLOCK_C,), tl.float32)
    beta = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        at = sums + part.to(tl.int64)[:, None] * 2 * rows + row[None, :]
        mask = (part < parts)[:, None] & inside[None, :]
        gamma += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        beta += tl.sum(tl.load(at + rows, mask=mask, other=0.0), axis=0)
    tl.store(grad_gamma + row, gamma.to(grad_gamma.dtype.element_ty), mask=inside)
    tl.store(grad_beta + row, beta.to(grad_beta.dtype.element_ty), mask=inside)
    tl.store(totals + row, gamma, mask=inside)
    tl.store(totals + rows + row, beta, mask=inside)


@triton.jit
def _touching(position, size, target, WIDE: tl.constexpr):
    """First position of the target axis that native `position` gives to, and last + 1."""
    if WIDE:
        position = tl.cast(position, tl.int64)
    first = (target * (2 * position - 1) - size) // (2 * size) + 1
    last = (target * (2 * position + 3) + size - 1) // (2 * size)
    first, last = tl.where(position > 0, first, 0), tl.minimum(last, target)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def _share(position, native, size, target, WIDE: tl.constexpr):
    """Weight of the native position in the bilinear value at a target position."""
    first, second, weight = bilinear(position, size, target, WIDE)
    return tl.where(first == native, 1.0 - weight, 0.0) + tl.where(second == native, weight, 0.0)


@triton.jit
def msff_resize_backward_kernel(
    grad_z, native, rows, height, width_units, native_height, native_width,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A row of `native` (B, C_out, h, w), `BLOCK_M` channels × `BLOCK_N` columns of one sample.

    The width of grad_z (B, C_out, H, W) is width_units·ALIGNED, so that wide loads are possible.
    """
    width = width_units * ALIGNED
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    rest = tl.program_id(0) // row_tiles
    column_tiles = tl.cdiv(native_width, BLOCK_N)
    column_tile = rest % column_tiles
    rest = rest // column_tiles
    y = rest % native_height
    batch = (rest // native_height).to(tl.int64)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows

    top, bottom = _touching(y, native_height, height, WIDE)
    left, _ = _touching(column_tile * BLOCK_N, native_width, width, WIDE)
    last = tl.minimum(column_tile * BLOCK_N + BLOCK_N, native_width) - 1
    _, right = _touching(last, native_width, width, WIDE)
    grad_z += batch * rows * (height * width) + offset(row, height * width, WIDE)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(left // BLOCK_K * BLOCK_K, right, BLOCK_K):
        target = start + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (target < width)[None, :]
        gathered = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for line in range(top, bottom):
            value = tl.load(grad_z + (line * width + target)[None, :], mask=mask, other=0.0)
            gathered += value.to(tl.float32) * _share(line, y, native_height, height, WIDE)
        share = _share(target[:, None], column[None, :], native_width, width, WIDE)
        total = tl.dot(gathered, share, total, input_precision=PRECISION)
    native += (batch * rows * native_height + y) * native_width
    native += offset(row, native_height * native_width, WIDE)[:, None] + column[None, :]
    mask = inside[:, None] & (column < native_width)[None, :]
    tl.store(native, total.to(native.dtype.element_ty), mask=mask)


@triton.jit
def msff_weight_kernel(
    native, x, partials, batches, rows, channels, first_column, columns, pixels, splits,
    native_strides, x_strides,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A share of the pixels of grad_W_i, `BLOCK_M` × `BLOCK_N`, at its columns of the partials."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    rest = tl.program_id(0) // row_tiles
    channel_tiles = tl.cdiv(channels, BLOCK_N)
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = rest % channel_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    split = rest // channel_tiles
    share = tl.cdiv(tl.cdiv(pixels, splits), BLOCK_K) * BLOCK_K
    start = split * share
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(batches):
        total = pixel_product(
            *(total, native, native_strides, row, rows, x, x_strides, channel, channels),
            *(start, tl.minimum(start + share, pixels), WIDE, PRECISION, BLOCK_K),
        )
        native += native_strides[0]
        x += x_strides[0]
    partials += split.to(tl.int64) * rows * columns + first_column
    where = offset(row, columns, WIDE)[:, None] + channel[None, :]
    tl.store(partials + where, total, mask=(row < rows)[:, None] & (channel < channels)[None, :])


# -------------------------------------------------------------------------------------- launchers


def _recompute(
    grad_out: torch.Tensor,
    inputs: Inputs,
    vectors: tuple[torch.Tensor, ...],
    sums: torch.Tensor | None,
    totals: torch.Tensor | None,
    grad_z: torch.Tensor | None,
    eps: float,
) -> None:
    """Launch 2, for the results that are given."""
    like, (batch, rows, height, width) = inputs.maps[0], inputs.shape
    pixels = height * width
    x, x_strides, channels, part, part_strides = inputs.native_arguments()
    config = configs.choose("msff_backward_kernel", like, pixels)
    tiles = cdiv(rows, config.blocks["BLOCK_M"]) * cdiv(pixels, config.blocks["BLOCK_N"])
    launch(
        msff_backward_kernel,
        (batch * tiles,),
        *(grad_out, x, part, inputs.products, inputs.sizes, *vectors, sums, totals, grad_z),
        *(rows, channels, pixels, batch * pixels, width, eps),
        *(strides(grad_out), x_strides, part_strides),
        None if grad_z is None else strides(grad_z),
        config=config,
        scratch=("sums", "totals", "grad_z", *inputs.product_names()),
        WIDE=inputs.is_wide(grad_out, *(() if grad_z is None else (grad_z,))),
        PRECISION=dot_precision(like),
    )


def _norm_backward(
    grad_out: torch.Tensor,
    inputs: Inputs,
    vectors: tuple[torch.Tensor, ...],
    training: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches 2 to 4: grad_z (B, C_out, H, W), and the gradients of γ and β.

    `vectors` are γ, β, and the mean and the variance that the forward normalised by.
    """
    like, (batch, rows, height, width) = inputs.maps[0], inputs.shape
    config = configs.choose("msff_backward_kernel", like, height * width)
    parts = batch * cdiv(height * width, config.blocks["BLOCK_N"])
    grad_z = torch.empty(inputs.shape, dtype=like.dtype, device=like.device)
    sums = torch.empty((parts, 2, rows), dtype=torch.float32, device=like.device)
    totals = sums.new_empty((2, rows))
    grad_gamma, grad_beta = torch.empty_like(vectors[0]), torch.empty_like(vectors[1])
    _recompute(grad_out, inputs, vectors, sums, None, None if training else grad_z, eps)
    config = configs.choose("msff_sums_kernel", like, height * width)
    launch(
        msff_sums_kernel,
        (cdiv(rows, config.blocks["BLOCK_C"]),),
        *(sums, grad_gamma, grad_beta, totals, rows, parts),
        config=config,
        scratch=("sums", "totals"),
    )
    if training:
        _recompute(grad_out, inputs, vectors, None, totals, grad_z, eps)
    return grad_z, grad_gamma, grad_beta


def _resize_backward(grad_z: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Launch 5: the gradient (B, C_out, h, w) of a product that was resized to that of grad_z."""
    batch, rows, height, width = grad_z.shape
    native = grad_z.new_empty((batch, rows, *size))
    config = configs.choose("msff_resize_backward_kernel", grad_z, size[0] * size[1])
    tiles = cdiv(rows, config.blocks["BLOCK_M"]) * cdiv(size[1], config.blocks["BLOCK_N"])
    aligned = math.gcd(width, 16)
    half_on_nvidia = grad_z.dtype != torch.float32 and torch.version.hip is None
    launch(
        msff_resize_backward_kernel,
        (batch * size[0] * tiles,),
        *(grad_z, native, rows, height, width // aligned, *size),
        config=config,
        scratch=("grad_z", "native"),
        ALIGNED=aligned,
        WIDE=is_far(size, (height, width)) or is_wide(grad_z),
        PRECISION="tf32" if half_on_nvidia else dot_precision(grad_z),
    )
    return native


def _weight_backward(
    natives: Sequence[torch.Tensor], inputs: Inputs, weight: torch.Tensor
) -> torch.Tensor:
    """Launches 7: the gradient of W, from the gradient of every map's product."""
    rows, columns, pixels = inputs.shape[1], weight.shape[1], inputs.shape[2] * inputs.shape[3]
    splits = min(_SPLITS, cdiv(pixels, _SPLIT_PIXELS))
    partials = torch.empty((splits, rows, columns), dtype=torch.float32, device=weight.device)
    first = 0
    for native, x in zip(natives, inputs.maps, strict=True):
        batch, channels, height, width = x.shape
        config = configs.choose("msff_weight_kernel", x, height * width)
        tiles = cdiv(rows, config.blocks["BLOCK_M"]) * cdiv(channels, config.blocks["BLOCK_N"])
        launch(
            msff_weight_kernel,
            (splits * tiles,),
            *(native, x, partials, batch, rows, channels, first, columns, height * width, splits),
            *(strides(native), strides(x)),
            config=config,
            scratch=("native", "partials"),
            WIDE=is_wide(native, x),
            PRECISION=dot_precision(x),
        )
        first += channels
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    sum_partials(inputs.maps[0], [(partials.view(splits, -1), 0, grad_weight)])
    return grad_weight


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
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for the maps, W, γ and β; the product is recomputed from the small maps."""
    mean, var = (batch_mean, batch_var) if training else (running_mean, running_var)
    assert mean is not None
    assert var is not None
    inputs = prepare(features, weight)
    vectors = tuple(v.contiguous() for v in (bn_weight, bn_bias, mean, var))
    grad_z, grad_gamma, grad_beta = _norm_backward(flat(grad_out), inputs, vectors, training, eps)
    natives, grads = [], []
    for feature, x, part in zip(features, inputs.maps, inputs.weights, strict=True):
        size = (x.shape[2], x.shape[3])
        native = grad_z if size == inputs.shape[2:] else _resize_backward(grad_z, size)
        grad = torch.empty_like(feature, memory_format=memory_format(feature))
        product(native, part, (part.stride(1), part.stride(0)), grad)
        natives.append(native)
        grads.append(grad)
    return grads, _weight_backward(natives, inputs, weight), grad_gamma, grad_beta
