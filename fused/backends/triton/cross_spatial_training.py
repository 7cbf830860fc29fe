"""Kernels of cross_spatial where the norms' statistics come from the batch: three passes.

features  one program a (branch, slab): f = [k1∗X; k3∗X; k5∗X] to scratch, moments of Wa ∗ f, Σ X.
reduce    merges the moments over the samples of its (branch, group), or over all slabs when pooled,
          in its prologue; R = Wr ∗ (A ⊙ f) to scratch, moments of R.
gate      merges the moments of R; mean over H×W of y from those of R and X (identity 5.4); softmax;
          w at its pixels from dot products of R and X with vectors fixed per group.
Sums, moments and logits are float32; scratch and operands of products have e's dtype. A row of
partial results belongs to (branch, slab) = branch·slabs + slab.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_spatial_tiles import (
    TILE_CHANNEL_FEAT,
    attention_logits,
    conv3x3_tile,
    copy_and_normalise,
    features_tile,
    folded,
    hidden_zero,
    load_tile,
    merge_rows,
    merge_two,
    reduced_tile,
    softmax,
    store_tile,
    tile_moments,
    vector,
    weight_tile,
)


@triton.jit
def cross_spatial_branches_kernel(
    e, sheets, packed, alpha_h, alpha_w, mean, rstd, gn_weight, gn_bias, conv3x3_bias,
    slabs, G, H, W, c, stride_b, stride_c, stride_p,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x1, x2 and a copy of e as sheets (3, slabs, H·W, BLOCK_C); one program a slab."""
    slab = tl.program_id(0).to(tl.int64)
    P = H * W
    sample, group = slab // G, slab % G
    source = e + sample * stride_b + group * c * stride_c
    size = P * BLOCK_C
    x1 = sheets + slab * size
    x2 = sheets + (slabs + slab) * size
    copy = sheets + (2 * slabs + slab) * size
    at = slab * c
    scale = vector(rstd + at, c, BLOCK_C, 0.0) * vector(gn_weight, c, BLOCK_C, 0.0)
    centre, shift = vector(mean + at, c, BLOCK_C, 0.0), vector(gn_bias, c, BLOCK_C, 0.0)
    for start in range(0, P, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        copy_and_normalise(
            source, copy, x1, alpha_h + at * H, alpha_w + at * W, centre, scale, shift,
            pixel, pixel < P, H, W, c, stride_c, stride_p, BLOCK_C,
        )  # fmt: skip
    tl.debug_barrier()  # other threads of this program read the copy
    bias = vector(conv3x3_bias, c, BLOCK_C, 0.0)
    for start in range(0, P, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        zero = hidden_zero(start)
        x = conv3x3_tile(copy, packed, bias, pixel, 0, H, W, zero, BLOCK_C, BLOCK_P, PRECISION)
        store_tile(x2, pixel, pixel < P, x, BLOCK_C)


@triton.jit
def cross_spatial_features_kernel(
    sheets, features, packed, moments, sums, slabs, H, W, c,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """f to features (2·slabs, 3, H·W, BLOCK_C), moments (2·slabs, 2, 3c), Σ X to sums (…, c)."""
    row = tl.program_id(0).to(tl.int64)
    P = H * W
    size = P * BLOCK_C
    x, out = sheets + row * size, features + row * 3 * size
    channel = tl.arange(0, BLOCK_C)
    none = tl.zeros((BLOCK_C,), tl.float32)
    mean1, mean3, mean5, m2_1, m2_3, m2_5, total = none, none, none, none, none, none, none
    count = 0.0
    for start in range(0, P, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        zero = hidden_zero(start)
        tiles = packed + zero * (BLOCK_C * BLOCK_C)
        inside = pixel < P
        part = tl.sum(inside.to(tl.float32), axis=0)
        f1, f3, f5 = features_tile(x, tiles, pixel, 0, H, W, zero, BLOCK_C, BLOCK_P, PRECISION)
        store_tile(out, pixel, inside, f1, BLOCK_C)
        store_tile(out + size, pixel, inside, f3, BLOCK_C)
        store_tile(out + 2 * size, pixel, inside, f5, BLOCK_C)
        logits = attention_logits(f1, f3, f5, tiles, 0, BLOCK_C, PRECISION)
        mean_b, m2_b = tile_moments(logits, inside, part)
        mean1, m2_1, _ = merge_two(mean1, m2_1, count, mean_b, m2_b, part)
        logits = attention_logits(f1, f3, f5, tiles, 1, BLOCK_C, PRECISION)
        mean_b, m2_b = tile_moments(logits, inside, part)
        mean3, m2_3, _ = merge_two(mean3, m2_3, count, mean_b, m2_b, part)
        logits = attention_logits(f1, f3, f5, tiles, 2, BLOCK_C, PRECISION)
        mean_b, m2_b = tile_moments(logits, inside, part)
        mean5, m2_5, count = merge_two(mean5, m2_5, count, mean_b, m2_b, part)
        total += tl.sum(load_tile(x, pixel, inside, BLOCK_C).to(tl.float32), axis=0)
    ok = channel < c
    at = moments + row * 6 * c + channel
    tl.store(at, mean1, mask=ok)
    tl.store(at + c, mean3, mask=ok)
    tl.store(at + 2 * c, mean5, mask=ok)
    tl.store(at + 3 * c, m2_1, mask=ok)
    tl.store(at + 4 * c, m2_3, mask=ok)
    tl.store(at + 5 * c, m2_5, mask=ok)
    tl.store(sums + row * c + channel, total, mask=ok)


@triton.jit
def _attention_norm(
    moments, weight, bias, out_mean, out_var, first, step, rows, P, c, eps, writes, set_row,
    K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Scale and shift of features K from merged moments; `writes`: store the statistics too."""
    mean_rows = moments + K * c
    count = P * 1.0
    mean, var = merge_rows(
        mean_rows, mean_rows + 3 * c, first, step, rows, 6 * c, c, count, BLOCK_C, BLOCK_R
    )
    channel = tl.arange(0, BLOCK_C)
    ok = (channel < c) & writes
    at = set_row * 3 * c + K * c + channel
    tl.store(out_mean + at, mean, mask=ok)
    tl.store(out_var + at, var, mask=ok)
    return folded(weight + K * c, bias + K * c, mean, var, eps, c, BLOCK_C)


@triton.jit
def cross_spatial_reduce_kernel(
    features, reduced, packed, moments, reduced_moments, weight, bias, out_mean, out_var,
    slabs, G, H, W, c, eps,
    POOLED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """R to reduced (2·slabs, H·W, BLOCK_C), its moments (2·slabs, 2, c); statistics of the norm."""
    row = tl.program_id(0).to(tl.int64)
    branch, slab = row // slabs, row % slabs
    P = H * W
    size = P * BLOCK_C
    if POOLED:
        first, step, rows, set_row, writes = 0, 1, 2 * slabs, 0, row == 0
    else:
        group = slab % G
        first, step, rows = branch * slabs + group, G, slabs // G
        set_row, writes = 2 * group + branch, slab < G
    scale1, shift1 = _attention_norm(
        moments, weight, bias, out_mean, out_var, first, step, rows, P, c, eps, writes, set_row,
        0, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    scale3, shift3 = _attention_norm(
        moments, weight, bias, out_mean, out_var, first, step, rows, P, c, eps, writes, set_row,
        1, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    scale5, shift5 = _attention_norm(
        moments, weight, bias, out_mean, out_var, first, step, rows, P, c, eps, writes, set_row,
        2, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    source, out = features + row * 3 * size, reduced + row * size
    channel = tl.arange(0, BLOCK_C)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    # Weights held over the loop would spill, except those of float32's few pixels.
    for start in tl.range(0, P, BLOCK_P, disable_licm=features.dtype.element_ty != tl.float32):
        pixel = start + tl.arange(0, BLOCK_P)
        zero = hidden_zero(start)
        tiles = packed + zero * (BLOCK_C * BLOCK_C)
        inside = pixel < P
        part = tl.sum(inside.to(tl.float32), axis=0)
        f1 = load_tile(source, pixel, inside, BLOCK_C)
        f3 = load_tile(source + size, pixel, inside, BLOCK_C)
        f5 = load_tile(source + 2 * size, pixel, inside, BLOCK_C)
        r = reduced_tile(
            f1, f3, f5, tiles, scale1, shift1, scale3, shift3, scale5, shift5,
            BLOCK_C, BLOCK_P, PRECISION,
        )  # fmt: skip
        store_tile(out, pixel, inside, r, BLOCK_C)
        mean_b, m2_b = tile_moments(r, inside, part)
        mean, m2, count = merge_two(mean, m2, count, mean_b, m2_b, part)
    at = reduced_moments + row * 2 * c + channel
    tl.store(at, mean, mask=channel < c)
    tl.store(at + c, m2, mask=channel < c)


@triton.jit
def _channel_feat_mean(packed, sums, row, c, P, BLOCK_C: tl.constexpr):
    """Wc · mean(X) of a (branch, slab), (BLOCK_C,) float32."""
    mean = vector(sums + row * c, c, BLOCK_C, 0.0) / P
    weight = weight_tile(packed, TILE_CHANNEL_FEAT, BLOCK_C).to(tl.float32)
    return tl.sum(weight * mean[:, None], axis=0)


@triton.jit
def _branch_norm(
    reduced_moments, weight, bias, branch, slab, slabs, G, P, c, eps,
    POOLED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Mean, variance, scale and shift of R's norm for a branch of a slab."""
    count = P * 1.0
    if POOLED:
        first, step, rows = 0, 1, 2 * slabs
    else:
        first, step, rows = branch * slabs + slab % G, G, slabs // G
    mean, var = merge_rows(
        reduced_moments, reduced_moments + c, first, step, rows, 2 * c, c, count, BLOCK_C, BLOCK_R
    )
    scale, shift = folded(weight, bias, mean, var, eps, c, BLOCK_C)
    return mean, var, scale, shift


@triton.jit
def _store_set(out_mean, out_var, set_row, mean, var, c, writes, BLOCK_C: tl.constexpr):
    channel = tl.arange(0, BLOCK_C)
    at = set_row * c + channel
    tl.store(out_mean + at, mean, mask=(channel < c) & writes)
    tl.store(out_var + at, var, mask=(channel < c) & writes)


@triton.jit
def cross_spatial_gate_kernel(
    sheets, reduced, packed, sums, reduced_moments, weight, bias, alpha,
    w, softmax1, softmax2, out_mean, out_var, slabs, G, H, W, c, eps,
    POOLED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """w (slabs, H·W), the softmax vectors (slabs, c), the statistics of R's norm."""
    slab, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    P = H * W
    size = P * BLOCK_C
    row1, row2 = slab, slabs + slab
    mean1, var1, scale1, shift1 = _branch_norm(
        reduced_moments, weight, bias, 0, slab, slabs, G, P, c, eps, POOLED, BLOCK_C, BLOCK_R
    )
    mean2, var2, scale2, shift2 = _branch_norm(
        reduced_moments, weight, bias, 1, slab, slabs, G, P, c, eps, POOLED, BLOCK_C, BLOCK_R
    )
    first = part == 0
    if POOLED:
        _store_set(out_mean, out_var, 0, mean1, var1, c, first & (slab == 0), BLOCK_C)
    else:
        _store_set(out_mean, out_var, 2 * slab, mean1, var1, c, first & (slab < G), BLOCK_C)
        _store_set(out_mean, out_var, 2 * slab + 1, mean2, var2, c, first & (slab < G), BLOCK_C)

    alpha_value = tl.load(alpha).to(tl.float32)
    own1 = vector(reduced_moments + row1 * 2 * c, c, BLOCK_C, 0.0)
    own2 = vector(reduced_moments + row2 * 2 * c, c, BLOCK_C, 0.0)
    feat1 = _channel_feat_mean(packed, sums, row1, c, P, BLOCK_C)
    feat2 = _channel_feat_mean(packed, sums, row2, c, P, BLOCK_C)
    s1 = softmax(own1 * scale1 + shift1 + alpha_value * feat1, c, BLOCK_C)
    s2 = softmax(own2 * scale2 + shift2 + alpha_value * feat2, c, BLOCK_C)
    channel = tl.arange(0, BLOCK_C)
    ok = (channel < c) & first
    tl.store(softmax1 + slab * c + channel, s1, mask=ok)
    tl.store(softmax2 + slab * c + channel, s2, mask=ok)

    # Σ s1·y2 + Σ s2·y1 as dot products of R and X with vectors of this slab (identity 5.4).
    feat = weight_tile(packed, TILE_CHANNEL_FEAT, BLOCK_C).to(tl.float32)
    of_x1 = alpha_value * tl.sum(feat * s2[None, :], axis=1)
    of_x2 = alpha_value * tl.sum(feat * s1[None, :], axis=1)
    of_r1, of_r2 = scale1 * s2, scale2 * s1
    constant = tl.sum(shift1 * s2 + shift2 * s1, axis=0)
    pixel = part * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < P
    value = load_tile(reduced + row1 * size, pixel, inside, BLOCK_C)
    total = value.to(tl.float32) * of_r1[None, :]
    value = load_tile(reduced + row2 * size, pixel, inside, BLOCK_C)
    total += value.to(tl.float32) * of_r2[None, :]
    value = load_tile(sheets + row1 * size, pixel, inside, BLOCK_C)
    total += value.to(tl.float32) * of_x1[None, :]
    value = load_tile(sheets + row2 * size, pixel, inside, BLOCK_C)
    total += value.to(tl.float32) * of_x2[None, :]
    gate = tl.sigmoid(tl.sum(total, axis=1) + constant)
    at = w + slab * P + pixel
    tl.store(at, gate.to(w.dtype.element_ty), mask=inside)
