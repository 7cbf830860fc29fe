"""Gated fusion, backward: the kernels up to the maps' gradients.

Equations, layouts, grids, bytes and precision are in `gated_fusion_backward`, the launcher. A
product's tile is (BLOCK_P pixels, BLOCK_O channels); it leaves the sums (parts, 2, C) of its result
with 1 and with the normalised values, from which the next norm's backward is made.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gated_fusion_products import (
    add_product,
    load_gates,
    load_tile,
    load_vector,
    norm_affine,
    norm_backward,
    packed_numbers,
    place,
    store_tile,
    tile_offsets,
)

# ------------------------------------------------------------------------------------- elementwise


@triton.jit
def gate_gradient(
    grad_out, e, w, phi, sample, pixel, channel, ok, size, grad_strides, e_strides, w_strides,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of t, the gradient of BN3's result."""
    t = load_tile(grad_out, sample, pixel, channel, ok, grad_strides, WIDE)
    t *= load_tile(e, sample, pixel, channel, ok, e_strides, WIDE)
    t *= 1 - load_gates(w, sample, pixel, channel, ok, size, w_strides, WIDE)
    return t * phi * (1 - phi)


@triton.jit
def gated_fusion_sums_kernel(
    grad_out, e, w, logits, mean3, var3, weight3, bias3, mean1, var1, weight1, bias1,
    squeeze, expand, fusion, sums, affine3, affine1, packed,
    grad_strides, e_strides, w_strides, logits_strides,
    channels, squeezed, size, pixels, tiles, parts, run, runs, blocks, eps3, eps1,
    of_squeeze, of_expand, of_fusion,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums (runs, 2, C) of t and t ⊙ n; the first run stores scale and shift of norms 3 and 1.

    Programs behind the runs pack the weights of the products to come.
    """
    program = tl.program_id(0)
    if packed is not None and program >= runs * blocks:
        n = (program - runs * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        value = packed_numbers(squeeze, n, 0, of_squeeze)
        value += packed_numbers(expand, n, of_squeeze, of_expand)
        value += packed_numbers(fusion, n, of_squeeze + of_expand, of_fusion)
        ok = n < of_squeeze + of_expand + of_fusion
        tl.store(packed + n, value.to(packed.dtype.element_ty), mask=ok)
        return
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    first = program // blocks * run
    mean, var = load_vector(mean3, channel, known), load_vector(var3, channel, known)
    scale, shift = norm_affine(
        mean, var, load_vector(weight3, channel, known), load_vector(bias3, channel, known), eps3
    )
    rstd = tl.rsqrt(var + eps3)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    weighted = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for part in range(first, tl.minimum(first + run, parts)):
        sample, pixel, inside = place(part, tiles, pixels, BLOCK_P)
        ok = inside[:, None] & known[None, :]
        value = load_tile(logits, sample, pixel, channel, ok, logits_strides, WIDE)
        phi = tl.sigmoid(value * scale[None, :] + shift[None, :])
        t = gate_gradient(
            grad_out, e, w, phi, sample, pixel, channel, ok, size,
            grad_strides, e_strides, w_strides, WIDE,
        )  # fmt: skip
        total += t
        weighted += t * (value - mean[None, :])
    row = sums + program // blocks * 2 * channels + channel
    tl.store(row, tl.sum(total, axis=0), mask=known)
    tl.store(row + channels, tl.sum(weighted, axis=0) * rstd, mask=known)
    if first == 0:
        tl.store(affine3 + channel, scale, mask=known)
        tl.store(affine3 + channels + channel, shift, mask=known)
        some = channel < squeezed
        scale, shift = norm_affine(
            load_vector(mean1, channel, some), load_vector(var1, channel, some),
            load_vector(weight1, channel, some), load_vector(bias1, channel, some), eps1,
        )  # fmt: skip
        tl.store(affine1 + channel, scale, mask=some)
        tl.store(affine1 + squeezed + channel, shift, mask=some)


@triton.jit
def add_sums(sums, channel, known, channels, parts, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The two sums (parts, 2, C) of channels over all parts, in a fixed order."""
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    weighted = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        row = sums + part.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        ok = (part < parts)[:, None] & known[None, :]
        total += tl.load(row, mask=ok, other=0.0)
        weighted += tl.load(row + channels, mask=ok, other=0.0)
    return tl.sum(total, axis=0), tl.sum(weighted, axis=0)


@triton.jit
def norm_slopes(total, weighted, mean, var, weight, count, eps, TRAINING: tl.constexpr):
    """BNᵀ(t) = gain·t + slope·(x − mean) + level, from the sums of t and t ⊙ n."""
    rstd = tl.rsqrt(var + eps)
    gain = weight * rstd
    if TRAINING:
        return gain, -gain * rstd * (weighted / count), -gain * (total / count)
    return gain, tl.zeros_like(gain), tl.zeros_like(gain)


@triton.jit
def gated_fusion_grad_logits_kernel(
    grad_out, e, w, logits, sums, affine3, mean3, var3, weight3, grad_logits, grad_weight3,
    grad_bias3, grad_strides, e_strides, w_strides, logits_strides, grad_logits_strides,
    channels, size, pixels, tiles, parts, run, blocks, sum_parts, count, eps3,
    TRAINING: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """z = BN3ᵀ(t); every program adds up the sums of its channels, the first run stores them."""
    program = tl.program_id(0)
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    first = program // blocks * run
    total, weighted = add_sums(sums, channel, known, channels, sum_parts, BLOCK_ROWS, BLOCK_C)
    tl.store(grad_bias3 + channel, total, mask=known & (first == 0))
    tl.store(grad_weight3 + channel, weighted, mask=known & (first == 0))
    scale, shift = (
        load_vector(affine3, channel, known),
        load_vector(affine3 + channels, channel, known),
    )
    mean, var = load_vector(mean3, channel, known), load_vector(var3, channel, known)
    gain, slope, level = norm_slopes(
        total, weighted, mean, var, load_vector(weight3, channel, known), count, eps3, TRAINING
    )
    for part in range(first, tl.minimum(first + run, parts)):
        sample, pixel, inside = place(part, tiles, pixels, BLOCK_P)
        ok = inside[:, None] & known[None, :]
        value = load_tile(logits, sample, pixel, channel, ok, logits_strides, WIDE)
        phi = tl.sigmoid(value * scale[None, :] + shift[None, :])
        grad = gain[None, :] * gate_gradient(
            grad_out, e, w, phi, sample, pixel, channel, ok, size,
            grad_strides, e_strides, w_strides, WIDE,
        )  # fmt: skip
        if TRAINING:
            grad += slope[None, :] * (value - mean[None, :]) + level[None, :]
        store_tile(grad_logits, grad, sample, pixel, channel, ok, grad_logits_strides, WIDE)


@triton.jit
def gated_fusion_grad_norm_kernel(
    sums, mean, var, weight, bias, slopes, grad_weight, grad_bias, channels, parts, count, eps,
    TRAINING: tl.constexpr, SHIFT_MATTERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Slopes (6, C) of a norm, and its parameters' gradients; program: a channel block.

    Without SHIFT_MATTERS the gradients' sum is known to be 0, up to rounding.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    total, weighted = add_sums(sums, channel, known, channels, parts, BLOCK_ROWS, BLOCK_C)
    if not SHIFT_MATTERS:
        total = tl.zeros_like(total)
    tl.store(grad_bias + channel, total, mask=known)
    tl.store(grad_weight + channel, weighted, mask=known)
    average, variance = load_vector(mean, channel, known), load_vector(var, channel, known)
    factor = load_vector(weight, channel, known)
    gain, slope, level = norm_slopes(
        total, weighted, average, variance, factor, count, eps, TRAINING
    )
    scale, shift = norm_affine(average, variance, factor, load_vector(bias, channel, known), eps)
    row = slopes + channel
    tl.store(row, gain, mask=known)
    tl.store(row + channels, slope, mask=known)
    tl.store(row + 2 * channels, level, mask=known)
    tl.store(row + 3 * channels, average, mask=known)
    tl.store(row + 4 * channels, scale, mask=known)
    tl.store(row + 5 * channels, shift, mask=known)


# ---------------------------------------------------------------------------------------- products


@triton.jit
def store_with_sums(
    acc, value, mean, var, eps, out, sums, part, sample, pixel, inside, column, known, columns,
    out_strides, WIDE: tl.constexpr,
):  # fmt: skip
    """Store a tile of a gradient, and its sums with 1 and with n, the normalised `value`."""
    grad = acc.to(out.dtype.element_ty)
    ok = inside[:, None] & known[None, :]
    store_tile(out, grad, sample, pixel, column, ok, out_strides, WIDE)
    grad = tl.where(ok, grad.to(tl.float32), 0.0)
    average = load_vector(mean, column, known)
    rstd = tl.rsqrt(load_vector(var, column, known) + eps)
    weighted = tl.sum(grad * (value - average[None, :]), axis=0) * rstd
    row = sums + tl.cast(part, tl.int64) * 2 * columns + column
    tl.store(row, tl.sum(grad, axis=0), mask=known)
    tl.store(row + columns, weighted, mask=known)


@triton.jit
def add_norm_backward_product(
    acc, grad, value, slopes, weight, sample, pixel, inside, column, known, inputs,
    grad_strides, value_strides, weight_strides,
    TRAINING: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Acc + Σ_k BNᵀ(grad)[p, k]·weight[k, column]; `value` is what the norm normalised."""
    lane = tl.arange(0, BLOCK_K)
    grad += sample * grad_strides[0]
    value += sample * value_strides[0]
    grad_at = tile_offsets(pixel, lane, grad_strides, WIDE)
    value_at = tile_offsets(pixel, lane, value_strides, WIDE)
    weight_at = lane[:, None] * weight_strides[0] + column[None, :] * weight_strides[1]
    for k in range(0, inputs, BLOCK_K):
        some = k + lane < inputs
        first = tl.cast(k, tl.int64)
        ok = inside[:, None] & some[None, :]
        left = tl.load(grad + first * grad_strides[1] + grad_at, mask=ok, other=0.0)
        at = value + first * value_strides[1] + value_at
        left = norm_backward(left, at, ok, slopes, k + lane, some, inputs, TRAINING)
        right = tl.load(
            weight + first * weight_strides[0] + weight_at,
            mask=some[:, None] & known[None, :],
            other=0.0,
        )
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def gated_fusion_grad_expanded_kernel(
    grad_logits, weight, expanded, mean2, var2, grad_expanded, sums,
    grad_logits_strides, weight_strides, expanded_strides, grad_expanded_strides,
    channels, pixels, tiles, column_tiles, eps2,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """m = Wf_mᵀ∗z and its sums; program (part, channel tile)."""
    program = tl.program_id(0)
    part = program // column_tiles
    sample, pixel, inside = place(part, tiles, pixels, BLOCK_P)
    column = program % column_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    known = column < channels
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    acc = add_product(
        acc, grad_logits, weight + channels * weight_strides[1], None, sample, pixel, inside,
        column, known, channels, grad_logits_strides, weight_strides, False, BLOCK_K, WIDE,
        PRECISION,
    )  # fmt: skip
    ok = inside[:, None] & known[None, :]
    value = load_tile(expanded, sample, pixel, column, ok, expanded_strides, WIDE)
    store_with_sums(
        acc, value, mean2, var2, eps2, grad_expanded, sums, part, sample, pixel, inside, column,
        known, channels, grad_expanded_strides, WIDE,
    )  # fmt: skip


@triton.jit
def gated_fusion_grad_hidden_kernel(
    grad_expanded, expanded, slopes2, weight, hidden, affine1, mean1, var1, grad_hidden, sums,
    grad_expanded_strides, expanded_strides, weight_strides, hidden_strides, grad_hidden_strides,
    channels, squeezed, pixels, tiles, column_tiles, eps1,
    TRAINING: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = (W2ᵀ∗BN2ᵀ(m)) ⊙ (BN1(hidden) > 0) and its sums; program (part, channel tile)."""
    program = tl.program_id(0)
    part = program // column_tiles
    sample, pixel, inside = place(part, tiles, pixels, BLOCK_P)
    column = program % column_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    known = column < squeezed
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    acc = add_norm_backward_product(
        acc, grad_expanded, expanded, slopes2, weight, sample, pixel, inside, column, known,
        channels, grad_expanded_strides, expanded_strides, weight_strides,
        TRAINING, BLOCK_K, WIDE, PRECISION,
    )  # fmt: skip
    ok = inside[:, None] & known[None, :]
    value = load_tile(hidden, sample, pixel, column, ok, hidden_strides, WIDE)
    scale, shift = (
        load_vector(affine1, column, known),
        load_vector(affine1 + squeezed, column, known),
    )
    acc = tl.where(value * scale[None, :] + shift[None, :] > 0, acc, 0.0)
    store_with_sums(
        acc, value, mean1, var1, eps1, grad_hidden, sums, part, sample, pixel, inside, column,
        known, squeezed, grad_hidden_strides, WIDE,
    )  # fmt: skip


@triton.jit
def gated_fusion_grad_input_kernel(
    grad_logits, fusion_weight, grad_hidden, hidden, slopes1, squeeze_weight, grad_out, e, w,
    logits, affine3, grad_e, grad_w, grad_logits_strides, fusion_strides, grad_hidden_strides,
    hidden_strides, squeeze_strides, grad_strides, e_strides, w_strides, logits_strides,
    grad_e_strides, grad_w_strides, channels, squeezed, groups, size, pixels, tiles, column_tiles,
    pieces, piece_stride,
    SPAN: tl.constexpr, TRAINING: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_e, and grad_w or its pieces; program (part, groups padded to SPAN or a piece of one)."""
    program = tl.program_id(0)
    part = program // column_tiles
    sample, pixel, inside = place(part, tiles, pixels, BLOCK_P)
    tile = program % column_tiles
    lane = tl.arange(0, BLOCK_O)
    first_group = tile // pieces * (BLOCK_O // SPAN)
    group, inner = first_group + lane // SPAN, tile % pieces * SPAN + lane % SPAN
    column, known = group * size + inner, (group < groups) & (inner < size)
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    acc = add_product(
        acc, grad_logits, fusion_weight, None, sample, pixel, inside, column, known, channels,
        grad_logits_strides, fusion_strides, False, BLOCK_K, WIDE, PRECISION,
    )  # fmt: skip
    acc = add_norm_backward_product(
        acc, grad_hidden, hidden, slopes1, squeeze_weight, sample, pixel, inside, column, known,
        squeezed, grad_hidden_strides, hidden_strides, squeeze_strides,
        TRAINING, BLOCK_K, WIDE, PRECISION,
    )  # fmt: skip
    ok = inside[:, None] & known[None, :]
    scale, shift = (
        load_vector(affine3, column, known),
        load_vector(affine3 + channels, column, known),
    )
    phi = load_tile(logits, sample, pixel, column, ok, logits_strides, WIDE)
    phi = tl.sigmoid(phi * scale[None, :] + shift[None, :])
    gate = load_tile(w, sample, pixel, group, ok, w_strides, WIDE)
    grad = load_tile(grad_out, sample, pixel, column, ok, grad_strides, WIDE)
    value = grad * (gate + phi * (1 - gate)) + acc * gate
    store_tile(grad_e, value, sample, pixel, column, ok, grad_e_strides, WIDE)
    value = load_tile(e, sample, pixel, column, ok, e_strides, WIDE) * (grad * (1 - phi) + acc)
    value = tl.reshape(tl.where(ok, value, 0.0), (BLOCK_P, BLOCK_O // SPAN, SPAN))
    group = first_group + tl.arange(0, BLOCK_O // SPAN)
    ok = inside[:, None] & (group < groups)[None, :]
    grad_w += tl.cast(tile % pieces, tl.int64) * piece_stride
    store_tile(grad_w, tl.sum(value, axis=2), sample, pixel, group, ok, grad_w_strides, WIDE)
