"""What the kernels of cross_spatial share: the layout of scratch, packed weights, tiles.

A slab is one group of one sample, c channels of H×W pixels, numbered b·G + g. Scratch holds slabs
as sheets (H·W, BLOCK_C), pixels first and channels padded with zeros to a power of two: a shifted
pixel is then a row of aligned 16-byte loads, whatever the layout of e. A sheet may hold a band of
rows only; its pointer is moved so that the pixel h·W + w of the whole slab indexes it.

Weights are packed once a call to tiles (BLOCK_C inputs, BLOCK_C outputs), zero-padded, in the
dtype of the products, in the order of the constants below.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Positions of the packed tiles: 3×3 of e; 1×1, 3×3, 5×5 of the network; attention (3 outputs × 3
# inputs); reduction (3 inputs); channel_feat.
TILE_CONV3X3 = tl.constexpr(0)
TILE_SPATIAL1 = tl.constexpr(9)
TILE_SPATIAL3 = tl.constexpr(10)
TILE_SPATIAL5 = tl.constexpr(19)
TILE_ATTENTION = tl.constexpr(44)
TILE_REDUCE = tl.constexpr(53)
TILE_CHANNEL_FEAT = tl.constexpr(56)
TILES = 57


@triton.jit
def cross_spatial_pack_kernel(
    conv3x3, spatial1, spatial3, spatial5, attention, reduce, channel_feat, packed, counters,
    slabs, c, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program t < TILES packs tile t; the last zeroes the arrival counters of the slabs."""
    t = tl.program_id(0)
    if t == 57:
        for start in range(0, slabs, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            tl.store(counters + n, tl.zeros((BLOCK_N,), tl.int32), mask=n < slabs)
        return
    i = tl.arange(0, BLOCK_C)[:, None]
    o = tl.arange(0, BLOCK_C)[None, :]
    ok = (i < c) & (o < c)
    at = o * c + i
    if t < 9:
        value = tl.load(conv3x3 + at * 9 + t, mask=ok, other=0.0).to(tl.float32)
    elif t < 10:
        value = tl.load(spatial1 + at, mask=ok, other=0.0).to(tl.float32)
    elif t < 19:
        value = tl.load(spatial3 + at * 9 + t - 10, mask=ok, other=0.0).to(tl.float32)
    elif t < 44:
        value = tl.load(spatial5 + at * 25 + t - 19, mask=ok, other=0.0).to(tl.float32)
    elif t < 53:
        # Tile 3·k + j of the attention: outputs k·c + o from inputs j·c + i.
        row, column = ((t - 44) // 3) * c + o, ((t - 44) % 3) * c + i
        value = tl.load(attention + row * (3 * c) + column, mask=ok, other=0.0).to(tl.float32)
    elif t < 56:
        value = tl.load(reduce + o * (3 * c) + (t - 53) * c + i, mask=ok, other=0.0).to(tl.float32)
    else:
        value = tl.load(channel_feat + at, mask=ok, other=0.0).to(tl.float32)
    out = packed + t * BLOCK_C * BLOCK_C + i * BLOCK_C + o
    tl.store(out, value.to(packed.dtype.element_ty))


# ---------------------------------------------------------------------------------------- tiles


@triton.jit
def weight_tile(packed, t, BLOCK_C: tl.constexpr):
    """Packed tile t, (inputs, outputs)."""
    i = tl.arange(0, BLOCK_C)
    return tl.load(packed + t * (BLOCK_C * BLOCK_C) + i[:, None] * BLOCK_C + i[None, :])


@triton.jit
def weight_tile_transposed(packed, t, BLOCK_C: tl.constexpr):
    """Packed tile t, (outputs, inputs)."""
    i = tl.arange(0, BLOCK_C)
    return tl.load(packed + t * (BLOCK_C * BLOCK_C) + i[None, :] * BLOCK_C + i[:, None])


@triton.jit
def hidden_zero(start):
    """0 as the compiler cannot tell it, from a pixel number: a slab has less than 2**30 pixels.

    Added to a pointer it keeps the loads of a dozen weight tiles inside the loop over pixels, and
    to a bound it keeps the loops over taps rolled: both would fill all registers otherwise.
    """
    return start >> 30


@triton.jit
def load_tile(sheet, pixel, inside, BLOCK_C: tl.constexpr):
    """Pixels of a sheet, (BLOCK_P, BLOCK_C), zero where not inside."""
    channel = tl.arange(0, BLOCK_C)
    at = pixel[:, None] * BLOCK_C + channel[None, :]
    return tl.load(sheet + at, mask=inside[:, None], other=0.0)


@triton.jit
def store_tile(sheet, pixel, inside, value, BLOCK_C: tl.constexpr):
    """Store (BLOCK_P, BLOCK_C) into a sheet."""
    channel = tl.arange(0, BLOCK_C)
    at = pixel[:, None] * BLOCK_C + channel[None, :]
    tl.store(sheet + at, value.to(sheet.dtype.element_ty), mask=inside[:, None])


@triton.jit
def load_shifted(sheet, pixel, dy, dx, first_row, end_row, W, BLOCK_C: tl.constexpr):
    """Pixels moved by (dy, dx), zero outside rows first_row…end_row − 1 and columns 0…W − 1."""
    row, column = pixel // W + dy, pixel % W + dx
    inside = (row >= first_row) & (row < end_row) & (column >= 0) & (column < W)
    return load_tile(sheet, pixel + dy * W + dx, inside, BLOCK_C)


@triton.jit
def vector(pointer, c, BLOCK_C: tl.constexpr, OTHER: tl.constexpr):
    """c values as (BLOCK_C,) float32, padded with OTHER."""
    channel = tl.arange(0, BLOCK_C)
    return tl.load(pointer + channel, mask=channel < c, other=OTHER).to(tl.float32)


@triton.jit
def outer_tap(i):
    """(dy, dx) of tap i of the 16 taps of a 5×5 kernel that its inner 3×3 lacks."""
    dy = tl.where(i < 5, -2, tl.where(i < 10, 2, (i - 10) // 2 - 1))
    dx = tl.where(i < 10, i % 5 - 2, (i - 10) % 2 * 4 - 2)
    return dy, dx


# ------------------------------------------------------------------------------------- branches


@triton.jit
def copy_and_normalise(
    e, copy, x1, alpha_h, alpha_w, centre, scale, shift, pixel, inside, H, W, c, stride_c, stride_p,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write a tile of e and of x1 = (e·αw·αh − centre)·scale + shift into their sheets.

    u as coordinate attention rounds it, and − centre first: what rounding leaves of a map without
    spread would be multiplied by 1/√ε.
    """
    channel = tl.arange(0, BLOCK_C)[None, :]
    ok = inside[:, None] & (channel < c)
    at = channel.to(tl.int64) * stride_c + pixel[:, None].to(tl.int64) * stride_p
    value = tl.load(e + at, mask=ok, other=0.0)
    row, column = (pixel // W)[:, None], (pixel % W)[:, None]
    gate_h = tl.load(alpha_h + channel * H + row, mask=ok, other=0.0)
    gate_w = tl.load(alpha_w + channel * W + column, mask=ok, other=0.0)
    store_tile(copy, pixel, inside, value, BLOCK_C)
    n = value.to(tl.float32) * gate_w * gate_h - centre[None, :]
    store_tile(x1, pixel, inside, n * scale[None, :] + shift[None, :], BLOCK_C)


@triton.jit
def conv3x3_tile(
    copy, packed, bias, pixel, first_row, end_row, W, zero,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x2 = K3 ∗ e + b3 at a tile, (BLOCK_P, BLOCK_C) float32."""
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in range(0, 9 + zero):
        x = load_shifted(copy, pixel, tap // 3 - 1, tap % 3 - 1, first_row, end_row, W, BLOCK_C)
        k = weight_tile(packed, TILE_CONV3X3 + tap, BLOCK_C)
        acc = tl.dot(x, k, acc, input_precision=PRECISION)
    return acc + bias[None, :]


# -------------------------------------------------------------------------------------- network


@triton.jit
def features_tile(
    x, packed, pixel, first_row, end_row, W, zero,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The three convolutions of X at a tile, (BLOCK_P, BLOCK_C) each, rounded to X's dtype.

    The inner taps of the 5×5 kernel share their input with the 3×3 kernel.
    """
    f3 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    f5 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in range(0, 9 + zero):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        value = load_shifted(x, pixel, dy, dx, first_row, end_row, W, BLOCK_C)
        k3 = weight_tile(packed, TILE_SPATIAL3 + tap, BLOCK_C)
        f3 = tl.dot(value, k3, f3, input_precision=PRECISION)
        k5 = weight_tile(packed, TILE_SPATIAL5 + (dy + 2) * 5 + dx + 2, BLOCK_C)
        f5 = tl.dot(value, k5, f5, input_precision=PRECISION)
    for tap in range(0, 16 + zero):
        dy, dx = outer_tap(tap)
        value = load_shifted(x, pixel, dy, dx, first_row, end_row, W, BLOCK_C)
        k5 = weight_tile(packed, TILE_SPATIAL5 + (dy + 2) * 5 + dx + 2, BLOCK_C)
        f5 = tl.dot(value, k5, f5, input_precision=PRECISION)
    centre = load_shifted(x, pixel, 0, 0, first_row, end_row, W, BLOCK_C)
    f1 = tl.dot(centre, weight_tile(packed, TILE_SPATIAL1, BLOCK_C), input_precision=PRECISION)
    dtype = x.dtype.element_ty
    return f1.to(dtype), f3.to(dtype), f5.to(dtype)


@triton.jit
def attention_logits(f1, f3, f5, packed, k, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """Rows k·c…(k + 1)·c − 1 of Wa ∗ f, (BLOCK_P, BLOCK_C) float32."""
    first = TILE_ATTENTION + 3 * k
    out = tl.dot(f1, weight_tile(packed, first, BLOCK_C), input_precision=PRECISION)
    out = tl.dot(f3, weight_tile(packed, first + 1, BLOCK_C), out, input_precision=PRECISION)
    return tl.dot(f5, weight_tile(packed, first + 2, BLOCK_C), out, input_precision=PRECISION)


@triton.jit
def reduce_step(
    f1, f3, f5, own, acc, packed, scale, shift, K: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add Wr ∗ (A ⊙ f) of features K, `own`, to acc; the attention's norm is scale and shift."""
    logits = attention_logits(f1, f3, f5, packed, K, BLOCK_C, PRECISION)
    attention = tl.sigmoid(logits * scale[None, :] + shift[None, :])
    weighted = (attention * own.to(tl.float32)).to(own.dtype)
    weight = weight_tile(packed, TILE_REDUCE + K, BLOCK_C)
    return tl.dot(weighted, weight, acc, input_precision=PRECISION)


@triton.jit
def reduced_tile(
    f1, f3, f5, packed, scale1, shift1, scale3, shift3, scale5, shift5,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Wr ∗ (σ(BN(Wa ∗ f)) ⊙ f), (BLOCK_P, BLOCK_C) float32; the norm as scales and shifts."""
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    acc = reduce_step(f1, f3, f5, f1, acc, packed, scale1, shift1, 0, BLOCK_C, PRECISION)
    acc = reduce_step(f1, f3, f5, f3, acc, packed, scale3, shift3, 1, BLOCK_C, PRECISION)
    return reduce_step(f1, f3, f5, f5, acc, packed, scale5, shift5, 2, BLOCK_C, PRECISION)


@triton.jit
def folded(weight, bias, mean, var, eps, c, BLOCK_C: tl.constexpr):
    """Scale and shift (BLOCK_C,) of a batch norm; weight and bias are pointers, zero-padded."""
    scale = vector(weight, c, BLOCK_C, 0.0) / tl.sqrt_rn(var + eps)
    return scale, vector(bias, c, BLOCK_C, 0.0) - mean * scale


@triton.jit
def folded_running(weight, bias, mean, var, eps, c, BLOCK_C: tl.constexpr):
    """As `folded`, from pointers to saved statistics."""
    mean_c, var_c = vector(mean, c, BLOCK_C, 0.0), vector(var, c, BLOCK_C, 1.0)
    return folded(weight, bias, mean_c, var_c, eps, c, BLOCK_C)


@triton.jit
def reduced_tile_running(
    f1, f3, f5, packed, weight, bias, mean, var, eps, c,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `reduced_tile`, from pointers: vectors held over a loop would cost 64 registers."""
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    a, b = folded_running(weight, bias, mean, var, eps, c, BLOCK_C)
    acc = reduce_step(f1, f3, f5, f1, acc, packed, a, b, 0, BLOCK_C, PRECISION)
    a, b = folded_running(weight + c, bias + c, mean + c, var + c, eps, c, BLOCK_C)
    acc = reduce_step(f1, f3, f5, f3, acc, packed, a, b, 1, BLOCK_C, PRECISION)
    a, b = folded_running(weight + 2 * c, bias + 2 * c, mean + 2 * c, var + 2 * c, eps, c, BLOCK_C)
    return reduce_step(f1, f3, f5, f5, acc, packed, a, b, 2, BLOCK_C, PRECISION)


# -------------------------------------------------------------------------------------- moments


@triton.jit
def tile_moments(x, inside, count):
    """Mean and sum of squared deviations of the `count` pixels inside, (BLOCK_C,) each."""
    mean = tl.sum(tl.where(inside[:, None], x, 0.0), axis=0) / count
    deviation = tl.where(inside[:, None], x - mean[None, :], 0.0)
    return mean, tl.sum(deviation * deviation, axis=0)


@triton.jit
def merge_two(mean, m2, count, mean_b, m2_b, count_b):
    """Moments of a union from those of two parts; the counts are numbers, count_b above 0."""
    total = count + count_b
    delta = mean_b - mean
    m2 = m2 + m2_b + delta * delta * (count * count_b / total)
    return mean + delta * (count_b / total), m2, total


@triton.jit
def merge_rows(
    mean_rows, m2_rows, first, step, rows, stride, c, count,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Merge the moments of rows first, first + step, … of `count` values each; fixed order.

    Returns mean and biased variance, (BLOCK_C,).
    """
    channel = tl.arange(0, BLOCK_C)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    total = 0.0
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        ok = (row < rows)[:, None] & (channel < c)[None, :]
        at = (first + row * step)[:, None].to(tl.int64) * stride + channel[None, :]
        part_mean = tl.load(mean_rows + at, mask=ok, other=0.0)
        part_m2 = tl.load(m2_rows + at, mask=ok, other=0.0)
        parts = tl.sum((row < rows).to(tl.float32), axis=0)
        mean_b = tl.sum(part_mean, axis=0) / parts
        deviation = tl.where(ok, part_mean - mean_b[None, :], 0.0)
        m2_b = tl.sum(part_m2 + deviation * deviation * count, axis=0)
        mean, m2, total = merge_two(mean, m2, total, mean_b, m2_b, parts * count)
    return mean, m2 / total


@triton.jit
def sum_rows(
    rows_pointer, first, step, rows, stride, c, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Σ of rows first, first + step, … in a fixed order, (BLOCK_C,) float32."""
    channel = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        ok = (row < rows)[:, None] & (channel < c)[None, :]
        at = (first + row * step)[:, None].to(tl.int64) * stride + channel[None, :]
        total += tl.sum(tl.load(rows_pointer + at, mask=ok, other=0.0), axis=0)
    return total


# ------------------------------------------------------------------------------- cross-attention


@triton.jit
def softmax(mean, c, BLOCK_C: tl.constexpr):
    """Softmax over the c channels of (BLOCK_C,); zero in the padding."""
    channel = tl.arange(0, BLOCK_C)
    value = tl.where(channel < c, mean, -float("inf"))
    # A NaN must reach every channel, as in eager; max alone may drop it.
    value = tl.exp(value - tl.max(value, axis=0))
    return value / tl.sum(value, axis=0)
