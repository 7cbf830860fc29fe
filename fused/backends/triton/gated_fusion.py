"""Gated fusion (spec.md 2.4), forward: e, w → out = e ⊙ (w + φ (1 − w)), s = e ⊙ w never stored.

Evaluation is here, training in `gated_fusion_training`. Two launches (identity 5.3):
    fold    r = relu(scale1 ⊙ (W1∗s) + shift1); further programs of the same launch compute
            combined = (Wf_m·D2)·W2 and bias = Wf_m·shift2 from the weights, the latter as a part of
            affine3, norm 3's scale and shift
    gate    out, φ = σ(scale3 ⊙ (Wf_s∗s + combined·r + bias) + shift3); or its sums (identity 5.6)
Layouts: maps NCHW or channels_last by strides, w spread over the c channels of its group on load.
Programs of a product: (pixel tile of a sample, channel tile), see `gated_fusion_products`.
Bytes: 3.5 passes over the map (e twice, r out and in, out), weights and combined.
Precision: products in the map's dtype, sums, norms, σ in float32; s, r and combined are rounded to
the map's dtype. Recomputed: s, by the second launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs, launch
from .gated_fusion_case import Case, Norm, matrix_strides
from .gated_fusion_products import (
    add_gated_product,
    add_product,
    load_gates,
    load_tile,
    load_vector,
    norm_affine,
    place,
    store_tile,
)
from .gated_fusion_training import forward_saving

# -------------------------------------------------------------------------------------- evaluation


@triton.jit
def gated_fusion_fold_kernel(
    e, w, squeeze_weight, mean1, var1, weight1, bias1, expand_weight, mean2, var2, weight2, bias2,
    fusion_weight, mean3, var3, weight3, bias3, r, combined, affine3,
    e_strides, w_strides, squeeze_strides, expand_strides, fusion_strides, r_strides,
    channels, squeezed, size, pixels, tiles, column_tiles, products, folds, eps1, eps2, eps3,
    ONE_GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`products` programs of r, `folds` of combined (C, C//4), the others of affine3 (2, C)."""
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
        known = row < channels
        scale, shift = norm_affine(
            load_vector(mean3, row, known), load_vector(var3, row, known),
            load_vector(weight3, row, known), load_vector(bias3, row, known), eps3,
        )  # fmt: skip
        tl.store(affine3 + row, scale, mask=known)
        tl.store(affine3 + channels + row, shift + tl.sum(total, axis=1) * scale, mask=known)


