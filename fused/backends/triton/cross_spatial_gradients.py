"""Kernels of cross_spatial's backward, from the gradient of w to those of X, weights and e.

Notation: gl = grad_w·w·(1 − w), the gradient of w's logit, a number a pixel; R = Wr ∗ (A ⊙ f); a
row is (branch, slab) = branch·slabs + slab; T0 and T1 are Σ g and Σ g·n of a batch norm, n its
normalised input. Everything that depends on a whole group comes from sums of one pass: with
y = BN(R) + α·Wc∗X, Σ gl·y, Σ y's gradient and its product with n are linear in Σ gl, Σ gl·R, Σ R,
Σ gl·X and Σ X, so y and its gradient are never stored, and Wc's gradient is of rank two a slab.

recompute  f and R again, with the saved statistics, and those sums
vectors    per (branch, slab): y's gradient is o·gl + m; gradients of Wc, α and R's norm
attention  sums T0, T1 of the attention's norm; gradient of Wr
features   gradient of f; gradient of Wa
inputs     gradient of X, by the transposed convolutions
Sums are float32; operands of products and scratch have e's dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_spatial_recompute import logit_gradient, set_row
from .cross_spatial_tiles import (
    TILE_ATTENTION,
    TILE_REDUCE,
    TILE_SPATIAL1,
    TILE_SPATIAL3,
    TILE_SPATIAL5,
    hidden_zero,
    load_shifted,
    load_tile,
    outer_tap,
    store_tile,
    sum_rows,
    vector,
    weight_tile,
    weight_tile_transposed,
)

# ------------------------------------------------------------------------- gradients of A, f and X


@triton.jit
def _store_slopes(
    slopes, vectors, totals, row, weight, mean, var, slabs, G, c, count, eps,
    BATCH: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """R's gradient is q0·gl + q1 + q2·(R − μ): q0, q1, q2, μ to slopes (4, BLOCK_C).

    `count` values share a set of statistics.
    """
    channel = tl.arange(0, BLOCK_C)
    at = set_row(row, slabs, G, PER_GROUP)
    rstd = 1.0 / tl.sqrt_rn(vector(var + at * c, c, BLOCK_C, 1.0) + eps)
    scale = vector(weight, c, BLOCK_C, 0.0) * rstd
    direct = tl.load(vectors + row * 4 * BLOCK_C + channel)
    offset = tl.load(vectors + row * 4 * BLOCK_C + BLOCK_C + channel)
    slope = tl.zeros((BLOCK_C,), tl.float32)
    if BATCH:
        rows = 1
        if not PER_GROUP:
            rows = 2 * G
        stride = 2 * BLOCK_C
        offset -= sum_rows(totals, at, 1, rows, stride, BLOCK_C, BLOCK_C, 16) / count
        sum1 = sum_rows(totals + BLOCK_C, at, 1, rows, stride, BLOCK_C, BLOCK_C, 16)
        slope -= scale * rstd * sum1 / count
    own = slopes + channel
    tl.store(own, scale * direct)
    tl.store(own + BLOCK_C, scale * offset)
    tl.store(own + 2 * BLOCK_C, slope)
    tl.store(own + 3 * BLOCK_C, vector(mean + at * c, c, BLOCK_C, 0.0))


@triton.jit
def _reduced_gradient(reduced, slopes, gl, pixel, inside, BLOCK_C: tl.constexpr):
    """Gradient of R at a tile, in the dtype of the products, zero outside."""
    channel = tl.arange(0, BLOCK_C)
    q0, q1 = tl.load(slopes + channel), tl.load(slopes + BLOCK_C + channel)
    q2, centre = tl.load(slopes + 2 * BLOCK_C + channel), tl.load(slopes + 3 * BLOCK_C + channel)
    r = load_tile(reduced, pixel, inside, BLOCK_C).to(tl.float32)
    grad = gl[:, None] * q0[None, :] + q1[None, :] + (r - centre[None, :]) * q2[None, :]
    return tl.where(inside[:, None], grad, 0.0).to(reduced.dtype.element_ty)


@triton.jit
def _attention_gradient(
    features, size, pixel, inside, zero, own, grad_r, packed, weight, bias, mean, var, eps, c, k,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For features k: A, its normalised logits n, the gradients of A ⊙ f and of BN's output.

    The 3c features come from memory one third after the other: float32 has no registers for all.
    """
    rstd = 1.0 / tl.sqrt_rn(vector(var + k * c, c, BLOCK_C, 1.0) + eps)
    gamma = vector(weight + k * c, c, BLOCK_C, 0.0)
    beta = vector(bias + k * c, c, BLOCK_C, 0.0)
    logits = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(0, 3 + zero):
        f = load_tile(features + i * size, pixel, inside, BLOCK_C)
        tile = weight_tile(packed, TILE_ATTENTION + 3 * k + i, BLOCK_C)
        logits = tl.dot(f, tile, logits, input_precision=PRECISION)
    n = (logits - vector(mean + k * c, c, BLOCK_C, 0.0)[None, :]) * rstd[None, :]
    attention = tl.sigmoid(n * gamma[None, :] + beta[None, :])
    back = weight_tile_transposed(packed, TILE_REDUCE + k, BLOCK_C)
    grad_weighted = tl.dot(grad_r, back, input_precision=PRECISION)
    grad = grad_weighted * own.to(tl.float32) * attention * (1.0 - attention)
    return attention, n, grad_weighted, grad, gamma * rstd


