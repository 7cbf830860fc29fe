"""Gated fusion (spec.md 2.4), forward: e, w → out = e ⊙ (w + φ (1 − w)), s = e ⊙ w never stored.

Layouts: maps NCHW or channels_last by strides, w spread over the c channels of its group on load.
Products' programs: (pixel tile of a sample, channel tile), see `gated_fusion_products`.

Evaluation, 2 launches (identity 5.3), 3.5 passes over the map (e twice, r out and in, out):
    fold    r = relu(scale1 ⊙ (W1∗s) + shift1); further programs of the same launch compute
            combined = (Wf_m·D2)·W2 and bias = Wf_m·shift2 from the weights
    gate    out, φ = σ(scale3 ⊙ (Wf_s∗s + combined·r + bias) + shift3); or its sums (identity 5.6)
Training, 6 launches, 8.5 passes (e thrice; hidden, expanded and logits out and in; out):
    hidden → norm 1 → expand → norm 2 → logits → out
    hidden = W1∗s, expanded = W2∗relu(BN1(hidden)), logits = Wf_s∗s + Wf_m∗BN2(expanded); each
    leaves moments of its tiles, `norm` merges them to statistics, `out` does so itself for norm 3.
    Frozen norms (evaluation that saves) take the same way without moments.
Precision: products in the map's dtype, sums, statistics, norms, σ in float32. r, hidden, expanded
and logits are rounded to the map's dtype, so are combined and s. Recomputed: s, in every launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import configs, launch
from .gated_fusion_products import (
    Case,
    add_gated_product,
    add_product,
    batch_statistics,
    gated_fusion_expand_kernel,
    load_gates,
    load_tile,
    load_vector,
    matrix_strides,
    norm_affine,
    place,
    store_tile,
    store_with_moments,
)

# -------------------------------------------------------------------------------------- evaluation


@triton.jit
def gated_fusion_fold_kernel(
    e, w, squeeze_weight, mean1, var1, weight1, bias1, expand_weight, mean2, var2, weight2, bias2,
    fusion_weight, r, combined, bias, e_strides, w_strides, squeeze_strides, expand_strides,
    fusion_strides, r_strides, channels, squeezed, size, pixels, tiles, column_tiles, products,
    folds, eps1, eps2,
    ONE_GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`products` programs of r, `folds` of combined (C, C//4), the others of bias (C,)."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK_K)
    of_m = fusion_weight + channels * fusion_strides[0]
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    if program < products:
        part = program // column_tiles
        sample, pixel, inside = place(part, tiles, pixels, BLOCK_P)
        column = program % column_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
        known = column < squeezed
        acc = add_gated_product(
            acc, e, w, squeeze_weight, sample, pixel, inside, column, known, channels, size,
            e_strides, w_strides, squeeze_strides, BLOCK_K, ONE_GROUP, WIDE, PRECISION,
        )  # fmt: skip
        scale, shift = norm_affine(
            load_vector(mean1, column, known), load_vector(var1, column, known),
            load_vector(weight1, column, known), load_vector(bias1, column, known), eps1,
        )  # fmt: skip
        value = acc * scale[None, :] + shift[None, :]
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        ok = inside[:, None] & known[None, :]
        store_tile(r, value, sample, pixel, column, ok, r_strides, WIDE)
    elif program < products + folds:
        tile = program - products
        row = tile // column_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        column = tile % column_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
        for k in range(0, channels, BLOCK_K):
            some = k + lane < channels
            scale, _ = norm_affine(
                0.0, load_vector(var2, k + lane, some), load_vector(weight2, k + lane, some), 0.0,
                eps2,
            )  # fmt: skip
            at = row[:, None] * fusion_strides[1] + (k + lane)[None, :] * fusion_strides[0]
            left = tl.load(of_m + at, mask=(row < channels)[:, None] & some[None, :], other=0.0)
            left = (left.to(tl.float32) * scale[None, :]).to(r.dtype.element_ty)
            at = (k + lane)[:, None] * expand_strides[1] + column[None, :] * expand_strides[0]
            ok = some[:, None] & (column < squeezed)[None, :]
            right = tl.load(expand_weight + at, mask=ok, other=0.0).to(left.dtype)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        ok = (row < channels)[:, None] & (column < squeezed)[None, :]
        at = row[:, None] * squeezed + column[None, :]
        tl.store(combined + at, acc.to(combined.dtype.element_ty), mask=ok)
    else:
        row = (program - products - folds) * BLOCK_P + tl.arange(0, BLOCK_P)
        total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
        for k in range(0, channels, BLOCK_K):
            some = k + lane < channels
            _, shift = norm_affine(
                load_vector(mean2, k + lane, some), load_vector(var2, k + lane, some),
                load_vector(weight2, k + lane, some), load_vector(bias2, k + lane, some), eps2,
            )  # fmt: skip
            at = row[:, None] * fusion_strides[1] + (k + lane)[None, :] * fusion_strides[0]
            left = tl.load(of_m + at, mask=(row < channels)[:, None] & some[None, :], other=0.0)
            total += left.to(tl.float32) * shift[None, :]
        tl.store(bias + row, tl.sum(total, axis=1), mask=row < channels)


@triton.jit
def gated_fusion_gate_kernel(
    e, w, r, combined, bias, fusion_weight, mean3, var3, weight3, bias3, out, sums,
    e_strides, w_strides, r_strides, fusion_strides, out_strides,
    channels, squeezed, size, pixels, tiles, column_tiles, eps3,
    ONE_GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Either out, or the sums (parts, C) of its tiles; the other is None."""
    program = tl.program_id(0)
    part = program // column_tiles
    sample, pixel, inside = place(part, tiles, pixels, BLOCK_P)
    column = program % column_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    known = column < channels
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    acc = add_gated_product(
        acc, e, w, fusion_weight, sample, pixel, inside, column, known, channels, size,
        e_strides, w_strides, fusion_strides, BLOCK_K, ONE_GROUP, WIDE, PRECISION,
    )  # fmt: skip
    acc = add_product(
        acc, r, combined, None, sample, pixel, inside, column, known, squeezed,
        r_strides, (1, squeezed), False, BLOCK_K, WIDE, PRECISION,
    )  # fmt: skip
    scale, shift = norm_affine(
        load_vector(mean3, column, known), load_vector(var3, column, known),
        load_vector(weight3, column, known), load_vector(bias3, column, known), eps3,
    )  # fmt: skip
    shift += load_vector(bias, column, known) * scale
    phi = tl.sigmoid(acc * scale[None, :] + shift[None, :])
    ok = inside[:, None] & known[None, :]
    gate = load_gates(w, sample, pixel, column, ok, size, w_strides, WIDE)
    value = load_tile(e, sample, pixel, column, ok, e_strides, WIDE) * (gate + phi * (1 - gate))
    if sums is None:
        store_tile(out, value, sample, pixel, column, ok, out_strides, WIDE)
    else:
        row = sums + tl.cast(part, tl.int64) * channels + column
        tl.store(row, tl.sum(tl.where(ok, value, 0.0), axis=0), mask=known)


