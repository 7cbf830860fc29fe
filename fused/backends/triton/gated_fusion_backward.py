"""Gated fusion (spec.md 2.4), backward; M is recomputed from the kept hidden = W1∗s.

    t      = g ⊙ e ⊙ (1 − w) ⊙ φ (1 − φ)             gradient of BN3's result, g that of out
    z      = BN3ᵀ(t), of the logits
    m      = Wf_mᵀ∗z, of M
    h      = (W2ᵀ∗BN2ᵀ(m)) ⊙ (BN1(hidden) > 0)       gradient of BN1's result
    of_s   = Wf_sᵀ∗z + W1ᵀ∗BN1ᵀ(h)
    grad_e = g ⊙ (w + φ (1 − w)) + of_s ⊙ w           grad_w = Σ_c e ⊙ (g (1 − φ) + of_s)
    BNᵀ(t) = gain ⊙ (t − mean(t) − n ⊙ mean(t ⊙ n)); without the means where norms are frozen

Ten launches: sums (of t and t ⊙ n), grad_logits (z), expand, grad_expanded (m), grad_norm 2,
grad_hidden (h), grad_norm 1, grad_input (grad_e, grad_w), and the two of
`gated_fusion_weights`. A product leaves the sums of its tiles for the next norm. BNᵀ is applied on
load, from `slopes` (6, C): gain, slope, level, mean, and the forward's scale and shift. Under
autocast, where the weights are float32, the first launch also rounds them for the products.
Layouts: maps NCHW or channels_last by strides, w spread over the c channels of its group on load.
Programs: of a product (pixel tile of a sample, channel tile), see `gated_fusion_products`; of sums
and grad_logits (run of pixel tiles, channel block); of grad_norm a channel block. A channel tile of
grad_input holds whole groups, padded to a power of two; of a group wider than a tile it holds a
piece, and the pieces of grad_w are added by the last launch.
Bytes: 19 passes over the map: sums 3; grad_logits 4; expand 1.25; grad_expanded 3; grad_hidden
2.5; grad_input 5.5; the weights' own are counted there.
Precision: products in the map's dtype, sums, norms, σ in float32; z, m, h and BNᵀ of them are
rounded to the map's dtype. Recomputed: s, φ, t, expanded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...contract import memory_format
from . import configs, launch
from .gated_fusion_case import Case, Norm, Packed
from .gated_fusion_gradients import (
    gated_fusion_grad_expanded_kernel,
    gated_fusion_grad_hidden_kernel,
    gated_fusion_grad_input_kernel,
    gated_fusion_grad_logits_kernel,
    gated_fusion_grad_norm_kernel,
    gated_fusion_sums_kernel,
)
from .gated_fusion_training import launch_expand
from .gated_fusion_weights import Operands, launch_weights


class _Maps(NamedTuple):
    """The maps of one call beside e and w, their pixels one axis."""

    grad_out: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor

    @property
    def strides(self) -> tuple[tuple[int, int, int], ...]:
        """Strides of each."""
        return tuple(map(launch.strides, self))


def _launch_grad_logits(
    case: Case, maps: _Maps, norm1: Norm, norm3: Norm, packed: Packed, *, training: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """z, scale and shift of norms 1 and 3, and the gradients of norm 3's parameters.

    Also fills `packed`.
    """
    spans = case.spans(gated_fusion_sums_kernel)
    sums = case.new_floats(spans.runs, 2, case.channels)
    affine1, affine3 = case.new_floats(2, case.squeezed), case.new_floats(2, case.channels)
    grad_strides, _, logits_strides = maps.strides
    launch.launch(
        gated_fusion_sums_kernel,
        (spans.runs * spans.blocks + packed.programs(spans.config),),
        *(maps.grad_out, case.e, case.w, maps.logits),
        *(norm3.mean, norm3.var, norm3.weight, norm3.bias),
        *(norm1.mean, norm1.var, norm1.weight, norm1.bias),
        *((None,) * 3 if packed.numbers is None else packed.sources),
        *(sums, affine3, affine1, packed.numbers),
        *(grad_strides, *case.strides, logits_strides),
        *(case.channels, case.squeezed, case.size, case.pixels),
        *(spans.tiles, spans.parts, spans.run, spans.runs, spans.blocks, norm3.eps, norm1.eps),
        *packed.sizes,
        config=spans.config,
        scratch=("sums", "affine3", "affine1", "packed"),
        WIDE=case.wide,
    )
    sum_parts, spans = spans.runs, case.spans(gated_fusion_grad_logits_kernel)
    grad_logits = case.new_map(case.channels)
    gradients = torch.empty_like(norm3.weight), torch.empty_like(norm3.bias)
    launch.launch(
        gated_fusion_grad_logits_kernel,
        spans.grid,
        *(maps.grad_out, case.e, case.w, maps.logits, sums, affine3),
        *(norm3.mean, norm3.var, norm3.weight, grad_logits, *gradients),
        *(grad_strides, *case.strides, logits_strides, launch.strides(grad_logits)),
        *(case.channels, case.size, case.pixels, spans.tiles, spans.parts, spans.run),
        *(spans.blocks, sum_parts, case.total, norm3.eps),
        config=spans.config,
        scratch=("sums", "affine3", "grad_logits"),
        TRAINING=training,
        WIDE=case.wide,
    )
    return grad_logits, affine1, affine3, gradients


def _launch_grad_norm(
    case: Case, sums: torch.Tensor, norm: Norm, *, training: bool, shift_matters: bool = True
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Slopes (6, C) of a norm and its parameters' gradients."""
    parts, _, channels = sums.shape
    slopes = case.new_floats(6, channels)
    gradients = torch.empty_like(norm.weight), torch.empty_like(norm.bias)
    config = configs.choose(gated_fusion_grad_norm_kernel.__name__, case.e, case.total)
    launch.launch(
        gated_fusion_grad_norm_kernel,
        (launch.cdiv(channels, config.blocks["BLOCK_C"]),),
        *(sums, norm.mean, norm.var, norm.weight, norm.bias, slopes, *gradients),
        *(channels, parts, case.total, norm.eps),
        config=config,
        scratch=("sums", "slopes"),
        TRAINING=training,
        SHIFT_MATTERS=shift_matters,
    )
    return slopes, gradients


