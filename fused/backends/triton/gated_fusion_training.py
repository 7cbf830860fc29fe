"""Gated fusion (spec.md 2.4), forward in training, and in evaluation that keeps maps for backward.

    hidden = W1∗s      expanded = W2∗relu(BN1(hidden))      logits = Wf_s∗s + Wf_m∗BN2(expanded)
    out = e ⊙ (w + φ (1 − w)), φ = σ(BN3(logits)), s = e ⊙ w, which is never stored

Six launches: hidden, norm 1, expand, norm 2, logits, out. A product leaves the moments of its
tiles; `norm` merges them to statistics and to the scale and shift that the next product applies on
load; `out` merges those of norm 3 itself. Frozen norms take the same way without moments. Under
autocast, where the weights are float32, norm 1's launch also rounds those of the later products.
Layouts: maps NCHW or channels_last by strides, w spread over the c channels of its group on load.
Programs: of a product (pixel tile of a sample, channel tile), see `gated_fusion_products`; of norm
a channel block; of out (run of pixel tiles, channel block).
Bytes: 8.5 passes over the map (e thrice; hidden, expanded, logits out and in; out) and moments.
Precision: products in the map's dtype, sums, statistics, norms, σ in float32; s, hidden,
relu(BN1), expanded, BN2 and logits are rounded to the map's dtype. Recomputed: s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs, launch
from .gated_fusion_case import Case, Norm, Packed, Tiling, matrix_strides
from .gated_fusion_products import (
    add_gated_product,
    add_product,
    batch_statistics,
    load_gates,
    load_tile,
    load_vector,
    norm_affine,
    packed_numbers,
    place,
    store_tile,
    store_with_moments,
)

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
    moments, mean, var, weight, bias, affine, expand, fusion, packed,
    channels, parts, tiles, pixels, eps, blocks, of_expand, of_fusion,
    TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scale and shift (2, C) of a norm; with moments also mean and var, else from them.

    Programs: `blocks` channel blocks; others pack the weights of the products to come.
    """
    program = tl.program_id(0)
    if program < blocks:
        channel = program * BLOCK_C + tl.arange(0, BLOCK_C)
        known = channel < channels
        if moments is not None:
            average, variance = batch_statistics(
                moments, channel, known, channels, parts, tiles, pixels, TILE, BLOCK_ROWS, BLOCK_C
            )
            tl.store(mean + channel, average, mask=known)
            tl.store(var + channel, variance, mask=known)
        else:
            average, variance = load_vector(mean, channel, known), load_vector(var, channel, known)
        factor, summand = load_vector(weight, channel, known), load_vector(bias, channel, known)
        scale, shift = norm_affine(average, variance, factor, summand, eps)
        tl.store(affine + channel, scale, mask=known)
        tl.store(affine + channels + channel, shift, mask=known)
    else:
        if packed is not None:
            n = (program - blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
            value = packed_numbers(expand, n, 0, of_expand)
            value += packed_numbers(fusion, n, of_expand, of_fusion)
            tl.store(packed + n, value.to(packed.dtype.element_ty), mask=n < of_expand + of_fusion)


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


# --------------------------------------------------------------------------------------- expansion


@triton.jit
def gated_fusion_expand_kernel(
    hidden, affine1, weight, expanded, moments, hidden_strides, weight_strides, expanded_strides,
    squeezed, channels, pixels, tiles, column_tiles,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W2 ∗ relu(BN1(hidden)), (B, C, H, W); program (part, channel tile)."""
    program = tl.program_id(0)
    part = program // column_tiles
    sample, pixel, inside = place(part, tiles, pixels, BLOCK_P)
    column = program % column_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    known = column < channels
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    acc = add_product(
        acc, hidden, weight, affine1, sample, pixel, inside, column, known, squeezed,
        hidden_strides, weight_strides, True, BLOCK_K, WIDE, PRECISION,
    )  # fmt: skip
    store_with_moments(
        acc, expanded, moments, part, sample, pixel, inside, column, known, channels,
        expanded_strides, WIDE,
    )  # fmt: skip


# --------------------------------------------------------------------------------------- launchers


def launch_expand(
    case: Case,
    hidden: torch.Tensor,
    affine1: torch.Tensor,
    weight: torch.Tensor,
    *,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Tiling]:
    """The expanded map, with `statistics` its moments, and the tiles that these belong to."""
    tiling = case.tiling(gated_fusion_expand_kernel, case.channels)
    expanded = case.new_map(case.channels)
    moments = case.new_floats(tiling.parts, 2, case.channels) if statistics else None
    launch.launch(
        gated_fusion_expand_kernel,
        tiling.grid,
        *(hidden, affine1, weight, expanded, moments),
        *(launch.strides(hidden), matrix_strides(weight), launch.strides(expanded)),
        *(case.squeezed, case.channels, case.pixels, tiling.tiles, tiling.column_tiles),
        config=tiling.config,
        scratch=("affine1", "expanded", "moments"),
        WIDE=case.wide,
        PRECISION=case.precision,
    )
    return expanded, moments, tiling


def _launch_norm(
    case: Case,
    norm: Norm,
    moments: torch.Tensor | None,
    tiling: Tiling,
    packed: Packed | None = None,
) -> torch.Tensor:
    """Scale and shift (2, C) of a norm; fills its mean and var from moments if there are any."""
    (channels,) = norm.weight.shape
    affine = case.new_floats(2, channels)
    config = configs.choose(gated_fusion_norm_kernel.__name__, case.e, case.total)
    blocks = launch.cdiv(channels, config.blocks["BLOCK_C"])
    numbers = None if packed is None else packed.numbers
    sources = (None, None) if packed is None or numbers is None else packed.sources
    launch.launch(
        gated_fusion_norm_kernel,
        (blocks + (0 if packed is None else packed.programs(config)),),
        *(moments, norm.mean, norm.var, norm.weight, norm.bias, affine, *sources, numbers),
        *(channels, tiling.parts, tiling.tiles, case.pixels, norm.eps, blocks),
        *((0, 0) if packed is None else packed.sizes),
        config=config,
        scratch=("moments", "affine", "packed"),
        TILE=tiling.block_p,
    )
    return affine


def _launch_hidden(
    case: Case, weight: torch.Tensor, *, statistics: bool
) -> tuple[torch.Tensor, torch.Tensor | None, Tiling]:
    tiling = case.tiling(gated_fusion_hidden_kernel, case.squeezed)
    hidden = case.new_map(case.squeezed)
    moments = case.new_floats(tiling.parts, 2, case.squeezed) if statistics else None
    launch.launch(
        gated_fusion_hidden_kernel,
        tiling.grid,
        *(case.e, case.w, weight, hidden, moments),
        *(*case.strides, matrix_strides(weight), launch.strides(hidden)),
        *(case.channels, case.squeezed, case.size, case.pixels, tiling.tiles, tiling.column_tiles),
        config=tiling.config,
        scratch=("moments",),
        ONE_GROUP=case.one_group(tiling),
        WIDE=case.wide,
        PRECISION=case.precision,
    )
    return hidden, moments, tiling


def _launch_logits(
    case: Case,
    expanded: torch.Tensor,
    affine2: torch.Tensor,
    weight: torch.Tensor,
    *,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Tiling]:
    tiling = case.tiling(gated_fusion_logits_kernel, case.channels)
    logits = case.new_map(case.channels)
    moments = case.new_floats(tiling.parts, 2, case.channels) if statistics else None
    strides = (*case.strides, *map(launch.strides, (expanded,)), matrix_strides(weight))
    launch.launch(
        gated_fusion_logits_kernel,
        tiling.grid,
        *(case.e, case.w, expanded, affine2, weight, logits, moments),
        *(*strides, launch.strides(logits)),
        *(case.channels, case.size, case.pixels, tiling.tiles, tiling.column_tiles),
        config=tiling.config,
        scratch=("expanded", "affine2", "moments"),
        ONE_GROUP=case.one_group(tiling),
        WIDE=case.wide,
        PRECISION=case.precision,
    )
    return logits, moments, tiling


def forward_saving(
    case: Case,
    squeeze: torch.Tensor,
    expand: torch.Tensor,
    fusion: torch.Tensor,
    norms: list[Norm],
    *,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Out, hidden and logits; in training the norms' mean and var are written."""
    norm1, norm2, norm3 = norms
    hidden, moments, tiling = _launch_hidden(case, squeeze, statistics=training)
    packed = case.packed(expand, fusion)
    expand, fusion = packed.weights
    affine = _launch_norm(case, norm1, moments, tiling, packed)
    expanded, moments, tiling = launch_expand(case, hidden, affine, expand, statistics=training)
    affine = _launch_norm(case, norm2, moments, tiling)
    logits, moments, tiling = _launch_logits(case, expanded, affine, fusion, statistics=training)
    out, spans = case.new_map(case.channels), case.spans(gated_fusion_out_kernel)
    launch.launch(
        gated_fusion_out_kernel,
        spans.grid,
        *(case.e, case.w, logits, moments, norm3.mean, norm3.var, norm3.weight, norm3.bias, out),
        *(*case.strides, launch.strides(logits), launch.strides(out)),
        *(case.channels, case.size, case.pixels, spans.tiles, spans.parts, spans.run, spans.blocks),
        *(tiling.tiles, tiling.parts, norm3.eps),
        config=spans.config,
        scratch=("moments",),
        TILE=tiling.block_p,
        WIDE=case.wide,
    )
    return out, hidden, logits
