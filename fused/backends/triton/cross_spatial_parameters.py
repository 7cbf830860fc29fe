"""The last kernels of cross_spatial's backward: from X's gradient to e, its gates, and the weights.

branches      one program a slab: the 3×3 convolution's and the group norm's gradients meet in e's;
              sums along rows and columns for the gates, over the slab for mean and rstd
convolutions  gradients of the four convolutions: one program a (row of taps, share of the slabs)
Sums are float32; operands of products have e's dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_spatial_tiles import (
    TILE_CONV3X3,
    hidden_zero,
    load_shifted,
    load_tile,
    vector,
    weight_tile_transposed,
)

# Rows of taps: 5 of the 5×5, 3 of the 3×3, the 1×1, 3 of the 3×3 before the branches.
TAP_ROWS = 12


@triton.jit
def _load_map(e, pixel, inside, c, stride_c, stride_p, BLOCK_C: tl.constexpr):
    """Pixels of a slab of e, (BLOCK_W, BLOCK_C) float32, zero outside."""
    channel = tl.arange(0, BLOCK_C)[None, :]
    at = channel.to(tl.int64) * stride_c + pixel[:, None].to(tl.int64) * stride_p
    return tl.load(e + at, mask=inside[:, None] & (channel < c), other=0.0).to(tl.float32)


@triton.jit
def _load_gate(alpha, size, position, inside, c, BLOCK_C: tl.constexpr):
    """Gates (c, size) at positions, (BLOCK_W, BLOCK_C)."""
    channel = tl.arange(0, BLOCK_C)[None, :]
    ok = inside[:, None] & (channel < c)
    return tl.load(alpha + channel * size + position[:, None], mask=ok, other=0.0)


@triton.jit
def _conv3x3_backward(
    grad_x2, packed, pixel, H, W, zero,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of K3 ∗ e for e at pixels, (BLOCK_W, BLOCK_C) float32."""
    acc = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for tap in range(0, 9 + zero):
        g = load_shifted(grad_x2, pixel, 1 - tap // 3, 1 - tap % 3, 0, H, W, BLOCK_C)
        k = weight_tile_transposed(packed, TILE_CONV3X3 + tap, BLOCK_C)
        acc = tl.dot(g, k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def cross_spatial_branches_backward_kernel(
    e, grad_sheets, packed, alpha_h, alpha_w, mean, rstd, gn_weight,
    grad_e, grad_alpha_h, grad_alpha_w, grad_mean, grad_rstd, partials,
    slabs, G, H, W, c, stride_b, stride_c, stride_p, grad_stride_b, grad_stride_c, grad_stride_p,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a slab; partials (slabs, 3c): gradients of γ and β of the norm, and of b3."""
    slab = tl.program_id(0).to(tl.int64)
    P = H * W
    source = e + (slab // G) * stride_b + (slab % G) * c * stride_c
    target = grad_e + (slab // G) * grad_stride_b + (slab % G) * c * grad_stride_c
    grad_x1 = grad_sheets + slab * P * BLOCK_C
    grad_x2 = grad_sheets + (slabs + slab) * P * BLOCK_C
    at = slab * c
    of_rows, of_columns = alpha_h + at * H, alpha_w + at * W
    scale = vector(rstd + at, c, BLOCK_C, 0.0)
    gamma = vector(gn_weight, c, BLOCK_C, 0.0)
    centre = vector(mean + at, c, BLOCK_C, 0.0)
    channel = tl.arange(0, BLOCK_C)
    ok = channel < c
    total = tl.zeros((BLOCK_C,), tl.float32)
    deviation = tl.zeros((BLOCK_C,), tl.float32)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    for row in tl.range(0, H, disable_licm=True):  # what is held over it would spill
        gate_h = tl.load(of_rows + channel * H + row, mask=ok, other=0.0)
        along_row = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, W, BLOCK_W):
            column = start + tl.arange(0, BLOCK_W)
            inside = column < W
            # Columns past the end lie in the next row, where load_shifted would find neighbours.
            pixel = tl.where(inside, row * W + column, H * W + 2 * W)
            acc = _conv3x3_backward(
                grad_x2, packed, pixel, H, W, hidden_zero(row), BLOCK_C, BLOCK_W, PRECISION
            )
            bias += tl.sum(load_tile(grad_x2, pixel, inside, BLOCK_C).to(tl.float32), axis=0)
            g = load_tile(grad_x1, pixel, inside, BLOCK_C).to(tl.float32)
            x = _load_map(source, pixel, inside, c, stride_c, stride_p, BLOCK_C)
            gate_w = _load_gate(of_columns, W, column, inside, c, BLOCK_C)
            u = x * gate_w * gate_h[None, :]
            total += tl.sum(g, axis=0)
            deviation += tl.sum(g * (u - centre[None, :]), axis=0)
            grad_u = g * (scale * gamma)[None, :]
            along_row += tl.sum(grad_u * x * gate_w, axis=0)
            acc += grad_u * gate_w * gate_h[None, :]
            out = pixel[:, None].to(tl.int64) * grad_stride_p
            out += channel[None, :].to(tl.int64) * grad_stride_c
            square = inside[:, None] & ok[None, :]
            tl.store(target + out, acc.to(grad_e.dtype.element_ty), mask=square)
        tl.store(grad_alpha_h + at * H + channel * H + row, along_row, mask=ok)
    for start in range(0, W, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)
        inside = column < W
        along_column = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
        for row in range(0, H):
            pixel = row * W + column
            g = load_tile(grad_x1, pixel, inside, BLOCK_C).to(tl.float32)
            x = _load_map(source, pixel, inside, c, stride_c, stride_p, BLOCK_C)
            gate_h = tl.load(of_rows + channel * H + row, mask=ok, other=0.0)
            along_column += g * x * (scale * gamma * gate_h)[None, :]
        out = grad_alpha_w + at * W + channel[None, :] * W + column[:, None]
        tl.store(out, along_column, mask=inside[:, None] & ok[None, :])
    tl.store(grad_mean + at + channel, -total * gamma * scale, mask=ok)
    tl.store(grad_rstd + at + channel, deviation * gamma, mask=ok)
    own = partials + slab * 3 * c + channel
    tl.store(own, deviation * scale, mask=ok)
    tl.store(own + c, total, mask=ok)
    tl.store(own + 2 * c, bias, mask=ok)


@triton.jit
def _tap(grad, x, acc, pixel, dy, dx, H, W, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """Add Σ over pixels of gradᵀ·x(moved by (dy, dx)), (outputs, inputs)."""
    value = load_shifted(x, pixel, dy, dx, 0, H, W, BLOCK_C)
    return tl.dot(grad, value, acc, input_precision=PRECISION)


@triton.jit
def cross_spatial_convolutions_backward_kernel(
    sheets, grad_features, grad_sheets, partials, slabs, H, W, c, shares,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (TAP_ROWS, shares of the rows); partials (shares, 44·c·c).

    The kernels stand one after another: 5×5, 3×3, 1×1 of the network, 3×3 of e, each (outputs,
    inputs, taps) as the parameter is.
    """
    job, share = tl.program_id(0), tl.program_id(1)
    wide = share.to(tl.int64) * 0
    P = H * W
    size = P * BLOCK_C
    network = job < 9
    # Which of f1, f3, f5, its radius, this row of taps, and where the kernel's gradient begins.
    part = tl.where(job < 5, 2, tl.where(job < 8, 1, 0))
    radius = tl.where(network, part, 1)
    dy = tl.where(job < 5, job - 2, tl.where(job < 8, job - 6, tl.where(network, 0, job - 10)))
    first = tl.where(job < 5, 0, tl.where(job < 8, 25, tl.where(network, 34, 35))) * c * c
    rows = tl.where(network, 2 * slabs, slabs)
    left2 = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    left1, centre, right1, right2 = left2, left2, left2, left2
    for row in range(share, rows, shares):
        at = wide + row
        if network:
            x, grads = sheets + at * size, grad_features + (at * 3 + part) * size
        else:
            x, grads = sheets + (2 * slabs + at) * size, grad_sheets + (slabs + at) * size
        for start in range(0, P, BLOCK_P):
            pixel = start + tl.arange(0, BLOCK_P)
            grad = tl.trans(load_tile(grads, pixel, pixel < P, BLOCK_C))
            centre = _tap(grad, x, centre, pixel, dy, 0, H, W, BLOCK_C, PRECISION)
            if radius > 0:
                left1 = _tap(grad, x, left1, pixel, dy, -1, H, W, BLOCK_C, PRECISION)
                right1 = _tap(grad, x, right1, pixel, dy, 1, H, W, BLOCK_C, PRECISION)
            if radius > 1:
                left2 = _tap(grad, x, left2, pixel, dy, -2, H, W, BLOCK_C, PRECISION)
                right2 = _tap(grad, x, right2, pixel, dy, 2, H, W, BLOCK_C, PRECISION)
    width = 2 * radius + 1
    i = tl.arange(0, BLOCK_C)
    ok = (i[:, None] < c) & (i[None, :] < c)
    out = partials + share.to(tl.int64) * 44 * c * c + first
    out += (i[:, None] * c + i[None, :]) * (width * width) + (dy + radius) * width + radius
    tl.store(out, centre, mask=ok)
    tl.store(out - 1, left1, mask=ok & (radius > 0))
    tl.store(out + 1, right1, mask=ok & (radius > 0))
    tl.store(out - 2, left2, mask=ok & (radius > 1))
    tl.store(out + 2, right2, mask=ok & (radius > 1))