@triton.jit
def cross_spatial_attention_backward_kernel(
    features, reduced, vectors, totals, slopes, sums, partials, packed, grad_w, w,
    weight, bias, attention_mean, attention_var, reduce_weight, reduce_mean, reduce_var,
    slabs, G, H, W, c, count, attention_eps, reduce_eps,
    BATCH: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (rows, 3), program k for features k.

    sums (2·slabs, 2, 3c): T0, T1 of A's norm; partials (2·slabs, c·3c): Wr's gradient; slopes
    (2·slabs, 3, 4, BLOCK_C), the same for every k.
    """
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    P = H * W
    size = P * BLOCK_C
    at = set_row(row, slabs, G, PER_GROUP)
    mean, var = attention_mean + at * 3 * c, attention_var + at * 3 * c
    own_slopes = slopes + (row * 3 + k) * 4 * BLOCK_C
    _store_slopes(
        own_slopes, vectors, totals, row, reduce_weight, reduce_mean, reduce_var, slabs, G, c,
        count, reduce_eps, BATCH, PER_GROUP, BLOCK_C,
    )  # fmt: skip
    tl.debug_barrier()  # other threads of this program read them
    source = features + row * 3 * size
    sum0 = tl.zeros((BLOCK_C,), tl.float32)
    sum1 = tl.zeros((BLOCK_C,), tl.float32)
    grad_weight = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = pixel < P
        zero = hidden_zero(start)
        tiles = packed + zero * (BLOCK_C * BLOCK_C)
        own = load_tile(source + k * size, pixel, inside, BLOCK_C)
        gl = logit_gradient(grad_w, w, row % slabs, P, pixel, inside)
        grad_r = _reduced_gradient(
            reduced + row * size, own_slopes + zero, gl, pixel, inside, BLOCK_C
        )
        attention, n, _, grad, _ = _attention_gradient(
            source, size, pixel, inside, zero, own, grad_r, tiles, weight + zero, bias + zero,
            mean + zero, var + zero, attention_eps, c, k, BLOCK_C, BLOCK_P, PRECISION,
        )  # fmt: skip
        sum0 += tl.sum(grad, axis=0)
        sum1 += tl.sum(grad * n, axis=0)
        weighted = (attention * own.to(tl.float32)).to(own.dtype)
        grad_weight = tl.dot(tl.trans(grad_r), weighted, grad_weight, input_precision=PRECISION)
    channel = tl.arange(0, BLOCK_C)
    ok = channel < c
    own_sums = sums + row * 6 * c + k * c + channel
    tl.store(own_sums, sum0, mask=ok)
    tl.store(own_sums + 3 * c, sum1, mask=ok)
    out = partials + row * 3 * c * c + channel[:, None] * 3 * c + k * c + channel[None, :]
    tl.store(out, grad_weight, mask=ok[:, None] & ok[None, :])


@triton.jit
def _store_means(
    means, sums, row, slabs, G, c, count,
    BATCH: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """T0 and T1 of A's norm over `count` values, to means (6, BLOCK_C); 0 if frozen."""
    channel = tl.arange(0, BLOCK_C)
    if PER_GROUP:
        first, step, rows = (row // slabs) * slabs + (row % slabs) % G, G, slabs // G
    else:
        first, step, rows = row * 0, 1, 2 * slabs
    for k in range(0, 6):
        mean = tl.zeros((BLOCK_C,), tl.float32)
        if BATCH:
            mean = sum_rows(sums + k * c, first, step, rows, 6 * c, c, BLOCK_C, 16) / count
        tl.store(means + k * BLOCK_C + channel, mean)


@triton.jit
def cross_spatial_features_backward_kernel(
    features, reduced, slopes, sums, means, grad_features, partials, packed, grad_w, w,
    weight, bias, attention_mean, attention_var, slabs, G, H, W, c, count, attention_eps,
    BATCH: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (rows, 3): gradient of f_j (2·slabs, 3, P, BLOCK_C); partials (2·slabs, 3c·3c): Wa's.

    Every j repeats the attention, and a rolled loop goes over its three outputs k: nine tiles of
    Wa's gradient, or the weights of three steps at once, would not fit the registers.
    """
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    P = H * W
    size = P * BLOCK_C
    at = set_row(row, slabs, G, PER_GROUP)
    mean, var = attention_mean + at * 3 * c, attention_var + at * 3 * c
    of_program = means + (row * 3 + j) * 6 * BLOCK_C
    _store_means(of_program, sums, row, slabs, G, c, count, BATCH, PER_GROUP, BLOCK_C)
    tl.debug_barrier()  # other threads of this program read them
    channel = tl.arange(0, BLOCK_C)
    w1 = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    w3, w5 = w1, w1
    source, out = features + row * 3 * size, grad_features + (row * 3 + j) * size
    # What is held over the loop would spill.
    for start in tl.range(0, P, BLOCK_P, disable_licm=True):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = pixel < P
        zero = hidden_zero(start)
        tiles = packed + zero * (BLOCK_C * BLOCK_C)
        of_j = load_tile(source + j * size, pixel, inside, BLOCK_C)
        gl = logit_gradient(grad_w, w, row % slabs, P, pixel, inside)
        own_slopes = slopes + row * 12 * BLOCK_C + zero
        grad_r = _reduced_gradient(reduced + row * size, own_slopes, gl, pixel, inside, BLOCK_C)
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for k in tl.range(0, 3 + zero, disable_licm=True):
            own = load_tile(source + k * size, pixel, inside, BLOCK_C)
            attention, n, grad_weighted, grad, scale = _attention_gradient(
                source, size, pixel, inside, zero, own, grad_r, tiles, weight, bias, mean, var,
                attention_eps, c, k, BLOCK_C, BLOCK_P, PRECISION,
            )  # fmt: skip
            of_k = of_program + k * BLOCK_C + channel
            sum0, sum1 = tl.load(of_k), tl.load(of_k + 3 * BLOCK_C)
            grad = (grad - sum0[None, :] - n * sum1[None, :]) * scale[None, :]
            # Pixels outside have no features, but in half precision their gradient may be infinite.
            grad = tl.where(inside[:, None], grad, 0.0).to(own.dtype)
            back = weight_tile_transposed(tiles, TILE_ATTENTION + 3 * k + j, BLOCK_C)
            acc = tl.dot(grad, back, acc, input_precision=PRECISION)
            # A scales features k itself, so their own gradient has a second part.
            acc += tl.where(j == k, grad_weighted * attention, 0.0)
            part = tl.dot(tl.trans(grad), of_j, input_precision=PRECISION)
            w1 += tl.where(k == 0, part, 0.0)
            w3 += tl.where(k == 1, part, 0.0)
            w5 += tl.where(k == 2, part, 0.0)
        store_tile(out, pixel, inside, acc, BLOCK_C)
    ok = (channel[:, None] < c) & (channel[None, :] < c)
    target = partials + row * 9 * c * c + channel[:, None] * 3 * c + j * c + channel[None, :]
    tl.store(target, w1, mask=ok)
    tl.store(target + 3 * c * c, w3, mask=ok)
    tl.store(target + 6 * c * c, w5, mask=ok)


@triton.jit
def cross_spatial_inputs_backward_kernel(
    grad_features, grad_sheets, vectors, packed, grad_w, w, slabs, H, W,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of X (2·slabs, P, BLOCK_C); grid (2·slabs, tiles)."""
    row = tl.program_id(0).to(tl.int64)
    P = H * W
    size = P * BLOCK_C
    pixel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < P
    source = grad_features + row * 3 * size
    zero = hidden_zero(tl.program_id(1))
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in range(0, 9 + zero):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        g3 = load_shifted(source + size, pixel, -dy, -dx, 0, H, W, BLOCK_C)
        k3 = weight_tile_transposed(packed, TILE_SPATIAL3 + tap, BLOCK_C)
        acc = tl.dot(g3, k3, acc, input_precision=PRECISION)
        g5 = load_shifted(source + 2 * size, pixel, -dy, -dx, 0, H, W, BLOCK_C)
        k5 = weight_tile_transposed(packed, TILE_SPATIAL5 + (dy + 2) * 5 + dx + 2, BLOCK_C)
        acc = tl.dot(g5, k5, acc, input_precision=PRECISION)
    for tap in range(0, 16 + zero):
        dy, dx = outer_tap(tap)
        g5 = load_shifted(source + 2 * size, pixel, -dy, -dx, 0, H, W, BLOCK_C)
        k5 = weight_tile_transposed(packed, TILE_SPATIAL5 + (dy + 2) * 5 + dx + 2, BLOCK_C)
        acc = tl.dot(g5, k5, acc, input_precision=PRECISION)
    g1 = load_tile(source, pixel, inside, BLOCK_C)
    k1 = weight_tile_transposed(packed, TILE_SPATIAL1, BLOCK_C)
    acc = tl.dot(g1, k1, acc, input_precision=PRECISION)
    gl = logit_gradient(grad_w, w, row % slabs, P, pixel, inside)
    channel = tl.arange(0, BLOCK_C)
    of_row = vectors + row * 4 * BLOCK_C + channel
    direct, offset = tl.load(of_row + 2 * BLOCK_C), tl.load(of_row + 3 * BLOCK_C)
    acc += gl[:, None] * direct[None, :] + offset[None, :]
    store_tile(grad_sheets + row * size, pixel, inside, acc, BLOCK_C)
