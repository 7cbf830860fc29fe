"""Cross-spatial learning and cross-attention (spec.md 2.3) in Triton: e and its gates → w.

Evaluation takes two launches: `pack` brings the weights into the products' layout, and
`forward` does the rest. There a program owns a band of rows of a slab (one sample's group): it
writes e, x1 and x2 of its band and halo as sheets to scratch of its own, convolves X on tensor
cores from there, keeps the 3c features, the attention and the reduction in registers, and writes y
to scratch. The band that arrives last adds up the bands' sums of y in their order, takes the
softmax, and draws w over the whole slab. e is read once and w written once; scratch is private to
a slab and small enough to live in the second-level cache.

Training needs statistics over the batch between the products, so five launches: `pack`,
`branches`, `features`, `reduce` and `gate` (cross_spatial_training.py), without atomics.

Sums, moments, logits, softmax and w's logit are float32; operands and scratch have e's dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .cross_spatial_tiles import (
    TILE_CHANNEL_FEAT,
    TILES,
    conv3x3_tile,
    copy_and_normalise,
    cross_spatial_pack_kernel,
    features_tile,
    folded_running,
    hidden_zero,
    load_tile,
    reduced_tile_running,
    softmax,
    store_tile,
    vector,
    weight_tile,
)
from .cross_spatial_training import (
    cross_spatial_branches_kernel,
    cross_spatial_features_kernel,
    cross_spatial_gate_kernel,
    cross_spatial_reduce_kernel,
)
from .launch import cdiv, dot_precision, flat, launch, multiprocessors, power_of_two, strides

# Rows of a slab that see a pixel of w: 2 of the 5×5, 1 of the 3×3 before it.
_HALO = 3
_LEAST_BAND = 8
_BANDS_PER_MULTIPROCESSOR = 2


@triton.jit
def _network_tile(
    x, packed, pixel, first_row, end_row, W, zero,
    attention_weight, attention_bias, attention_mean, attention_var, attention_eps,
    reduce_weight, reduce_bias, reduce_mean, reduce_var, reduce_eps, alpha, c,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one branch at a tile, (BLOCK_P, BLOCK_C) float32."""
    f1, f3, f5 = features_tile(
        x, packed, pixel, first_row, end_row, W, zero, BLOCK_C, BLOCK_P, PRECISION
    )
    reduced = reduced_tile_running(
        f1, f3, f5, packed, attention_weight + zero, attention_bias + zero,
        attention_mean + zero, attention_var + zero, attention_eps, c,
        BLOCK_C, BLOCK_P, PRECISION,
    )  # fmt: skip
    row = pixel // W
    centre = load_tile(x, pixel, (row >= first_row) & (row < end_row), BLOCK_C)
    feat_weight = weight_tile(packed, TILE_CHANNEL_FEAT, BLOCK_C)
    feat = tl.dot(centre, feat_weight, input_precision=PRECISION)
    scale, shift = folded_running(
        reduce_weight + zero, reduce_bias + zero, reduce_mean + zero, reduce_var + zero,
        reduce_eps, c, BLOCK_C,
    )  # fmt: skip
    return reduced * scale[None, :] + shift[None, :] + tl.load(alpha + zero).to(tl.float32) * feat


