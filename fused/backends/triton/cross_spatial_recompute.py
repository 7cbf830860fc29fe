"""First kernels of cross_spatial's backward: f and R once more, and what depends on whole groups.

Notation as in cross_spatial_gradients.py. `recompute` runs the network with the saved statistics
and takes a few sums per (branch, slab); `vectors` makes of them the coefficients of y's gradient
and the gradients of Wc, α and R's norm. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_spatial_tiles import (
    TILE_CHANNEL_FEAT,
    features_tile,
    hidden_zero,
    load_tile,
    reduced_tile_running,
    store_tile,
    vector,
    weight_tile,
)


@triton.jit
def set_row(row, slabs, G, PER_GROUP: tl.constexpr):
    """Row of the saved statistics for a (branch, slab): branches alternate, as published."""
    if PER_GROUP:
        return 2 * ((row % slabs) % G) + row // slabs
    return row * 0


@triton.jit
def logit_gradient(grad_w, w, slab, P, pixel, inside):
    """gl at pixels, (BLOCK_P,) float32."""
    at = slab * P + pixel
    gate = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    return tl.load(grad_w + at, mask=inside, other=0.0).to(tl.float32) * gate * (1.0 - gate)


@triton.jit
def cross_spatial_recompute_kernel(
    sheets, features, reduced, sums, packed, grad_w, w,
    attention_weight, attention_bias, attention_mean, attention_var, reduce_mean,
    slabs, G, H, W, c, eps,
    PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """f (2·slabs, 3, P, BLOCK_C), R (2·slabs, P, BLOCK_C); one program a row.

    sums (2·slabs, 5, BLOCK_C): Σ gl·(R − μ), Σ (R − μ), Σ gl·X, Σ X, Σ gl, with μ the norm's mean.
    """
    row = tl.program_id(0).to(tl.int64)
    P = H * W
    size = P * BLOCK_C
    at = set_row(row, slabs, G, PER_GROUP)
    weight, bias = attention_weight, attention_bias
    mean, var = attention_mean + at * 3 * c, attention_var + at * 3 * c
    centre = vector(reduce_mean + at * c, c, BLOCK_C, 0.0)
    x, out = sheets + row * size, features + row * 3 * size
    none = tl.zeros((BLOCK_C,), tl.float32)
    weighted_r, total_r, weighted_x, total_x, total = none, none, none, none, 0.0
    # What is held over the loop would spill, X's sums too if the network ran before them.
    for start in tl.range(0, P, BLOCK_P, disable_licm=True):
        pixel = start + tl.arange(0, BLOCK_P)
        zero = hidden_zero(start)
        tiles = packed + zero * (BLOCK_C * BLOCK_C)
        inside = pixel < P
        gl = logit_gradient(grad_w, w, row % slabs, P, pixel, inside)
        value = load_tile(x, pixel, inside, BLOCK_C).to(tl.float32)
        weighted_x += tl.sum(value * gl[:, None], axis=0)
        total_x += tl.sum(value, axis=0)
        total += tl.sum(gl, axis=0)
        f1, f3, f5 = features_tile(x, tiles, pixel, 0, H, W, zero, BLOCK_C, BLOCK_P, PRECISION)
        store_tile(out, pixel, inside, f1, BLOCK_C)
        store_tile(out + size, pixel, inside, f3, BLOCK_C)
        store_tile(out + 2 * size, pixel, inside, f5, BLOCK_C)
        r = reduced_tile_running(
            f1, f3, f5, tiles, weight + zero, bias + zero, mean + zero, var + zero, eps, c,
            BLOCK_C, BLOCK_P, PRECISION,
        )  # fmt: skip
        store_tile(reduced + row * size, pixel, inside, r, BLOCK_C)
        r = tl.where(inside[:, None], r - centre[None, :], 0.0)
        weighted_r += tl.sum(r * gl[:, None], axis=0)
        total_r += tl.sum(r, axis=0)
    channel = tl.arange(0, BLOCK_C)
    own = sums + row * 5 * BLOCK_C + channel
    tl.store(own, weighted_r)
    tl.store(own + BLOCK_C, total_r)
    tl.store(own + 2 * BLOCK_C, weighted_x)
    tl.store(own + 3 * BLOCK_C, total_x)
    tl.store(own + 4 * BLOCK_C, none + total)


# --------------------------------------------------------------------------------------- vectors


@triton.jit
def _apply(weight, value):
    """Weight (inputs, outputs) times a vector of inputs."""
    return tl.sum(weight * value[:, None], axis=0)


@triton.jit
def _apply_transposed(weight, value):
    """Weight (inputs, outputs) transposed, times a vector of outputs."""
    return tl.sum(weight * value[None, :], axis=1)


@triton.jit
def _one_branch(
    own, vectors, direct, softmax, grad_softmax, feat, rstd, alpha, P, BLOCK_C: tl.constexpr
):
    """Store (o, m, α·Wcᵀo, α·Wcᵀm) of a row; return its T0, T1, and gradients of Wc/α and α."""
    channel = tl.arange(0, BLOCK_C)
    inner = tl.sum(softmax * grad_softmax, axis=0)
    offset = softmax * (grad_softmax - inner) / P
    tl.store(vectors + channel, direct)
    tl.store(vectors + BLOCK_C + channel, offset)
    tl.store(vectors + 2 * BLOCK_C + channel, alpha * _apply_transposed(feat, direct))
    tl.store(vectors + 3 * BLOCK_C + channel, alpha * _apply_transposed(feat, offset))
    weighted_r, total_r = tl.load(own + channel), tl.load(own + BLOCK_C + channel)
    weighted_x, total_x = tl.load(own + 2 * BLOCK_C + channel), tl.load(own + 3 * BLOCK_C + channel)
    total = tl.load(own + 4 * BLOCK_C + channel)
    sum0 = direct * total + offset * P
    sum1 = rstd * (direct * weighted_r + offset * total_r)
    grad_feat = weighted_x[:, None] * direct[None, :] + total_x[:, None] * offset[None, :]
    grad_alpha = tl.sum(direct * _apply(feat, weighted_x) + offset * _apply(feat, total_x), axis=0)
    return sum0, sum1, grad_feat, grad_alpha


@triton.jit
def _output_gradient(own, scale, bias, feat, alpha, BLOCK_C: tl.constexpr):
    """Σ gl·y of a row, (BLOCK_C,)."""
    channel = tl.arange(0, BLOCK_C)
    weighted_x = tl.load(own + 2 * BLOCK_C + channel)
    total = tl.load(own + 4 * BLOCK_C + channel)
    return scale * tl.load(own + channel) + bias * total + alpha * _apply(feat, weighted_x)


@triton.jit
def cross_spatial_vectors_kernel(
    sums, vectors, totals, partials, packed, softmax1, softmax2,
    reduce_weight, reduce_bias, reduce_var, alpha, slabs, G, P, c, eps,
    PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program a group: its samples in order.

    vectors (2·slabs, 4, BLOCK_C), totals (2G, 2, BLOCK_C): T0, T1 of R's norm for (branch, group);
    partials (G, 2c + c·c + 1): gradients of the norm's weight and bias, of Wc, and of α.
    """
    group = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    feat = weight_tile(packed, TILE_CHANNEL_FEAT, BLOCK_C).to(tl.float32)
    alpha_value = tl.load(alpha).to(tl.float32)
    gamma = vector(reduce_weight, c, BLOCK_C, 0.0)
    beta = vector(reduce_bias, c, BLOCK_C, 0.0)
    var1 = reduce_var + set_row(group, slabs, G, PER_GROUP) * c
    var2 = reduce_var + set_row(slabs + group, slabs, G, PER_GROUP) * c
    rstd1 = 1.0 / tl.sqrt_rn(vector(var1, c, BLOCK_C, 1.0) + eps)
    rstd2 = 1.0 / tl.sqrt_rn(vector(var2, c, BLOCK_C, 1.0) + eps)
    none = tl.zeros((BLOCK_C,), tl.float32)
    sum0_1, sum1_1, sum0_2, sum1_2, grad_alpha = none, none, none, none, 0.0
    grad_feat = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for slab in range(group, slabs, G):
        own1, own2 = sums + slab * 5 * BLOCK_C, sums + (slabs + slab) * 5 * BLOCK_C
        s1 = vector(softmax1 + slab * c, c, BLOCK_C, 0.0)
        s2 = vector(softmax2 + slab * c, c, BLOCK_C, 0.0)
        # Softmax 1 weighs y2, and the other way round.
        grad_s1 = _output_gradient(own2, gamma * rstd2, beta, feat, alpha_value, BLOCK_C)
        grad_s2 = _output_gradient(own1, gamma * rstd1, beta, feat, alpha_value, BLOCK_C)
        of1, of2 = vectors + slab * 4 * BLOCK_C, vectors + (slabs + slab) * 4 * BLOCK_C
        t0, t1, grad, grad_a = _one_branch(
            own1, of1, s2, s1, grad_s1, feat, rstd1, alpha_value, P, BLOCK_C
        )
        sum0_1 += t0
        sum1_1 += t1
        grad_feat += grad
        grad_alpha += grad_a
        t0, t1, grad, grad_a = _one_branch(
            own2, of2, s1, s2, grad_s2, feat, rstd2, alpha_value, P, BLOCK_C
        )
        sum0_2 += t0
        sum1_2 += t1
        grad_feat += grad
        grad_alpha += grad_a
    of_set = totals + 4 * group * BLOCK_C + channel
    tl.store(of_set, sum0_1)
    tl.store(of_set + BLOCK_C, sum1_1)
    tl.store(of_set + 2 * BLOCK_C, sum0_2)
    tl.store(of_set + 3 * BLOCK_C, sum1_2)
    ok = channel < c
    out = partials + group * (2 * c + c * c + 1)
    tl.store(out + channel, sum1_1 + sum1_2, mask=ok)
    tl.store(out + c + channel, sum0_1 + sum0_2, mask=ok)
    at = out + 2 * c + channel[None, :] * c + channel[:, None]
    tl.store(at, grad_feat * alpha_value, mask=ok[:, None] & ok[None, :])
    tl.store(out + 2 * c + c * c, grad_alpha)
