"""Coordinate attention (spec.md 2.2) in Triton: gates and group-norm statistics, both directions.

One program a slab (one sample's group, c channels of H×W), which stays in the second-level cache
while the program walks over it, so device memory sees e once a launch:
    p = row means, then column means       (H + W, BLOCK_C) float32, scratch
    α = σ(K·p + b)                         one product a block of positions
    mean, rstd of u = e·αh·αw              row by row, merged by Chan's formula
The backward walks again: gradients of the gates, of p through K, then of e. Its second launch adds
the slabs' gradients of K and b in a fixed order. Everything is float32, products in full precision
whatever torch allows: they are tiny.

u is multiplied in one order everywhere and never fused into the subtraction of its mean: where the
variance vanishes (one pixel, a flat map) u − mean has to be the zero that the large slope expects.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...contract import memory_format
from . import configs
from .cross_spatial_tiles import tile_moments, vector
from .launch import flat, launch, power_of_two, strides
from .reduction import sum_partials


@triton.jit
def _load(e, pixel, inside, c, stride_c, stride_p, BLOCK_C: tl.constexpr):
    """Pixels of a slab, (BLOCK_W, BLOCK_C) float32, zero outside."""
    channel = tl.arange(0, BLOCK_C)[None, :]
    at = pixel[:, None].to(tl.int64) * stride_p + channel.to(tl.int64) * stride_c
    return tl.load(e + at, mask=inside[:, None] & (channel < c), other=0.0).to(tl.float32)


@triton.jit
def _load_gates(alpha, position, inside, size, c, BLOCK_C: tl.constexpr):
    """Gates (c, size) at positions, (BLOCK_W, BLOCK_C) float32."""
    channel = tl.arange(0, BLOCK_C)[None, :]
    ok = inside[:, None] & (channel < c)
    return tl.load(alpha + channel * size + position[:, None], mask=ok, other=0.0)


@triton.jit
def _pool(e, pooled, H, W, c, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr):
    """Row means, then column means, to pooled (H + W, BLOCK_C)."""
    channel = tl.arange(0, BLOCK_C)
    for row in range(0, H):
        total = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, W, BLOCK_W):
            column = start + tl.arange(0, BLOCK_W)
            x = _load(e, row * W + column, column < W, c, stride_c, stride_p, BLOCK_C)
            total += tl.sum(x, axis=0)
        tl.store(pooled + row * BLOCK_C + channel, total / W)
    for start in range(0, W, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)
        inside = column < W
        sums = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
        for row in range(0, H):
            sums += _load(e, row * W + column, inside, c, stride_c, stride_p, BLOCK_C)
        at = (H + column)[:, None] * BLOCK_C + channel[None, :]
        tl.store(pooled + at, sums / H, mask=inside[:, None])


@triton.jit
def _kernel_tile(weight, c, BLOCK_C: tl.constexpr):
    """K as (outputs, inputs) float32, zero-padded."""
    i = tl.arange(0, BLOCK_C)
    ok = (i[:, None] < c) & (i[None, :] < c)
    return tl.load(weight + i[:, None] * c + i[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _gates(
    pooled, weight, bias, alpha, first, size, c, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr
):
    """σ(K·p + b) at positions first…first + size − 1 of pooled, to alpha (c, size)."""
    channel = tl.arange(0, BLOCK_C)[None, :]
    kernel = tl.trans(_kernel_tile(weight, c, BLOCK_C))
    shift = vector(bias, c, BLOCK_C, 0.0)
    for start in range(0, size, BLOCK_W):
        position = start + tl.arange(0, BLOCK_W)
        inside = position < size
        at = (first + position)[:, None] * BLOCK_C + channel
        p = tl.load(pooled + at, mask=inside[:, None], other=0.0)
        gate = tl.sigmoid(tl.dot(p, kernel, input_precision="ieee") + shift[None, :])
        out = alpha + channel * size + position[:, None]
        tl.store(out, gate, mask=inside[:, None] & (channel < c))


@triton.jit
def coordinate_attention_forward_kernel(
    e, pooled, weight, bias, alpha_h, alpha_w, mean, rstd,
    G, H, W, c, eps, stride_b, stride_c, stride_p,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """alpha_h (slabs, c, H), alpha_w (…, W), mean and rstd (slabs, c); one program a slab."""
    slab = tl.program_id(0).to(tl.int64)
    source = e + (slab // G) * stride_b + (slab % G) * c * stride_c
    p = pooled + slab * (H + W) * BLOCK_C
    of_rows, of_columns = alpha_h + slab * c * H, alpha_w + slab * c * W
    _pool(source, p, H, W, c, stride_c, stride_p, BLOCK_C, BLOCK_W)
    tl.debug_barrier()  # other threads of this program read p, and then the gates
    _gates(p, weight, bias, of_rows, 0, H, c, BLOCK_C, BLOCK_W)
    _gates(p, weight, bias, of_columns, H, W, c, BLOCK_C, BLOCK_W)
    tl.debug_barrier()
    channel = tl.arange(0, BLOCK_C)
    ok = channel < c
    # From the first pixel's u on: the mean of equal values, as a rounded sum, would not be theirs.
    average = tl.load(source + channel * stride_c, mask=ok, other=0.0).to(tl.float32)
    average *= tl.load(of_columns + channel * W, mask=ok, other=0.0)
    average *= tl.load(of_rows + channel * H, mask=ok, other=0.0)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for start in range(0, W, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)
        inside = column < W
        part = tl.sum(inside.to(tl.float32), axis=0)
        gate_w = _load_gates(of_columns, column, inside, W, c, BLOCK_C)
        for row in range(0, H):
            x = _load(source, row * W + column, inside, c, stride_c, stride_p, BLOCK_C)
            gate_h = tl.load(of_rows + channel * H + row, mask=ok, other=0.0)
            u = x * gate_w * gate_h[None, :]
            delta, m2_b = tile_moments(u - average[None, :], inside, part)
            m2 += m2_b + delta * delta * (count * part / (count + part))
            count += part
            average += delta * (part / count)
    tl.store(mean + slab * c + channel, average, mask=ok)
    tl.store(rstd + slab * c + channel, 1.0 / tl.sqrt_rn(m2 / count + eps), mask=ok)


@triton.jit
def _gate_gradients(
    e, alpha_h, alpha_w, grad_alpha_h, grad_alpha_w, grad_logits, centre, slope, offset,
    H, W, c, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits K·p + b, to grad_logits (H + W, BLOCK_C); u's is affine in u."""
    channel = tl.arange(0, BLOCK_C)
    ok = channel < c
    for row in range(0, H):
        gate_h = tl.load(alpha_h + channel * H + row, mask=ok, other=0.0)
        total = tl.load(grad_alpha_h + channel * H + row, mask=ok, other=0.0)
        for start in range(0, W, BLOCK_W):
            column = start + tl.arange(0, BLOCK_W)
            inside = column < W
            x = _load(e, row * W + column, inside, c, stride_c, stride_p, BLOCK_C)
            gate_w = _load_gates(alpha_w, column, inside, W, c, BLOCK_C)
            # u − mean first: a tiny variance's slope is so large that the other order cancels.
            grad_u = (x * gate_w * gate_h[None, :] - centre[None, :]) * slope[None, :]
            total += tl.sum((grad_u + offset[None, :]) * x * gate_w, axis=0)
        tl.store(grad_logits + row * BLOCK_C + channel, total * gate_h * (1.0 - gate_h))
    for start in range(0, W, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)
        inside = column < W
        gate_w = _load_gates(alpha_w, column, inside, W, c, BLOCK_C)
        totals = _load_gates(grad_alpha_w, column, inside, W, c, BLOCK_C)
        for row in range(0, H):
            gate_h = tl.load(alpha_h + channel * H + row, mask=ok, other=0.0)[None, :]
            x = _load(e, row * W + column, inside, c, stride_c, stride_p, BLOCK_C)
            grad_u = (x * gate_w * gate_h - centre[None, :]) * slope[None, :] + offset[None, :]
            totals += grad_u * x * gate_h
        at = (H + column)[:, None] * BLOCK_C + channel[None, :]
        tl.store(grad_logits + at, totals * gate_w * (1.0 - gate_w), mask=inside[:, None])


