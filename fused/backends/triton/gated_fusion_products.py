"""What the kernels of gated_fusion share: tiles of maps, products of them, batch-norm statistics.

Every tile is (BLOCK_P pixels of one sample, channels): pixels are rows, so that the operand with a
prologue (gate, norm) is the left one, which tensor cores take from registers. The pixel tiles of
all samples are numbered, sample·tiles + tile: such a number is called a part. Programs of one part
and successive channels follow each other, so that a map comes once from memory, then from L2.

A product reads weight[k, o] by two strides; either axis may be the contiguous one. Its operands are
rounded to the map's dtype, it sums in float32. Moments (parts, 2, C) are the mean and the sum of
squared deviations of every channel in a part; both are of the values as stored, because those are
normalised.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import merge_moments, offset

# ------------------------------------------------------------------------------------------- tiles


@triton.jit
def place(part, tiles, pixels, BLOCK_P: tl.constexpr):
    """Sample of a part, its pixels h·W + w, and which of these there are."""
    pixel = (part % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    return tl.cast(part // tiles, tl.int64), pixel, pixel < pixels


@triton.jit
def tile_offsets(pixel, channel, strides, WIDE: tl.constexpr):
    """Offsets of a tile into its sample of a map of `strides` (batch, channel, pixel)."""
    along_pixels = offset(pixel[:, None], strides[2], WIDE)
    return along_pixels + offset(channel[None, :], strides[1], WIDE)


@triton.jit
def load_tile(x, sample, pixel, channel, ok, strides, WIDE: tl.constexpr):
    """A tile of the map x in float32, zero where not ok."""
    at = x + sample * strides[0] + tile_offsets(pixel, channel, strides, WIDE)
    return tl.load(at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load_gates(w, sample, pixel, channel, ok, size, strides, WIDE: tl.constexpr):
    """w spread over the `size` channels of its groups, as a tile in float32."""
    return load_tile(w, sample, pixel, channel // size, ok, strides, WIDE)


@triton.jit
def store_tile(x, value, sample, pixel, channel, ok, strides, WIDE: tl.constexpr):
    """Store a tile of the map x."""
    at = x + sample * strides[0] + tile_offsets(pixel, channel, strides, WIDE)
    tl.store(at, value.to(x.dtype.element_ty), mask=ok)


@triton.jit
def load_vector(x, index, ok):
    """Values of a vector in float32, zero where not ok."""
    return tl.load(x + index, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def packed_numbers(weight, n, start, size):
    """Numbers n − start of a contiguous weight of `size` in float32, zero where it has none."""
    ok = (n >= start) & (n < start + size)
    return tl.load(weight + n - start, mask=ok, other=0.0).to(tl.float32)


# ---------------------------------------------------------------------------------------- products


@triton.jit
def add_gated_product(
    acc, e, w, weight, sample, pixel, inside, column, known, channels, size,
    e_strides, w_strides, weight_strides,
    BLOCK_K: tl.constexpr, ONE_GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Acc + Σ_k s[p, k]·weight[k, column] with s = e ⊙ w, over all channels.

    ONE_GROUP: BLOCK_K channels never straddle groups, so a tile needs one value of w a pixel.
    """
    lane = tl.arange(0, BLOCK_K)
    e += sample * e_strides[0]
    w += sample * w_strides[0]
    e_at = tile_offsets(pixel, lane, e_strides, WIDE)
    weight_at = lane[:, None] * weight_strides[0] + column[None, :] * weight_strides[1]
    w_at = offset(pixel, w_strides[2], WIDE)
    for k in range(0, channels, BLOCK_K):
        some = k + lane < channels
        ok = inside[:, None] & some[None, :]
        first = tl.cast(k, tl.int64)
        value = tl.load(e + first * e_strides[1] + e_at, mask=ok, other=0.0)
        if ONE_GROUP:
            row = w + tl.cast(k // size, tl.int64) * w_strides[1]
            gate = tl.load(row + w_at, mask=inside, other=0.0)[:, None]
        else:
            spread = offset((k + lane) // size, w_strides[1], WIDE)
            gate = tl.load(w + spread[None, :] + w_at[:, None], mask=ok, other=0.0)
        if w.dtype == e.dtype:
            s = value * gate
        else:
            s = (value.to(tl.float32) * gate.to(tl.float32)).to(value.dtype)
        factor = tl.load(
            weight + first * weight_strides[0] + weight_at,
            mask=some[:, None] & known[None, :],
            other=0.0,
        )
        acc = tl.dot(s, factor.to(s.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_product(
    acc, x, weight, affine, sample, pixel, inside, column, known, inputs, x_strides, weight_strides,
    RELU: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Acc + Σ_k f(x[p, k])·weight[k, column]; f is affine (scale, shift: (2, inputs)) and RELU.

    Without `affine` f is the identity.
    """
    lane = tl.arange(0, BLOCK_K)
    x += sample * x_strides[0]
    x_at = tile_offsets(pixel, lane, x_strides, WIDE)
    weight_at = lane[:, None] * weight_strides[0] + column[None, :] * weight_strides[1]
    for k in range(0, inputs, BLOCK_K):
        some = k + lane < inputs
        first = tl.cast(k, tl.int64)
        ok = inside[:, None] & some[None, :]
        value = tl.load(x + first * x_strides[1] + x_at, mask=ok, other=0.0)
        if affine is not None:
            value = apply_affine(value, affine, k + lane, some, inputs, RELU)
        factor = tl.load(
            weight + first * weight_strides[0] + weight_at,
            mask=some[:, None] & known[None, :],
            other=0.0,
        )
        acc = tl.dot(value, factor.to(value.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def apply_affine(value, affine, channel, some, channels, RELU: tl.constexpr):
    """A batch norm as scale and shift (2, channels), then perhaps ReLU; rounded as `value` is."""
    scale = tl.load(affine + channel, mask=some, other=0.0)
    shift = tl.load(affine + channels + channel, mask=some, other=0.0)
    result = value.to(tl.float32) * scale[None, :] + shift[None, :]
    if RELU:
        result = tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return result.to(value.dtype)


# ------------------------------------------------------------------------------------------- norms


@triton.jit
def norm_affine(mean, var, weight, bias, eps):
    """Scale and shift of a batch norm."""
    scale = weight * tl.rsqrt(var + eps)
    return scale, bias - mean * scale


@triton.jit
def norm_backward(grad, value_at, ok, slopes, channel, some, channels, TRAINING: tl.constexpr):
    """BNᵀ of a tile: gain·grad + slope·(value − mean) + level, rounded as `grad` is."""
    result = grad.to(tl.float32) * tl.load(slopes + channel, mask=some, other=0.0)[None, :]
    if TRAINING:
        slope = tl.load(slopes + channels + channel, mask=some, other=0.0)
        level = tl.load(slopes + 2 * channels + channel, mask=some, other=0.0)
        mean = tl.load(slopes + 3 * channels + channel, mask=some, other=0.0)
        value = tl.load(value_at, mask=ok, other=0.0).to(tl.float32)
        result += slope[None, :] * (value - mean[None, :]) + level[None, :]
    return result.to(grad.dtype)


@triton.jit
def store_with_moments(
    acc, out, moments, part, sample, pixel, inside, column, known, columns, out_strides,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Store a product's tile, and its moments unless that is None."""
    value = acc.to(out.dtype.element_ty)
    ok = inside[:, None] & known[None, :]
    store_tile(out, value, sample, pixel, column, ok, out_strides, WIDE)
    if moments is not None:
        value = value.to(tl.float32)
        count = tl.sum(inside.to(tl.float32), axis=0)
        mean = tl.sum(tl.where(inside[:, None], value, 0.0), axis=0) / count
        deviation = tl.where(inside[:, None], value - mean[None, :], 0.0)
        row = moments + tl.cast(part, tl.int64) * 2 * columns + column
        tl.store(row, mean, mask=known)
        tl.store(row + columns, tl.sum(deviation * deviation, axis=0), mask=known)


@triton.jit
def batch_statistics(
    moments, channel, known, channels, parts, tiles, pixels,
    TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of channels from the moments of all parts of TILE pixels."""
    mean = tl.zeros((ROWS, BLOCK_C), tl.float32)
    m2 = tl.zeros((ROWS, BLOCK_C), tl.float32)
    seen = tl.zeros((ROWS,), tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        count = tl.minimum(pixels - part % tiles * TILE, TILE)
        count = tl.where(part < parts, count, 0).to(tl.float32)
        row = moments + part.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        ok = (part < parts)[:, None] & known[None, :]
        # Chan's formula for two parts: rows keep a union each, merged behind the loop.
        total = tl.maximum(seen + count, 1.0)
        delta = tl.load(row, mask=ok, other=0.0) - mean
        share = (count / total)[:, None]
        m2 += tl.load(row + channels, mask=ok, other=0.0) + delta * delta * seen[:, None] * share
        mean += delta * share
        seen += count
    mean, m2, total = merge_moments(mean, m2, seen[:, None])
    return mean, m2 / total