@triton.jit
def gated_fusion_gate_kernel(
    e, w, r, combined, affine3, fusion_weight, out, sums,
    e_strides, w_strides, r_strides, fusion_strides, out_strides,
    channels, squeezed, size, pixels, tiles, column_tiles,
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
    scale = load_vector(affine3, column, known)
    shift = load_vector(affine3 + channels, column, known)
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


def _fold(
    case: Case, squeeze: torch.Tensor, expand: torch.Tensor, fusion: torch.Tensor, norms: list[Norm]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """r (B, C//4, H, W), combined (C, C//4) in the map's dtype, affine3 (2, C)."""
    vectors = [(norm.mean, norm.var, norm.weight, norm.bias) for norm in norms]
    tiling = case.tiling(gated_fusion_fold_kernel, case.squeezed)
    r = case.new_map(case.squeezed)
    combined = case.e.new_empty(case.channels, case.squeezed)
    affine3 = case.new_floats(2, case.channels)
    row_tiles = launch.cdiv(case.channels, tiling.block_p)
    (products,) = tiling.grid
    folds = row_tiles * tiling.column_tiles
    launch.launch(
        gated_fusion_fold_kernel,
        (products + folds + row_tiles,),
        *(case.e, case.w, squeeze, *vectors[0], expand, *vectors[1], fusion, *vectors[2]),
        *(r, combined, affine3),
        *(*case.strides, *map(matrix_strides, (squeeze, expand, fusion)), launch.strides(r)),
        *(case.channels, case.squeezed, case.size, case.pixels, tiling.tiles, tiling.column_tiles),
        *(products, folds, *(norm.eps for norm in norms)),
        config=tiling.config,
        scratch=("r", "combined", "affine3"),
        ONE_GROUP=case.one_group(tiling),
        WIDE=case.wide,
        PRECISION=case.precision,
    )
    return r, combined, affine3


def _evaluate(
    case: Case,
    squeeze: torch.Tensor,
    expand: torch.Tensor,
    fusion: torch.Tensor,
    norms: list[Norm],
    *,
    mean: bool,
) -> torch.Tensor:
    """Out, or with `mean` its means over H×W (B, C) in float32."""
    r, combined, affine3 = _fold(case, squeeze, expand, fusion, norms)
    tiling = case.tiling(gated_fusion_gate_kernel, case.channels)
    out = None if mean else case.new_map(case.channels)
    sums = case.new_floats(tiling.parts, case.channels) if mean else None
    launch.launch(
        gated_fusion_gate_kernel,
        tiling.grid,
        *(case.e, case.w, r, combined, affine3, fusion, out, sums),
        *(*case.strides, launch.strides(r), matrix_strides(fusion)),
        (0, 0, 0) if out is None else launch.strides(out),
        *(case.channels, case.squeezed, case.size, case.pixels, tiling.tiles, tiling.column_tiles),
        config=tiling.config,
        scratch=("r", "combined", "affine3", "sums"),
        ONE_GROUP=case.one_group(tiling),
        WIDE=case.wide,
        PRECISION=case.precision,
    )
    if out is not None:
        return out
    means = case.new_floats(case.batch, case.channels)
    config = configs.choose(gated_fusion_mean_kernel.__name__, case.e, case.total)
    blocks = launch.cdiv(case.channels, config.blocks["BLOCK_C"])
    launch.launch(
        gated_fusion_mean_kernel,
        (case.batch * blocks,),
        *(sums, means, case.channels, case.pixels, tiling.tiles, blocks),
        config=config,
        scratch=("sums",),
    )
    return means


def forward(
    e: torch.Tensor,
    w: torch.Tensor,
    squeeze_weight: torch.Tensor,
    bn1_weight: torch.Tensor,
    bn1_bias: torch.Tensor,
    running_mean1: torch.Tensor | None,
    running_var1: torch.Tensor | None,
    expand_weight: torch.Tensor,
    bn2_weight: torch.Tensor,
    bn2_bias: torch.Tensor,
    running_mean2: torch.Tensor | None,
    running_var2: torch.Tensor | None,
    fusion_weight: torch.Tensor,
    bn3_weight: torch.Tensor,
    bn3_bias: torch.Tensor,
    running_mean3: torch.Tensor | None,
    running_var3: torch.Tensor | None,
    training: bool,
    eps1: float,
    eps2: float,
    eps3: float,
    save: bool,
) -> tuple[torch.Tensor, ...]:
    """Return out, the maps kept for the backward, and the batch statistics of the three norms.

    The kept maps are W1∗s (B, C//4, H, W) and Wf∗[s; M] (B, C, H, W) in e's dtype, or (0,) without
    `save`; the statistics are (0,) in evaluation.
    """
    case = Case(e, w)
    weights = (squeeze_weight, expand_weight, fusion_weight)
    running = (
        *((running_mean1, running_var1), (running_mean2, running_var2)),
        (running_mean3, running_var3),
    )
    statistics = ((None, None),) * 3 if training else running
    norms = [
        case.norm(bn1_weight, bn1_bias, *statistics[0], eps1),
        case.norm(bn2_weight, bn2_bias, *statistics[1], eps2),
        case.norm(bn3_weight, bn3_bias, *statistics[2], eps3),
    ]
    if not training and not save:
        out = _evaluate(case, *weights, norms, mean=False)
        return (out, *(e.new_empty(0) for _ in range(2)), *(case.new_floats(0) for _ in range(6)))
    out, hidden, logits = forward_saving(case, *weights, norms, training=training)
    kept = (hidden, logits) if save else (e.new_empty(0), e.new_empty(0))
    if not training:
        return (out, *kept, *(case.new_floats(0) for _ in range(6)))
    return (out, *kept, *(vector for norm in norms for vector in (norm.mean, norm.var)))


def forward_mean(
    e: torch.Tensor,
    w: torch.Tensor,
    squeeze_weight: torch.Tensor,
    bn1_weight: torch.Tensor,
    bn1_bias: torch.Tensor,
    running_mean1: torch.Tensor,
    running_var1: torch.Tensor,
    expand_weight: torch.Tensor,
    bn2_weight: torch.Tensor,
    bn2_bias: torch.Tensor,
    running_mean2: torch.Tensor,
    running_var2: torch.Tensor,
    fusion_weight: torch.Tensor,
    bn3_weight: torch.Tensor,
    bn3_bias: torch.Tensor,
    running_mean3: torch.Tensor,
    running_var3: torch.Tensor,
    eps1: float,
    eps2: float,
    eps3: float,
) -> torch.Tensor:
    """Means over H×W of evaluation's out, (B, C) float32; the map is never written (5.6)."""
    norms = [
        Norm(bn1_weight, bn1_bias, running_mean1, running_var1, eps1),
        Norm(bn2_weight, bn2_bias, running_mean2, running_var2, eps2),
        Norm(bn3_weight, bn3_bias, running_mean3, running_var3, eps3),
    ]
    weights = (squeeze_weight, expand_weight, fusion_weight)
    return _evaluate(Case(e, w), *weights, norms, mean=True)
