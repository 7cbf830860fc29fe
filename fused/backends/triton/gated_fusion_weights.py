"""Gated fusion, backward: gradients of the three weights, all in one launch and its reduction.

    grad_Wf = [Σ z·sᵀ | Σ z·Mᵀ]      grad_W2 = Σ BN2ᵀ(m)·rᵀ      grad_W1 = Σ BN1ᵀ(h)·sᵀ
    summed over samples and pixels; r = relu(BN1(hidden)), M = BN2(expanded), s = e ⊙ w and BNᵀ are
    recomputed on load (names as in `gated_fusion_backward`).

Layouts: maps NCHW or channels_last by strides. A tile of a gradient is (inputs, outputs).
Programs: (run of pixel tiles, tile of one of the four products). Every run stores its sums in
partials (runs, numbers), the weights' numbers one behind the other as they are contiguous; the
second launch adds the runs in order, and the pieces of grad_w.
Bytes: 7.75 passes over the map (z, e and expanded twice, m, hidden twice, h), again for every tile
of the other operand, but then from L2; the partials, written and read.
Precision: operands in the map's dtype, sums in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import configs, launch
from .gated_fusion_case import Case
from .gated_fusion_products import (
    apply_affine,
    norm_backward,
    place,
    tile_offsets,
)

# Programs that fill the largest GPU several times over, and pixel tiles that pay for a partial sum.
_TARGET_PROGRAMS = 1024
_LEAST_RUN = 32


@triton.jit
def weight_gradient(
    x, w, affine, grad, value, slopes, first, last, tiles, pixels, row, rows, column, columns, size,
    x_strides, w_strides, grad_strides, value_strides,
    RELU: tl.constexpr, TRAINING: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Σ over pixels of f(x)[p, row]·f'(grad)[p, column], (BLOCK_I, BLOCK_O).

    f gates with w or applies affine and RELU, f' is BNᵀ where there are slopes.
    """
    acc = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    some, known = row < rows, column < columns
    for part in range(first, last):
        sample, pixel, inside = place(part, tiles, pixels, BLOCK_P)
        ok = inside[:, None] & some[None, :]
        at = x + sample * x_strides[0] + tile_offsets(pixel, row, x_strides, WIDE)
        left = tl.load(at, mask=ok, other=0.0)
        if w is not None:
            at = w + sample * w_strides[0] + tile_offsets(pixel, row // size, w_strides, WIDE)
            gate = tl.load(at, mask=ok, other=0.0)
            if w.dtype == x.dtype:
                left *= gate
            else:
                left = (left.to(tl.float32) * gate.to(tl.float32)).to(left.dtype)
        else:
            left = apply_affine(left, affine, row, some, rows, RELU)
        ok = inside[:, None] & known[None, :]
        at = grad + sample * grad_strides[0] + tile_offsets(pixel, column, grad_strides, WIDE)
        right = tl.load(at, mask=ok, other=0.0)
        if slopes is not None:
            at = value + sample * value_strides[0]
            at += tile_offsets(pixel, column, value_strides, WIDE)
            right = norm_backward(right, at, ok, slopes, column, known, columns, TRAINING)
            if TRAINING or affine is not None:
                # Pixels outside have a shift or a level, which may be infinite in half precision.
                right = tl.where(ok, right, 0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def gated_fusion_weights_kernel(
    e, w, hidden, expanded, grad_logits, grad_expanded, grad_hidden, slopes1, slopes2, partials,
    e_strides, w_strides, hidden_strides, expanded_strides, grad_logits_strides,
    grad_expanded_strides, grad_hidden_strides,
    channels, squeezed, size, pixels, tiles, parts, run, numbers,
    TRAINING: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Partials of grad_Wf (C, 2C), grad_W2 (C, C//4) and grad_W1 (C//4, C)."""
    wide_i, wide_o = tl.cdiv(channels, BLOCK_I), tl.cdiv(channels, BLOCK_O)
    narrow_i, narrow_o = tl.cdiv(squeezed, BLOCK_I), tl.cdiv(squeezed, BLOCK_O)
    of_s, of_m = wide_i * wide_o, 2 * wide_i * wide_o
    of_r = of_m + narrow_i * wide_o
    program = tl.program_id(0)
    every = of_r + wide_i * narrow_o
    tile = program % every
    first = program // every * run
    last = tl.minimum(first + run, parts)
    partials += tl.cast(program // every, tl.int64) * numbers
    lane_i, lane_o = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_O)
    if tile < of_s:
        row, column = tile % wide_i * BLOCK_I + lane_i, tile // wide_i * BLOCK_O + lane_o
        acc = weight_gradient(
            e, w, None, grad_logits, None, None, first, last, tiles, pixels, row, channels,
            column, channels, size, e_strides, w_strides, grad_logits_strides, None,
            False, TRAINING, WIDE, PRECISION, BLOCK_P, BLOCK_I, BLOCK_O,
        )  # fmt: skip
        ok = (row < channels)[:, None] & (column < channels)[None, :]
        tl.store(partials + column[None, :] * 2 * channels + row[:, None], acc, mask=ok)
    elif tile < of_m:
        tile -= of_s
        row, column = tile % wide_i * BLOCK_I + lane_i, tile // wide_i * BLOCK_O + lane_o
        acc = weight_gradient(
            expanded, None, slopes2 + 4 * channels, grad_logits, None, None, first, last, tiles,
            pixels, row, channels, column, channels, size, expanded_strides, None,
            grad_logits_strides, None,
            False, TRAINING, WIDE, PRECISION, BLOCK_P, BLOCK_I, BLOCK_O,
        )  # fmt: skip
        ok = (row < channels)[:, None] & (column < channels)[None, :]
        partials += channels
        tl.store(partials + column[None, :] * 2 * channels + row[:, None], acc, mask=ok)
    elif tile < of_r:
        tile -= of_m
        row, column = tile % narrow_i * BLOCK_I + lane_i, tile // narrow_i * BLOCK_O + lane_o
        acc = weight_gradient(
            hidden, None, slopes1 + 4 * squeezed, grad_expanded, expanded, slopes2, first, last,
            tiles, pixels, row, squeezed, column, channels, size, hidden_strides, None,
            grad_expanded_strides, expanded_strides,
            True, TRAINING, WIDE, PRECISION, BLOCK_P, BLOCK_I, BLOCK_O,
        )  # fmt: skip
        ok = (row < squeezed)[:, None] & (column < channels)[None, :]
        partials += 2 * channels * channels
        tl.store(partials + column[None, :] * squeezed + row[:, None], acc, mask=ok)
    else:
        tile -= of_r
        row, column = tile % wide_i * BLOCK_I + lane_i, tile // wide_i * BLOCK_O + lane_o
        acc = weight_gradient(
            e, w, None, grad_hidden, hidden, slopes1, first, last, tiles, pixels, row, channels,
            column, squeezed, size, e_strides, w_strides, grad_hidden_strides, hidden_strides,
            False, TRAINING, WIDE, PRECISION, BLOCK_P, BLOCK_I, BLOCK_O,
        )  # fmt: skip
        ok = (row < channels)[:, None] & (column < squeezed)[None, :]
        partials += channels * (2 * channels + squeezed)
        tl.store(partials + column[None, :] * channels + row[:, None], acc, mask=ok)


@triton.jit
def gated_fusion_reduce_kernel(
    partials, pieces_w, grad_fusion, grad_expand, grad_squeeze, grad_w, w_strides,
    runs, numbers, of_fusion, of_expand, pieces, gates, groups, pixels, programs,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds partials (runs, numbers) in `programs` programs, pieces_w (pieces, B·G·H·W) in others.

    There are none of the latter, and pieces_w is None, where grad_w is whole already.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    if program < programs:
        n = tl.cast(program, tl.int64) * BLOCK_N + lane
        for run in range(runs):
            at = partials + tl.cast(run, tl.int64) * numbers + n
            total += tl.load(at, mask=n < numbers, other=0.0)
        behind = of_fusion + of_expand
        tl.store(grad_fusion + n, total, mask=n < of_fusion)
        tl.store(grad_expand + n - of_fusion, total, mask=(n >= of_fusion) & (n < behind))
        tl.store(grad_squeeze + n - behind, total, mask=(n >= behind) & (n < numbers))
    else:
        if pieces_w is not None:
            n = tl.cast(program - programs, tl.int64) * BLOCK_N + lane
            for piece in range(pieces):
                at = pieces_w + tl.cast(piece, tl.int64) * gates + n
                total += tl.load(at, mask=n < gates, other=0.0)
            plane = n // pixels
            at = plane // groups * w_strides[0] + plane % groups * w_strides[1]
            tl.store(grad_w + at + n % pixels * w_strides[2], total, mask=n < gates)


# ---------------------------------------------------------------------------------------- launcher


class Operands(NamedTuple):
    """The maps from which the weights' gradients are made, and the slopes of norms 1 and 2."""

    hidden: torch.Tensor
    expanded: torch.Tensor
    grad_logits: torch.Tensor
    grad_expanded: torch.Tensor
    grad_hidden: torch.Tensor
    slopes1: torch.Tensor
    slopes2: torch.Tensor


def launch_weights(
    case: Case,
    operands: Operands,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grad_w: torch.Tensor,
    pieces_w: torch.Tensor | None,
    *,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (squeeze, expand, fusion), in their dtypes; adds pieces_w into grad_w."""
    config = configs.choose(gated_fusion_weights_kernel.__name__, case.e, case.total)
    tiles = launch.cdiv(case.pixels, config.blocks["BLOCK_P"])
    parts = case.batch * tiles
    (wide_i, wide_o), (narrow_i, narrow_o) = (
        [launch.cdiv(size, config.blocks[block]) for block in ("BLOCK_I", "BLOCK_O")]
        for size in (case.channels, case.squeezed)
    )
    every = 2 * wide_i * wide_o + narrow_i * wide_o + wide_i * narrow_o
    runs = max(1, min(launch.cdiv(_TARGET_PROGRAMS, every), parts // _LEAST_RUN))
    run = launch.cdiv(parts, runs)
    runs = launch.cdiv(parts, run)
    squeeze, expand, fusion = (weight.new_empty(weight.shape) for weight in weights)
    numbers = squeeze.numel() + expand.numel() + fusion.numel()
    partials = case.new_floats(runs, numbers)
    launch.launch(
        gated_fusion_weights_kernel,
        (runs * every,),
        *(case.e, case.w, *operands, partials, *case.strides),
        *map(launch.strides, operands[:5]),
        *(case.channels, case.squeezed, case.size, case.pixels, tiles, parts, run, numbers),
        config=config,
        scratch=(*Operands._fields[1:], "partials"),
        TRAINING=training,
        WIDE=case.wide,
        PRECISION=case.precision,
    )
    _reduce(case, partials, (squeeze, expand, fusion), grad_w, pieces_w)
    return squeeze, expand, fusion


def _reduce(
    case: Case,
    partials: torch.Tensor,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grad_w: torch.Tensor,
    pieces_w: torch.Tensor | None,
) -> None:
    squeeze, expand, fusion = gradients
    runs, numbers = partials.shape
    config = configs.choose(gated_fusion_reduce_kernel.__name__, case.e, case.total)
    programs = launch.cdiv(numbers, config.blocks["BLOCK_N"])
    pieces, gates = (0, 0) if pieces_w is None else (pieces_w.shape[0], grad_w.numel())
    launch.launch(
        gated_fusion_reduce_kernel,
        (programs + launch.cdiv(gates, config.blocks["BLOCK_N"]),),
        *(partials, pieces_w, fusion, expand, squeeze, grad_w, launch.strides(grad_w)),
        *(runs, numbers, fusion.numel(), expand.numel(), pieces, gates),
        *(grad_w.shape[1], case.pixels, programs),
        config=config,
        scratch=("partials", "pieces_w"),
    )