@triton.jit
def gated_fusion_mean_kernel(
    sums, means, channels, pixels, tiles, blocks, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Means (B, C) from the sums of every sample's tiles; program (sample, channel block)."""
    program = tl.program_id(0)
    sample = tl.cast(program // blocks, tl.int64)
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for start in range(0, tiles, BLOCK_ROWS):
        tile = start + tl.arange(0, BLOCK_ROWS)
        ok = (tile < tiles)[:, None] & (channel < channels)[None, :]
        row = sums + (sample * tiles + tile)[:, None] * channels
        total += tl.load(row + channel[None, :], mask=ok, other=0.0)
    mean = tl.sum(total, axis=0) / pixels
    tl.store(means + sample * channels + channel, mean, mask=channel < channels)


# ---------------------------------------------------------------------------------------- training


@triton.jit
def gated_fusion_hidden_kernel(
    e, w, weight, hidden, moments, e_strides, w_strides, weight_strides, hidden_strides,
    channels, squeezed, size, pixels, tiles, column_tiles,
    ONE_GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W1 ∗ s, (B, C//4, H, W); program (part, channel tile)."""
    program = tl.program_id(0)
    part = program // column_tiles
    sample, pixel, inside = place(part, tiles, pixels, BLOCK_P)
    column = program % column_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    known = column < squeezed
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    acc = add_gated_product(
        acc, e, w, weight, sample, pixel, inside, column, known, channels, size,
        e_strides, w_strides, weight_strides, BLOCK_K, ONE_GROUP, WIDE, PRECISION,
    )  # fmt: skip
    store_with_moments(
        acc, hidden, moments, part, sample, pixel, inside, column, known, squeezed,
        hidden_strides, WIDE,
    )  # fmt: skip


@triton.jit
def gated_fusion_norm_kernel(
    moments, mean, var, weight, bias, affine, channels, parts, tiles, pixels, eps,
    TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Scale and shift (2, C) of a norm; with moments also mean and var, else from them."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    if moments is not None:
        average, variance = batch_statistics(
            moments, channel, known, channels, parts, tiles, pixels, TILE, BLOCK_ROWS, BLOCK_C
        )
        tl.store(mean + channel, average, mask=known)
        tl.store(var + channel, variance, mask=known)
    else:
        average, variance = load_vector(mean, channel, known), load_vector(var, channel, known)
    scale, shift = norm_affine(
        average, variance, load_vector(weight, channel, known), load_vector(bias, channel, known),
        eps,
    )  # fmt: skip
    tl.store(affine + channel, scale, mask=known)
    tl.store(affine + channels + channel, shift, mask=known)


@triton.jit
def gated_fusion_logits_kernel(
    e, w, expanded, affine2, weight, logits, moments,
    e_strides, w_strides, expanded_strides, weight_strides, logits_strides,
    channels, size, pixels, tiles, column_tiles,
    ONE_GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Wf ∗ [s ; BN2(expanded)], (B, C, H, W); program (part, channel tile)."""
    program = tl.program_id(0)
    part = program // column_tiles
    sample, pixel, inside = place(part, tiles, pixels, BLOCK_P)
    column = program % column_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    known = column < channels
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    acc = add_gated_product(
        acc, e, w, weight, sample, pixel, inside, column, known, channels, size,
        e_strides, w_strides, weight_strides, BLOCK_K, ONE_GROUP, WIDE, PRECISION,
    )  # fmt: skip
    acc = add_product(
        acc, expanded, weight + channels * weight_strides[0], affine2, sample, pixel, inside,
        column, known, channels, expanded_strides, weight_strides, False, BLOCK_K, WIDE, PRECISION,
    )  # fmt: skip
    store_with_moments(
        acc, logits, moments, part, sample, pixel, inside, column, known, channels,
        logits_strides, WIDE,
    )  # fmt: skip


@triton.jit
def gated_fusion_out_kernel(
    e, w, logits, moments, mean, var, weight, bias, out,
    e_strides, w_strides, logits_strides, out_strides,
    channels, size, pixels, tiles, parts, run, blocks, moment_tiles, moment_parts, eps,
    TILE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """e ⊙ (w + φ (1 − w)); program (run of parts, channel block) merges its channels' moments.

    The programs of the first run store mean and var; without moments all read them.
    """
    program = tl.program_id(0)
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    first = program // blocks * run
    if moments is not None:
        average, variance = batch_statistics(
            moments, channel, known, channels, moment_parts, moment_tiles, pixels,
            TILE, BLOCK_ROWS, BLOCK_C,
        )  # fmt: skip
        tl.store(mean + channel, average, mask=known & (first == 0))
        tl.store(var + channel, variance, mask=known & (first == 0))
    else:
        average, variance = load_vector(mean, channel, known), load_vector(var, channel, known)
    scale, shift = norm_affine(
        average, variance, load_vector(weight, channel, known), load_vector(bias, channel, known),
        eps,
    )  # fmt: skip
    for part in range(first, tl.minimum(first + run, parts)):
        sample, pixel, inside = place(part, tiles, pixels, BLOCK_P)
        ok = inside[:, None] & known[None, :]
        value = load_tile(logits, sample, pixel, channel, ok, logits_strides, WIDE)
        phi = tl.sigmoid(value * scale[None, :] + shift[None, :])
        gate = load_gates(w, sample, pixel, channel, ok, size, w_strides, WIDE)
        value = load_tile(e, sample, pixel, channel, ok, e_strides, WIDE)
        value *= gate + phi * (1 - gate)
        store_tile(out, value, sample, pixel, channel, ok, out_strides, WIDE)


# ---------------------------------------------------------------------------------------- launcher


class Norm(NamedTuple):
    """One batch norm; mean and var are running statistics in evaluation, outputs in training."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    eps: float


def _fold(
    case: Case, squeeze: torch.Tensor, expand: torch.Tensor, fusion: torch.Tensor, norms: list[Norm]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """r (B, C//4, H, W), combined (C, C//4) in the map's dtype, bias (C,)."""
    norm1, norm2, _ = norms
    tiling = case.tiling(gated_fusion_fold_kernel, case.squeezed)
    r = case.new_map(case.squeezed)
    combined = case.e.new_empty(case.channels, case.squeezed)
    bias = case.new_floats(case.channels)
    row_tiles = launch.cdiv(case.channels, tiling.block_p)
    (products,) = tiling.grid
    folds = row_tiles * tiling.column_tiles
    launch.launch(
        gated_fusion_fold_kernel,
        (products + folds + row_tiles,),
        *(case.e, case.w, squeeze, norm1.mean, norm1.var, norm1.weight, norm1.bias),
        *(expand, norm2.mean, norm2.var, norm2.weight, norm2.bias, fusion, r, combined, bias),
        *(*case.strides, *map(matrix_strides, (squeeze, expand, fusion)), launch.strides(r)),
        *(case.channels, case.squeezed, case.size, case.pixels, tiling.tiles, tiling.column_tiles),
        *(products, folds, norm1.eps, norm2.eps),
        config=tiling.config,
        scratch=("r", "combined", "bias"),
        ONE_GROUP=case.one_group(tiling),
        WIDE=case.wide,
        PRECISION=case.precision,
    )
    return r, combined, bias