@triton.jit
def _draw_gate(
    y, partial, w, softmax1, softmax2, slab, P, c, BANDS,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Softmax vectors and w of one slab, from y (2, P, BLOCK_C) and the bands' sums of y."""
    channel = tl.arange(0, BLOCK_C)
    total1 = tl.zeros((BLOCK_C,), tl.float32)
    total2 = tl.zeros((BLOCK_C,), tl.float32)
    for band in range(0, BANDS):
        total1 += tl.load(partial + 2 * band * BLOCK_C + channel, cache_modifier=".cg")
        total2 += tl.load(partial + (2 * band + 1) * BLOCK_C + channel, cache_modifier=".cg")
    s1, s2 = softmax(total1 / P, c, BLOCK_C), softmax(total2 / P, c, BLOCK_C)
    tl.store(softmax1 + slab * c + channel, s1, mask=channel < c)
    tl.store(softmax2 + slab * c + channel, s2, mask=channel < c)
    for start in range(0, P, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = pixel < P
        at = pixel[:, None] * BLOCK_C + channel[None, :]
        y1 = tl.load(y + at, mask=inside[:, None], other=0.0, cache_modifier=".cg")
        at += P * BLOCK_C
        y2 = tl.load(y + at, mask=inside[:, None], other=0.0, cache_modifier=".cg")
        logit = tl.sum(y2.to(tl.float32) * s1[None, :] + y1.to(tl.float32) * s2[None, :], axis=1)
        tl.store(w + slab * P + pixel, tl.sigmoid(logit).to(w.dtype.element_ty), mask=inside)


@triton.jit
def cross_spatial_forward_kernel(
    e, scratch, y, partial, counters, packed, alpha_h, alpha_w, mean, rstd,
    gn_weight, gn_bias, conv3x3_bias,
    attention_weight, attention_bias, attention_mean, attention_var,
    reduce_weight, reduce_bias, reduce_mean, reduce_var, alpha,
    w, softmax1, softmax2, G, H, W, c, rows, BANDS, stride_b, stride_c, stride_p,
    attention_eps, reduce_eps,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (slabs, bands of `rows` rows); see the head of this file.

    scratch (slabs, bands, 3, (rows + 6)·W, BLOCK_C), y (slabs, 2, H·W, BLOCK_C), partial
    (slabs, bands, 2, BLOCK_C) float32, counters (slabs,) int32, zero before.
    """
    slab, band = tl.program_id(0).to(tl.int64), tl.program_id(1)
    P = H * W
    source = e + (slab // G) * stride_b + (slab % G) * c * stride_c
    top, end = band * rows, tl.minimum(band * rows + rows, H)
    size = tl.cast(rows + 6, tl.int64) * W * BLOCK_C
    copy = scratch + (slab * BANDS + band) * 3 * size - (top - 3) * W * BLOCK_C
    x1, x2 = copy + size, copy + 2 * size

    at = slab * c
    scale = vector(rstd + at, c, BLOCK_C, 0.0) * vector(gn_weight, c, BLOCK_C, 0.0)
    centre, shift = vector(mean + at, c, BLOCK_C, 0.0), vector(gn_bias, c, BLOCK_C, 0.0)
    first_row, end_row = tl.maximum(top - 3, 0), tl.minimum(end + 3, H)
    for start in range(first_row * W, end_row * W, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        copy_and_normalise(
            source, copy, x1, alpha_h + at * H, alpha_w + at * W, centre, scale, shift,
            pixel, pixel < end_row * W, H, W, c, stride_c, stride_p, BLOCK_C,
        )  # fmt: skip
    tl.debug_barrier()  # other threads of this program read the copy
    bias = vector(conv3x3_bias, c, BLOCK_C, 0.0)
    first_x, end_x = tl.maximum(top - 2, 0), tl.minimum(end + 2, H)
    for start in range(first_x * W, end_x * W, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        x = conv3x3_tile(
            copy, packed, bias, pixel, first_row, end_row, W, hidden_zero(start),
            BLOCK_C, BLOCK_P, PRECISION,
        )  # fmt: skip
        store_tile(x2, pixel, pixel < end_x * W, x, BLOCK_C)
    tl.debug_barrier()

    own_y = y + slab * 2 * P * BLOCK_C
    channel = tl.arange(0, BLOCK_C)
    own_partial = partial + slab * BANDS * 2 * BLOCK_C
    for branch in range(0, 2):
        total = tl.zeros((BLOCK_C,), tl.float32)
        # What is held over the loop would spill.
        for start in tl.range(top * W, end * W, BLOCK_P, disable_licm=True):
            pixel = start + tl.arange(0, BLOCK_P)
            inside = pixel < end * W
            zero = hidden_zero(start)
            value = _network_tile(
                x1 + branch * size, packed + zero * (BLOCK_C * BLOCK_C), pixel,
                first_x, end_x, W, zero,
                attention_weight, attention_bias, attention_mean, attention_var, attention_eps,
                reduce_weight, reduce_bias, reduce_mean, reduce_var, reduce_eps, alpha, c,
                BLOCK_C, BLOCK_P, PRECISION,
            )  # fmt: skip
            store_tile(own_y + branch * P * BLOCK_C, pixel, inside, value, BLOCK_C)
            total += tl.sum(tl.where(inside[:, None], value, 0.0), axis=0)
        tl.store(own_partial + (2 * band + branch) * BLOCK_C + channel, total)

    # Every thread's stores come before this program's arrival, and the last to arrive sees all.
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + slab, 1, sem="acq_rel")
    if arrived == BANDS - 1:
        tl.debug_barrier()
        _draw_gate(own_y, own_partial, w, softmax1, softmax2, slab, P, c, BANDS, BLOCK_C, BLOCK_P)


# ------------------------------------------------------------------------------------- launchers


def pack(
    e: torch.Tensor,
    groups: int,
    conv3x3_weight: torch.Tensor,
    spatial_conv1_weight: torch.Tensor,
    spatial_conv3_weight: torch.Tensor,
    spatial_conv5_weight: torch.Tensor,
    attention_weight: torch.Tensor,
    reduce_weight: torch.Tensor,
    channel_feat_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights as tiles (TILES, BLOCK_C, BLOCK_C) in e's dtype, and zeroed counters of the slabs."""
    c, slabs = e.shape[1] // groups, e.shape[0] * groups
    block = power_of_two(c)
    packed = e.new_empty((TILES, block, block))
    counters = torch.empty(slabs, dtype=torch.int32, device=e.device)
    weights = (
        *(conv3x3_weight, spatial_conv1_weight, spatial_conv3_weight, spatial_conv5_weight),
        *(attention_weight, reduce_weight, channel_feat_weight),
    )
    launch(
        cross_spatial_pack_kernel,
        (TILES + 1,),
        *(*(weight.contiguous() for weight in weights), packed, counters, slabs, c),
        config=configs.choose("cross_spatial_pack_kernel", e, 0),
        scratch=("packed", "counters"),
        BLOCK_C=block,
    )
    return packed, counters


def _bands(e: torch.Tensor, slabs: int) -> tuple[int, int]:
    """(bands of a slab, rows of a band): enough programs for the device, but no thin bands."""
    height = e.shape[2]
    wanted = cdiv(_BANDS_PER_MULTIPROCESSOR * multiprocessors(e.device), slabs)
    rows = cdiv(height, max(1, min(wanted, cdiv(height, _LEAST_BAND))))
    return cdiv(height, rows), rows


def forward(
    e: torch.Tensor,
    alpha_h: torch.Tensor,
    alpha_w: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gn_weight: torch.Tensor,
    gn_bias: torch.Tensor,
    conv3x3_weight: torch.Tensor,
    conv3x3_bias: torch.Tensor,
    spatial_conv1_weight: torch.Tensor,
    spatial_conv3_weight: torch.Tensor,
    spatial_conv5_weight: torch.Tensor,
    attention_weight: torch.Tensor,
    attention_bn_weight: torch.Tensor,
    attention_bn_bias: torch.Tensor,
    attention_running_mean: torch.Tensor | None,
    attention_running_var: torch.Tensor | None,
    reduce_weight: torch.Tensor,
    reduce_bn_weight: torch.Tensor,
    reduce_bn_bias: torch.Tensor,
    reduce_running_mean: torch.Tensor | None,
    reduce_running_var: torch.Tensor | None,
    channel_feat_weight: torch.Tensor,
    alpha: torch.Tensor,
    groups: int,
    training: bool,
    bn_statistics: str,
    attention_eps: float,
    reduce_eps: float,
) -> tuple[torch.Tensor, ...]:
    """As the reference's forward: w, two softmax vectors, four statistics."""
    e = flat(e)
    batch, channels, height, width = e.shape
    c, slabs = channels // groups, batch * groups
    packed, counters = pack(
        *(e, groups, conv3x3_weight, spatial_conv1_weight, spatial_conv3_weight),
        *(spatial_conv5_weight, attention_weight, reduce_weight, channel_feat_weight),
    )
    vectors = [v.contiguous() for v in (alpha_h, alpha_w, mean, rstd)]
    vectors += [gn_weight, gn_bias, conv3x3_bias]
    w = torch.empty((batch, groups, height, width), dtype=e.dtype, device=e.device)
    softmax1 = torch.empty((batch, groups, c), dtype=torch.float32, device=e.device)
    softmax2 = torch.empty_like(softmax1)
    sets = 0
    if training:
        sets = 2 * groups if bn_statistics == "sequential" else 1
    wide = softmax1.new_empty((sets, 3 * c))
    narrow = softmax1.new_empty((sets, c))
    results = (
        w,
        softmax1,
        softmax2,
        wide,
        torch.empty_like(wide),
        narrow,
        torch.empty_like(narrow),
    )
    if training:
        _training(
            *(e, vectors, packed, results, groups, bn_statistics == "pooled"),
            (attention_bn_weight, attention_bn_bias, attention_eps),
            (reduce_bn_weight, reduce_bn_bias, reduce_eps),
            alpha,
        )
        return results
    bands, rows = _bands(e, slabs)
    block = power_of_two(c)
    partial = softmax1.new_empty((slabs, bands, 2, block))
    launch(
        cross_spatial_forward_kernel,
        (slabs, bands),
        *(e, e.new_empty((slabs, bands, _HALO, (rows + 2 * _HALO) * width, block))),
        *(e.new_empty((slabs, 2, height * width, block)), partial, counters, packed, *vectors),
        *(attention_bn_weight, attention_bn_bias, attention_running_mean, attention_running_var),
        *(reduce_bn_weight, reduce_bn_bias, reduce_running_mean, reduce_running_var, alpha),
        *(w, softmax1, softmax2, groups, height, width, c, rows, bands, *strides(e)),
        *(attention_eps, reduce_eps),
        config=configs.choose("cross_spatial_forward_kernel", e, height * width),
        scratch=("scratch", "y", "partial", "counters", "packed"),
        BLOCK_C=block,
        PRECISION=dot_precision(e),
    )
    return results


def branches(
    e: torch.Tensor, vectors: list[torch.Tensor], packed: torch.Tensor, groups: int
) -> torch.Tensor:
    """Sheets (3, slabs, H·W, BLOCK_C) of x1, x2 and e; one launch."""
    batch, channels, height, width = e.shape
    slabs, block = batch * groups, packed.shape[1]
    sheets = e.new_empty((3, slabs, height * width, block))
    launch(
        cross_spatial_branches_kernel,
        (slabs,),
        *(e, sheets, packed, *vectors, slabs, groups, height, width, channels // groups),
        *strides(e),
        config=configs.choose("cross_spatial_branches_kernel", e, height * width),
        scratch=("sheets", "packed"),
        BLOCK_C=block,
        PRECISION=dot_precision(e),
    )
    return sheets


def _training(
    e: torch.Tensor,
    vectors: list[torch.Tensor],
    packed: torch.Tensor,
    results: tuple[torch.Tensor, ...],
    groups: int,
    pooled: bool,
    attention: tuple[torch.Tensor, torch.Tensor, float],
    reduce: tuple[torch.Tensor, torch.Tensor, float],
    alpha: torch.Tensor,
) -> None:
    """Fill the forward's results with batch statistics; four launches."""
    w, softmax1, softmax2, attention_mean, attention_var, reduce_mean, reduce_var = results
    batch, channels, height, width = e.shape
    c, slabs, pixels, block = channels // groups, batch * groups, height * width, packed.shape[1]
    sheets = branches(e, vectors, packed, groups)
    features = e.new_empty((2 * slabs, 3, pixels, block))
    moments = softmax1.new_empty((2 * slabs, 2, 3 * c))
    sums = softmax1.new_empty((2 * slabs, c))
    sizes = (height, width, c)
    common = {"BLOCK_C": block, "PRECISION": dot_precision(e)}
    launch(
        cross_spatial_features_kernel,
        (2 * slabs,),
        *(sheets, features, packed, moments, sums, slabs, *sizes),
        config=configs.choose("cross_spatial_features_kernel", e, pixels),
        scratch=("sheets", "features", "packed", "moments", "sums"),
        **common,
    )
    reduced = e.new_empty((2 * slabs, pixels, block))
    reduced_moments = softmax1.new_empty((2 * slabs, 2, c))
    launch(
        cross_spatial_reduce_kernel,
        (2 * slabs,),
        *(features, reduced, packed, moments, reduced_moments, *attention[:2]),
        *(attention_mean, attention_var, slabs, groups, *sizes, attention[2]),
        config=configs.choose("cross_spatial_reduce_kernel", e, pixels),
        scratch=("features", "reduced", "packed", "moments", "reduced_moments"),
        POOLED=pooled,
        **common,
    )
    config = configs.choose("cross_spatial_gate_kernel", e, pixels)
    launch(
        cross_spatial_gate_kernel,
        (slabs, cdiv(pixels, config.blocks["BLOCK_P"])),
        *(sheets, reduced, packed, sums, reduced_moments, *reduce[:2], alpha),
        *(w, softmax1, softmax2, reduce_mean, reduce_var, slabs, groups, *sizes, reduce[2]),
        config=config,
        scratch=("sheets", "reduced", "packed", "sums", "reduced_moments"),
        POOLED=pooled,
        BLOCK_C=block,
    )