@triton.jit
def _through_kernel(
    grad_logits, pooled, weight, partials, positions, c,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Replace p by its gradient Kᵀ·g; the slab's gradients of K (c, c) and b (c) to partials."""
    channel = tl.arange(0, BLOCK_C)
    kernel = _kernel_tile(weight, c, BLOCK_C)
    grad_kernel = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    grad_bias = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, positions, BLOCK_W):
        position = start + tl.arange(0, BLOCK_W)
        inside = (position < positions)[:, None]
        at = position[:, None] * BLOCK_C + channel[None, :]
        g = tl.load(grad_logits + at, mask=inside, other=0.0)
        p = tl.load(pooled + at, mask=inside, other=0.0)
        grad_kernel = tl.dot(tl.trans(g), p, grad_kernel, input_precision="ieee")
        grad_bias += tl.sum(g, axis=0)
        tl.store(pooled + at, tl.dot(g, kernel, input_precision="ieee"), mask=inside)
    ok = channel < c
    at = partials + channel[:, None] * c + channel[None, :]
    tl.store(at, grad_kernel, mask=ok[:, None] & ok[None, :])
    tl.store(partials + c * c + channel, grad_bias, mask=ok)


@triton.jit
def coordinate_attention_backward_kernel(
    grad_alpha_h, grad_alpha_w, grad_mean, grad_rstd, e, alpha_h, alpha_w, mean, rstd, weight,
    grad_e, pooled, grad_logits, partials,
    G, H, W, c, stride_b, stride_c, stride_p, grad_stride_b, grad_stride_c, grad_stride_p,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """grad_e, and rows of partials (slabs, c·c + c); one program a slab."""
    slab = tl.program_id(0).to(tl.int64)
    source = e + (slab // G) * stride_b + (slab % G) * c * stride_c
    target = grad_e + (slab // G) * grad_stride_b + (slab % G) * c * grad_stride_c
    p = pooled + slab * (H + W) * BLOCK_C
    g = grad_logits + slab * (H + W) * BLOCK_C
    of_rows, of_columns = alpha_h + slab * c * H, alpha_w + slab * c * W
    scale = vector(rstd + slab * c, c, BLOCK_C, 0.0)
    centre = vector(mean + slab * c, c, BLOCK_C, 0.0)
    slope = -vector(grad_rstd + slab * c, c, BLOCK_C, 0.0) * scale * scale * scale / (H * W)
    offset = vector(grad_mean + slab * c, c, BLOCK_C, 0.0) / (H * W)
    _pool(source, p, H, W, c, stride_c, stride_p, BLOCK_C, BLOCK_W)
    _gate_gradients(
        source, of_rows, of_columns, grad_alpha_h + slab * c * H, grad_alpha_w + slab * c * W,
        g, centre, slope, offset, H, W, c, stride_c, stride_p, BLOCK_C, BLOCK_W,
    )  # fmt: skip
    tl.debug_barrier()  # other threads of this program read p and g, and then p's gradient
    _through_kernel(g, p, weight, partials + slab * (c * c + c), H + W, c, BLOCK_C, BLOCK_W)
    tl.debug_barrier()
    channel = tl.arange(0, BLOCK_C)
    for start in range(0, W, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)
        inside = column < W
        gate_w = _load_gates(of_columns, column, inside, W, c, BLOCK_C)
        at = (H + column)[:, None] * BLOCK_C + channel[None, :]
        of_column = tl.load(p + at, mask=inside[:, None], other=0.0) / H
        for row in range(0, H):
            x = _load(source, row * W + column, inside, c, stride_c, stride_p, BLOCK_C)
            gate_h = tl.load(of_rows + channel * H + row, mask=channel < c, other=0.0)
            u = x * gate_w * gate_h[None, :]
            grad_u = (u - centre[None, :]) * slope[None, :] + offset[None, :]
            of_row = tl.load(p + row * BLOCK_C + channel) / W
            grad = grad_u * gate_w * gate_h[None, :] + of_column + of_row[None, :]
            out = (row * W + column)[:, None].to(tl.int64) * grad_stride_p
            out += channel[None, :].to(tl.int64) * grad_stride_c
            ok = inside[:, None] & (channel < c)[None, :]
            tl.store(target + out, grad.to(grad_e.dtype.element_ty), mask=ok)


# ------------------------------------------------------------------------------------- launchers


def forward(
    e: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, ...]:
    """As the reference's: alpha_h (B, C, H), alpha_w (…, W), mean and rstd (B, C); one launch."""
    e = flat(e)
    batch, channels, height, width = e.shape
    c, slabs = channels // groups, batch * groups
    block = power_of_two(c)
    alpha_h = torch.empty((batch, channels, height), dtype=torch.float32, device=e.device)
    alpha_w = alpha_h.new_empty((batch, channels, width))
    mean, rstd = alpha_h.new_empty((batch, channels)), alpha_h.new_empty((batch, channels))
    launch(
        coordinate_attention_forward_kernel,
        (slabs,),
        *(e, alpha_h.new_empty((slabs, height + width, block)), weight.contiguous(), bias),
        *(alpha_h, alpha_w, mean, rstd, groups, height, width, c, eps, *strides(e)),
        config=configs.choose("coordinate_attention_forward_kernel", e, height * width),
        scratch=("pooled",),
        BLOCK_C=block,
    )
    return alpha_h, alpha_w, mean, rstd


def backward(
    grad_alpha_h: torch.Tensor,
    grad_alpha_w: torch.Tensor,
    grad_mean: torch.Tensor,
    grad_rstd: torch.Tensor,
    e: torch.Tensor,
    alpha_h: torch.Tensor,
    alpha_w: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
) -> tuple[torch.Tensor, ...]:
    """As the reference's: gradients for e, K and b; two launches."""
    grad_e = torch.empty_like(e, memory_format=memory_format(e))
    e = flat(e)
    batch, channels, height, width = e.shape
    c, slabs = channels // groups, batch * groups
    block = power_of_two(c)
    pooled = alpha_h.new_empty((slabs, height + width, block))
    partials = alpha_h.new_empty((slabs, c * c + c))
    gradients = (g.contiguous() for g in (grad_alpha_h, grad_alpha_w, grad_mean, grad_rstd))
    saved = (v.contiguous() for v in (alpha_h, alpha_w, mean, rstd, weight))
    launch(
        coordinate_attention_backward_kernel,
        (slabs,),
        *(*gradients, e, *saved, grad_e, pooled, torch.empty_like(pooled), partials),
        *(groups, height, width, c, *strides(e), *strides(grad_e)),
        config=configs.choose("coordinate_attention_backward_kernel", e, height * width),
        scratch=("pooled", "grad_logits", "partials"),
        BLOCK_C=block,
    )
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = torch.empty_like(bias)
    sum_partials(e, [(partials, 0, grad_weight), (partials, c * c, grad_bias)])
    return grad_e, grad_weight, grad_bias