def _launch_grad_expanded(
    case: Case, grad_logits: torch.Tensor, fusion: torch.Tensor, expanded: torch.Tensor, norm2: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """m (B, C, H, W) and its sums."""
    tiling = case.tiling(gated_fusion_grad_expanded_kernel, case.channels)
    grad_expanded = case.new_map(case.channels)
    sums = case.new_floats(tiling.parts, 2, case.channels)
    launch.launch(
        gated_fusion_grad_expanded_kernel,
        tiling.grid,
        *(grad_logits, fusion, expanded, norm2.mean, norm2.var, grad_expanded, sums),
        *(launch.strides(grad_logits), fusion.stride()[:2]),
        *(launch.strides(expanded), launch.strides(grad_expanded)),
        *(case.channels, case.pixels, tiling.tiles, tiling.column_tiles, norm2.eps),
        config=tiling.config,
        scratch=("grad_logits", "expanded", "grad_expanded", "sums"),
        WIDE=case.wide,
        PRECISION=case.precision,
    )
    return grad_expanded, sums


def _launch_grad_hidden(
    case: Case,
    grad_expanded: torch.Tensor,
    expanded: torch.Tensor,
    slopes2: torch.Tensor,
    expand: torch.Tensor,
    hidden: torch.Tensor,
    affine1: torch.Tensor,
    norm1: Norm,
    *,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h (B, C//4, H, W) and its sums."""
    tiling = case.tiling(gated_fusion_grad_hidden_kernel, case.squeezed)
    grad_hidden = case.new_map(case.squeezed)
    sums = case.new_floats(tiling.parts, 2, case.squeezed)
    launch.launch(
        gated_fusion_grad_hidden_kernel,
        tiling.grid,
        *(grad_expanded, expanded, slopes2, expand, hidden, affine1),
        *(norm1.mean, norm1.var, grad_hidden, sums),
        *(launch.strides(grad_expanded), launch.strides(expanded), expand.stride()[:2]),
        *(launch.strides(hidden), launch.strides(grad_hidden)),
        *(case.channels, case.squeezed, case.pixels, tiling.tiles, tiling.column_tiles, norm1.eps),
        config=tiling.config,
        scratch=("grad_expanded", "expanded", "slopes2", "affine1", "grad_hidden", "sums"),
        TRAINING=training,
        WIDE=case.wide,
        PRECISION=case.precision,
    )
    return grad_hidden, sums


def _launch_grad_input(
    case: Case,
    maps: _Maps,
    grad_logits: torch.Tensor,
    grad_hidden: torch.Tensor,
    slopes1: torch.Tensor,
    affine3: torch.Tensor,
    squeeze: torch.Tensor,
    fusion: torch.Tensor,
    *,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """grad_e, grad_w, and the pieces (pieces, B, G, H, W) still to be added into grad_w."""
    groups = case.w.shape[1]
    tiling = case.tiling(gated_fusion_grad_input_kernel, case.channels)
    width = tiling.config.blocks["BLOCK_O"]
    span = min(launch.power_of_two(case.size, 1), width)
    pieces = launch.cdiv(case.size, span)
    tiling = tiling._replace(column_tiles=launch.cdiv(groups, width // span) * pieces)
    grad_e = case.new_map(case.channels)
    grad_w = torch.empty(
        case.w.shape, dtype=case.w.dtype, device=case.w.device, memory_format=memory_format(case.w)
    )
    pieces_w = case.new_floats(pieces, *grad_w.shape) if pieces > 1 else None
    target = grad_w if pieces_w is None else pieces_w[0]
    launch.launch(
        gated_fusion_grad_input_kernel,
        tiling.grid,
        *(grad_logits, fusion, grad_hidden, maps.hidden, slopes1, squeeze),
        *(maps.grad_out, case.e, case.w, maps.logits, affine3, grad_e),
        grad_w if pieces_w is None else pieces_w,
        *(launch.strides(grad_logits), fusion.stride()[:2], launch.strides(grad_hidden)),
        *(maps.strides[1], squeeze.stride()[:2], maps.strides[0], *case.strides, maps.strides[2]),
        *(launch.strides(grad_e), launch.strides(target)),
        *(case.channels, case.squeezed, groups, case.size, case.pixels),
        *(tiling.tiles, tiling.column_tiles, pieces, target.numel()),
        config=tiling.config,
        scratch=("grad_logits", "grad_hidden", "slopes1", "affine3")
        + (() if pieces_w is None else ("grad_w",)),
        SPAN=span,
        TRAINING=training,
        WIDE=case.wide,
        PRECISION=case.precision,
    )
    return grad_e, grad_w, pieces_w


def backward(
    grad_out: torch.Tensor,
    e: torch.Tensor,
    w: torch.Tensor,
    hidden: torch.Tensor,
    gate_logits: torch.Tensor,
    mean1: torch.Tensor,
    var1: torch.Tensor,
    mean2: torch.Tensor,
    var2: torch.Tensor,
    mean3: torch.Tensor,
    var3: torch.Tensor,
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
) -> tuple[torch.Tensor, ...]:
    """Gradients for e, w and the nine parameters; M is recomputed from the kept W1∗s."""
    maps = _Maps(*map(launch.flat, (grad_out, hidden, gate_logits)))
    case = Case(e, w, *maps)
    statistics1 = (mean1, var1) if training else (running_mean1, running_var1)
    statistics2 = (mean2, var2) if training else (running_mean2, running_var2)
    statistics3 = (mean3, var3) if training else (running_mean3, running_var3)
    norm1 = case.norm(bn1_weight, bn1_bias, *statistics1, eps1)
    norm2 = case.norm(bn2_weight, bn2_bias, *statistics2, eps2)
    norm3 = case.norm(bn3_weight, bn3_bias, *statistics3, eps3)

    parameters = (squeeze_weight, expand_weight, fusion_weight)
    packed = case.packed(*parameters)
    squeeze, expand, fusion = packed.weights
    grad_logits, affine1, affine3, grad_norm3 = _launch_grad_logits(
        case, maps, norm1, norm3, packed, training=training
    )
    expanded, _, _ = launch_expand(case, maps.hidden, affine1, expand, statistics=False)
    grad_expanded, sums = _launch_grad_expanded(case, grad_logits, fusion, expanded, norm2)
    # Norm 3 takes off what norm 2 shifts, in training.
    slopes2, grad_norm2 = _launch_grad_norm(
        case, sums, norm2, training=training, shift_matters=not training
    )
    grad_hidden, sums = _launch_grad_hidden(
        *(case, grad_expanded, expanded, slopes2, expand, maps.hidden, affine1, norm1),
        training=training,
    )
    slopes1, grad_norm1 = _launch_grad_norm(case, sums, norm1, training=training)
    grad_e, grad_w, pieces_w = _launch_grad_input(
        *(case, maps, grad_logits, grad_hidden, slopes1, affine3, squeeze, fusion),
        training=training,
    )
    operands = Operands(
        maps.hidden, expanded, grad_logits, grad_expanded, grad_hidden, slopes1, slopes2
    )
    grad_squeeze, grad_expand, grad_fusion = launch_weights(
        case, operands, parameters, grad_w, pieces_w, training=training
    )
    return (
        *(grad_e, grad_w, grad_squeeze, *grad_norm1, grad_expand, *grad_norm2),
        *(grad_fusion, *grad_norm3),
    )
