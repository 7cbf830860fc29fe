"""Gradient of channel interaction (spec.md 2.1).

With outer = grad_e·xᵀ over the pixels of a sample (C, C), rows o and columns i:
    grad_Wci[o, i] = Σ_b (1 − a[b, o])·outer[b, o, i]
    grad_a[b, o] = outer[b, o, o] − Σ_i Wci[o, i]·outer[b, o, i]       (Wci ∗ x is not recomputed)
    grad_x = Wciᵀ ∗ ((1 − a) ⊙ grad_e) + a ⊙ grad_e + grad_mean / P + grad_maximum at argmax
and the MLP's gradients between the last two, as in the reference.

Layouts: maps (B, C, H, W) by strides, vectors (B, C) float32, weights row-major. Three launches:
1. `channel_interaction_outer_kernel`: one program for a tile of (o, i), over all samples in turn.
   outer stays in registers: its share of grad_a leaves as partials (B, tiles of i, C) float32, and
   grad_Wci is complete. grad_e and x are read once for every tile across them, mostly from cache.
2. `channel_interaction_hidden_kernel`: one program for a sample and a tile of hidden units. Sums
   the partials in the order of the tiles, recomputes V1·mean and V1·maximum, goes back through V2.
3. `channel_interaction_backward_kernel`: grid as in the forward, grad_e read, grad_x written; a
   scales the weight, not grad_e, so that the map goes to the tensor cores as it is in memory. Every
   program takes its rows' gradients of mean and maximum from V1 itself (recomputed by every tile of
   pixels, 32 kB of the second-level cache); those of the first pixels of sample 0 also sum the
   gradients of their rows of V2 and columns of V1 over the samples, in order.
Bytes: grad_e twice, x once, grad_x once. All sums are float32; operands of the products of maps
have the map's dtype. The products are ours: the library would round outer to half precision, and
keep it for every sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...contract import memory_format
from . import configs
from .channel_interaction import pointwise_product, relu
from .channel_statistics import tile_offsets
from .device import offset
from .launch import cdiv, dot_precision, flat, is_wide, launch, strides


@triton.jit
def pixel_product(
    total, a, a_strides, row, rows, b, b_strides, column, columns, start, stop,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + Σ over pixels start ≤ p < stop of a[row, p]·b[column, p], in float32.

    Args:
        total: (BLOCK_M, BLOCK_N) float32.
        a: one sample's map.
        a_strides: along batch, channel and pixel.
        row: (BLOCK_M,) channels of a.
        rows: number of channels of a.
        b: another map of the sample, of a's dtype and pixels.
        b_strides: along batch, channel and pixel.
        column: (BLOCK_N,) channels of b.
        columns: number of channels of b.
        start: first pixel.
        stop: last pixel + 1.
        WIDE: offsets need 64 bits.
        PRECISION: of the product, as `tl.dot` calls it.
        BLOCK_K: pixels a step.
    """
    b += offset(column, b_strides[1], WIDE)[None, :]
    for first in range(start, stop, BLOCK_K):
        pixel = first + tl.arange(0, BLOCK_K)
        known = pixel < stop
        left = tl.load(
            a + tile_offsets(row, pixel, a_strides, WIDE),
            mask=(row < rows)[:, None] & known[None, :],
            other=0.0,
        )
        right = tl.load(
            b + offset(pixel, b_strides[2], WIDE)[:, None],
            mask=known[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def channel_interaction_outer_kernel(
    grad_e,
    x,
    gate,
    interaction_weight,  # (C, C)
    grad_weight,  # (C, C)
    partials,  # (B, tiles of i, C)
    batches,
    channels,
    pixels,
    grad_strides,
    x_strides,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_Wci of `BLOCK_M` × `BLOCK_N`, and their share of grad_a of every sample."""
    row_tiles = tl.cdiv(channels, BLOCK_M)
    column_tile = tl.program_id(0) // row_tiles
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < channels
    mask = inside[:, None] & (column < channels)[None, :]
    where = offset(row, channels, WIDE)[:, None] + column[None, :]
    column_tiles = tl.cdiv(channels, BLOCK_N)
    partials += column_tile * channels
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(batches):
        outer = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        outer = pixel_product(
            *(outer, grad_e, grad_strides, row, channels, x, x_strides, column, channels),
            *(0, pixels, WIDE, PRECISION, BLOCK_K),
        )
        weight = tl.load(interaction_weight + where, mask=mask, other=0.0).to(tl.float32)
        one = tl.where(row[:, None] == column[None, :], 1.0, 0.0)
        tl.store(partials + row, tl.sum(outer * (one - weight), axis=1), mask=inside)
        a = tl.load(gate + row, mask=inside, other=0.0)
        total += (1.0 - a)[:, None] * outer
        grad_e += grad_strides[0]
        x += x_strides[0]
        gate += channels
        partials += column_tiles * channels
    tl.store(grad_weight + where, total.to(grad_weight.dtype.element_ty), mask=mask)


@triton.jit
def channel_interaction_hidden_kernel(
    partials,  # (B, tiles, C)
    gate,
    mean,
    maximum,
    squeeze_weight,  # (hidden, C)
    excite_weight,  # (C, hidden)
    grad_logits,  # (B, C)
    activation,  # (B, hidden): relu(V1·mean) + relu(V1·maximum)
    grad_hidden,  # (B, 2, hidden): of V1·mean and V1·maximum
    channels,
    hidden,
    tiles,
    BLOCK_C: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Gradients of one sample's logits, and of `BLOCK_HIDDEN` units before their ReLU."""
    hidden_tiles = tl.cdiv(hidden, BLOCK_HIDDEN)
    hidden_tile = tl.program_id(0) % hidden_tiles
    batch = (tl.program_id(0) // hidden_tiles).to(tl.int64)
    unit = hidden_tile * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    known = unit < hidden
    from_mean = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    from_maximum = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    back = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    partials += batch * tiles * channels
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        inside = channel < channels
        grad_gate = tl.zeros((BLOCK_C,), tl.float32)
        for first in range(0, tiles, BLOCK_TILES):
            tile = first + tl.arange(0, BLOCK_TILES)
            part = partials + tile[:, None] * channels + channel[None, :]
            mask = (tile < tiles)[:, None] & inside[None, :]
            grad_gate += tl.sum(tl.load(part, mask=mask, other=0.0), axis=0)
        place = batch * channels + channel
        a = tl.load(gate + place, mask=inside, other=0.0)
        grad_logit = grad_gate * a * (1.0 - a)
        if hidden_tile == 0:
            tl.store(grad_logits + place, grad_logit, mask=inside)
        mask = known[:, None] & inside[None, :]
        squeeze = tl.load(
            squeeze_weight + unit[:, None] * channels + channel[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        excite = tl.load(
            excite_weight + unit[:, None] + channel[None, :] * hidden, mask=mask, other=0.0
        ).to(tl.float32)
        average = tl.load(mean + place, mask=inside, other=0.0)
        largest = tl.load(maximum + place, mask=inside, other=0.0)
        from_mean += tl.sum(squeeze * average[None, :], axis=1)
        from_maximum += tl.sum(squeeze * largest[None, :], axis=1)
        back += tl.sum(excite * grad_logit[None, :], axis=1)
    tl.store(activation + batch * hidden + unit, relu(from_mean) + relu(from_maximum), mask=known)
    grad_hidden += batch * 2 * hidden + unit
    # As PyTorch's ReLU, whose gradient a NaN lets through.
    tl.store(grad_hidden, tl.where(from_mean <= 0, 0.0, back), mask=known)
    tl.store(grad_hidden + hidden, tl.where(from_maximum <= 0, 0.0, back), mask=known)


@triton.jit
def _through_squeeze(
    grad_hidden, squeeze_weight, row, channels, hidden,
    BLOCK_M: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Gradients (BLOCK_M,) of one sample's mean and maximum from its grad_hidden (2, hidden)."""
    of_mean = tl.zeros((BLOCK_M,), tl.float32)
    of_maximum = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, hidden, BLOCK_HIDDEN):
        unit = start + tl.arange(0, BLOCK_HIDDEN)
        known = unit < hidden
        weight = tl.load(
            squeeze_weight + row[:, None] + unit[None, :] * channels,
            mask=(row < channels)[:, None] & known[None, :],
            other=0.0,
        ).to(tl.float32)
        from_mean = tl.load(grad_hidden + unit, mask=known, other=0.0)
        from_maximum = tl.load(grad_hidden + hidden + unit, mask=known, other=0.0)
        of_mean += tl.sum(weight * from_mean[None, :], axis=1)
        of_maximum += tl.sum(weight * from_maximum[None, :], axis=1)
    return of_mean, of_maximum


@triton.jit
def _store_weight_gradients(
    grad_logits, activation, grad_hidden, mean, maximum, grad_squeeze, grad_excite,
    row, batches, channels, hidden, BLOCK_M: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Gradients of `BLOCK_M` columns of V1 and rows of V2, over the samples in order."""
    inside = row < channels
    for start in range(0, hidden, BLOCK_HIDDEN):
        unit = start + tl.arange(0, BLOCK_HIDDEN)
        known = unit < hidden
        squeeze = tl.zeros((BLOCK_M, BLOCK_HIDDEN), tl.float32)
        excite = tl.zeros((BLOCK_M, BLOCK_HIDDEN), tl.float32)
        at, back = row, unit
        for _ in range(batches):
            average = tl.load(mean + at, mask=inside, other=0.0)
            largest = tl.load(maximum + at, mask=inside, other=0.0)
            of_mean = tl.load(grad_hidden + back, mask=known, other=0.0)
            of_maximum = tl.load(grad_hidden + hidden + back, mask=known, other=0.0)
            squeeze += average[:, None] * of_mean[None, :]
            squeeze += largest[:, None] * of_maximum[None, :]
            grad_logit = tl.load(grad_logits + at, mask=inside, other=0.0)
            active = tl.load(activation + unit, mask=known, other=0.0)
            excite += grad_logit[:, None] * active[None, :]
            at += channels
            back += 2 * hidden
            activation += hidden
        activation -= batches * hidden
        mask = inside[:, None] & known[None, :]
        where = row[:, None] + unit[None, :] * channels
        tl.store(grad_squeeze + where, squeeze.to(grad_squeeze.dtype.element_ty), mask=mask)
        where = row[:, None] * hidden + unit[None, :]
        tl.store(grad_excite + where, excite.to(grad_excite.dtype.element_ty), mask=mask)


@triton.jit
def channel_interaction_backward_kernel(
    grad_e,
    interaction_weight,  # (C, C)
    squeeze_weight,  # (hidden, C)
    gate,
    mean,
    maximum,
    argmax,
    grad_logits,  # (B, C)
    activation,  # (B, hidden)
    grad_hidden,  # (B, 2, hidden)
    grad_x,
    grad_squeeze,  # (hidden, C)
    grad_excite,  # (C, hidden)
    batches,
    channels,
    pixels,
    hidden,
    grad_strides,
    x_strides,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """grad_x of `BLOCK_M` channels × `BLOCK_N` pixels of a sample; the first: V1's and V2's too."""
    row_tiles = tl.cdiv(channels, BLOCK_M)
    rest = tl.program_id(0) // row_tiles
    pixel_tiles = tl.cdiv(pixels, BLOCK_N)
    batch = (rest // pixel_tiles).to(tl.int64)
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = rest % pixel_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < channels
    grad_e += batch * grad_strides[0]
    total = pointwise_product(
        *(interaction_weight, (1, channels), grad_e, grad_strides, gate + batch * channels),
        *(row, pixel, channels, channels, pixels, False, WIDE, PRECISION),
        *(BLOCK_M, BLOCK_N, BLOCK_K),
    )
    mask = inside[:, None] & (pixel < pixels)[None, :]
    own = tile_offsets(row, pixel, grad_strides, WIDE)
    value = tl.load(grad_e + own, mask=mask, other=0.0).to(tl.float32)
    place = batch * channels + row
    total += tl.load(gate + place, mask=inside, other=0.0)[:, None] * value
    of_mean, of_maximum = _through_squeeze(
        *(grad_hidden + batch * 2 * hidden, squeeze_weight, row, channels, hidden),
        *(BLOCK_M, BLOCK_HIDDEN),
    )
    position = tl.load(argmax + place, mask=inside, other=-1).to(tl.int32)
    total += (of_mean / pixels)[:, None]
    total += tl.where(position[:, None] == pixel[None, :], of_maximum[:, None], 0.0)
    grad_x += batch * x_strides[0] + tile_offsets(row, pixel, x_strides, WIDE)
    tl.store(grad_x, total.to(grad_x.dtype.element_ty), mask=mask)
    if rest == 0:
        _store_weight_gradients(
            *(grad_logits, activation, grad_hidden, mean, maximum, grad_squeeze, grad_excite),
            *(row, batches, channels, hidden, BLOCK_M, BLOCK_HIDDEN),
        )


def _outer(
    grad_e: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch 1: the gradient of Wci, and partials of grad_a (B, tiles, C)."""
    batch, channels, height, width = x.shape
    pixels = height * width
    config = configs.choose("channel_interaction_outer_kernel", x, pixels)
    tiles = cdiv(channels, config.blocks["BLOCK_N"])
    grad_weight = torch.empty_like(weight)
    partials = gate.new_empty((batch, tiles, channels))
    launch(
        channel_interaction_outer_kernel,
        (tiles * cdiv(channels, config.blocks["BLOCK_M"]),),
        *(grad_e, x, gate, weight, grad_weight, partials),
        *(batch, channels, pixels, strides(grad_e), strides(x)),
        config=config,
        scratch=("partials",),
        WIDE=is_wide(grad_e, x, weight),
        PRECISION=dot_precision(x),
    )
    return grad_weight, partials


def _hidden(
    partials: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    mean: torch.Tensor,
    maximum: torch.Tensor,
    squeeze_weight: torch.Tensor,
    excite_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch 2: grad_logits (B, C), the activation and grad_hidden, all float32."""
    (batch, channels), hidden = mean.shape, squeeze_weight.shape[0]
    grad_logits = torch.empty_like(mean)
    activation = mean.new_empty((batch, hidden))
    grad_hidden = mean.new_empty((batch, 2, hidden))
    config = configs.choose("channel_interaction_hidden_kernel", x, 0)
    launch(
        channel_interaction_hidden_kernel,
        (batch * cdiv(hidden, config.blocks["BLOCK_HIDDEN"]),),
        *(partials, gate, mean, maximum, squeeze_weight, excite_weight),
        *(grad_logits, activation, grad_hidden, channels, hidden, partials.shape[1]),
        config=config,
        scratch=("partials", "grad_logits", "activation", "grad_hidden"),
    )
    return grad_logits, activation, grad_hidden


def backward(
    grad_e: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    mean: torch.Tensor,
    maximum: torch.Tensor,
    argmax: torch.Tensor,
    squeeze_weight: torch.Tensor,
    excite_weight: torch.Tensor,
    interaction_weight: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients for x and the three weights."""
    batch, channels, height, width = x.shape
    pixels = height * width
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    grad_e, x, weight = flat(grad_e), flat(x), interaction_weight.contiguous()
    squeeze, excite = squeeze_weight.contiguous(), excite_weight.contiguous()
    gate, mean, maximum, argmax = (t.contiguous() for t in (gate, mean, maximum, argmax))
    grad_weight, partials = _outer(grad_e, x, gate, weight)
    through = _hidden(partials, x, gate, mean, maximum, squeeze, excite)
    grad_squeeze, grad_excite = torch.empty_like(squeeze), torch.empty_like(excite)
    config = configs.choose("channel_interaction_backward_kernel", x, pixels)
    tiles = cdiv(channels, config.blocks["BLOCK_M"]) * cdiv(pixels, config.blocks["BLOCK_N"])
    launch(
        channel_interaction_backward_kernel,
        (batch * tiles,),
        *(grad_e, weight, squeeze, gate, mean, maximum, argmax, *through),
        *(grad_x, grad_squeeze, grad_excite, batch, channels, pixels, squeeze.shape[0]),
        *(strides(grad_e), strides(grad_x)),
        config=config,
        scratch=("grad_logits", "activation", "grad_hidden"),
        WIDE=is_wide(grad_e, grad_x),
        PRECISION=dot_precision(x),
    )
    return grad_x, grad_squeeze, grad_excite, grad_weight
