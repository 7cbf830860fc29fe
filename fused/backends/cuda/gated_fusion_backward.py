"""Gated fusion (spec.md 2.4) on CUDA, backward; M and its gradient are never formed.

Our launches: gate_sums (sums of t; r), grad_logits (z, s), matrices, rows, statistics (frozen norms
have none), moments (h), norm_backward, product (of_s), input (grad_e, grad_w).
The library's: z·[s; r]ᵀ, in training r·rᵀ, and BN1ᵀ(h)·sᵀ. The equations are in
csrc/cuda/gated_fusion_gate_backward.cuh and gated_fusion_backward.cuh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...contract import memory_format
from .gated_fusion_case import Case, Finish, Norm, Weights


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left·rightᵀ in float32, of matrices (·, B·H·W)."""
    if left.dtype == torch.float32 or left.device.type == "cpu":
        return torch.mm(left.float(), right.float().T)
    return torch.mm(left, right.T, out_dtype=torch.float32)


class _Maps(NamedTuple):
    """The maps of one call beside e and w, and what the first passes make of them."""

    grad_out: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor
    grad_logits: torch.Tensor
    s: torch.Tensor
    r: torch.Tensor
    s_and_r: torch.Tensor
    sum_r: torch.Tensor
    affine3: torch.Tensor


class _Gradients(NamedTuple):
    """Of a norm's weight and bias."""

    weight: torch.Tensor
    bias: torch.Tensor

    @staticmethod
    def of(norm: Norm) -> _Gradients:
        return _Gradients(torch.empty_like(norm.weight), torch.empty_like(norm.bias))


class _Middle(NamedTuple):
    """What the kernels between the library's products leave."""

    to_hidden: torch.Tensor
    to_s: torch.Tensor
    shift: torch.Tensor | None
    grad_fusion: torch.Tensor
    grad_expand: torch.Tensor


def _through_gate(
    case: Case,
    grad_out: torch.Tensor,
    hidden: torch.Tensor,
    logits: torch.Tensor,
    norms: tuple[Norm, Norm, Norm],
    *,
    training: bool,
) -> tuple[_Maps, _Gradients]:
    """z, s and r, and the gradients of norm 3."""
    s_and_r = case.new_matrix(case.channels + case.squeezed)
    s, r = s_and_r.split((case.channels, case.squeezed), 1)
    runs, runs_r = case.runs(case.channels), case.runs(case.squeezed)
    sums, sums_r = case.new_floats(runs, 2, case.channels), case.new_floats(runs_r, case.squeezed)
    gate = {"grad_out": grad_out, "e": case.e, "w": case.w, "logits": logits}
    case.launch(
        "gate_sums",
        reads={**gate, "hidden": hidden, **norms[0].vectors("1"), **norms[2].vectors("3")},
        writes={"r": r, "sums": sums, "sums_r": sums_r},
        runs=runs,
        runs_r=runs_r,
        eps1=norms[0].eps,
        eps3=norms[2].eps,
    )
    grad_logits, affine3 = case.new_matrix(case.channels), case.new_floats(2, case.channels)
    gradients, sum_r = _Gradients.of(norms[2]), case.new_floats(case.squeezed)
    case.launch(
        "grad_logits",
        reads={**gate, **norms[2].vectors("3"), "sums": sums, "sums_r": sums_r},
        writes={
            **{"grad_logits": grad_logits, "s": s, "affine": affine3, "sum_r": sum_r},
            **{"grad_weight": gradients.weight, "grad_bias": gradients.bias},
        },
        runs=runs,
        runs_r=runs_r,
        eps3=norms[2].eps,
        training=int(training),
    )
    maps = _Maps(grad_out, hidden, logits, grad_logits, s, r, s_and_r, sum_r, affine3)
    return maps, gradients


def _through_middle(
    case: Case,
    maps: _Maps,
    weights: Weights,
    norms: tuple[Norm, Norm, Norm],
    gradients: tuple[_Gradients, _Gradients],
    *,
    training: bool,
) -> _Middle:
    """The gradients of fusion and expand; fills those of norm 2, from those of norm 3."""
    channels, squeezed = case.channels, case.squeezed
    of_norm2, of_norm3 = gradients
    by_maps = _product(case.matrix(maps.grad_logits), case.matrix(maps.s_and_r))
    r = case.matrix(maps.r)
    squares = _product(r, r) if training else None
    grad_fusion, grad_expand = map(torch.empty_like, (weights.fusion, weights.expand))
    of_expand = case.new_floats(channels, squeezed)
    of_squares = case.new_floats(channels, squeezed) if training else None
    slope = case.new_floats(channels)
    to_hidden = case.e.new_empty(squeezed, channels + squeezed)
    to_s = case.e.new_empty(channels, channels + squeezed)
    shift = case.new_floats(squeezed) if training else None
    flags: dict[str, Any] = {"training": int(training), "weight_is_float": weights.is_float}
    expand = {"expand": weights.expand, **norms[1].vectors("2")}
    fusion = {"fusion": weights.fusion, **norms[2].vectors("3")}
    case.launch(
        "matrices",
        reads={
            **{**fusion, **expand, "squeeze": weights.squeeze, "grad_bias": of_norm3.bias},
            **{"by_maps": by_maps, "squares": squares},
        },
        writes={
            **{"of_expand": of_expand, "of_squares": of_squares},
            **{"grad_fusion": grad_fusion, "to_s": to_s, "to_hidden": to_hidden[:, :channels]},
        },
        eps2=norms[1].eps,
        eps3=norms[2].eps,
        **flags,
    )
    case.launch(
        "rows",
        reads={
            **{**fusion, **expand, "grad_bias3": of_norm3.bias},
            **{"of_expand": of_expand, "of_squares": of_squares, "sum_r": maps.sum_r},
        },
        writes={
            **{"grad_weight": of_norm2.weight, "grad_bias": of_norm2.bias},
            **{"grad_expand": grad_expand, "slope": slope},
        },
        eps2=norms[1].eps,
        eps3=norms[2].eps,
        **flags,
    )
    if training:
        case.launch(
            "statistics",
            reads={**expand, "slope": slope},
            writes={"of_r": to_hidden[:, channels:], "shift": shift},
            eps2=norms[1].eps,
            **flags,
        )
    return _Middle(to_hidden, to_s, shift, grad_fusion, grad_expand)


def _grad_hidden(
    case: Case, maps: _Maps, middle: _Middle, norm: Norm, *, training: bool
) -> tuple[torch.Tensor, _Gradients]:
    """BN1ᵀ(h) (B, C//4, H, W), and the gradients of norm 1."""
    of_z, of_r = middle.to_hidden.split((case.channels, case.squeezed), 1)
    grad_relu, grad_hidden = case.new_map(case.squeezed), case.new_matrix(case.squeezed)
    sums, gradients = case.new_moments(case.squeezed), _Gradients.of(norm)
    case.multiply(
        "moments",
        case.squeezed,
        [(maps.grad_logits, of_z), *([(maps.r, of_r)] if training else [])],
        finish=Finish.MASK,
        scaled=False,
        reads={
            **{"other": maps.r, "shift": middle.shift},
            **{"partner": maps.hidden, "partner_mean": norm.mean},
        },
        writes={"out": grad_relu, "partials": sums},
    )
    case.launch(
        "norm_backward",
        reads={
            **{"hidden": maps.hidden, "grad_relu": grad_relu, "sums": sums},
            **norm.vectors("1"),
        },
        writes={
            **{"grad_hidden": grad_hidden},
            **{"grad_weight": gradients.weight, "grad_bias": gradients.bias},
        },
        runs=case.runs(case.squeezed),
        parts=sums.shape[0],
        eps1=norm.eps,
        training=int(training),
    )
    return grad_hidden, gradients


def _grad_input(
    case: Case, maps: _Maps, grad_hidden: torch.Tensor, to_s: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_e, grad_w."""
    of_s, grad_e = case.new_map(case.channels), case.new_map(case.channels)
    grad_w = case.new_map(case.groups)
    of_z, of_hidden = to_s.split((case.channels, case.squeezed), 1)
    case.multiply(
        "product",
        case.channels,
        [(maps.grad_logits, of_z), (grad_hidden, of_hidden)],
        finish=Finish.PLAIN,
        scaled=False,
        reads={},
        writes={"out": of_s},
    )
    case.launch(
        "input",
        reads={
            **{"grad_out": maps.grad_out, "e": case.e, "w": case.w, "logits": maps.logits},
            **{"of_s": of_s, "affine": maps.affine3},
        },
        writes={"grad_e": grad_e, "grad_w": grad_w},
    )
    return grad_e, grad_w


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
    case = Case(e, w)
    statistics1 = (mean1, var1) if training else (running_mean1, running_var1)
    statistics2 = (mean2, var2) if training else (running_mean2, running_var2)
    statistics3 = (mean3, var3) if training else (running_mean3, running_var3)
    norms = (
        case.norm(bn1_weight, bn1_bias, *statistics1, eps1),
        case.norm(bn2_weight, bn2_bias, *statistics2, eps2),
        case.norm(bn3_weight, bn3_bias, *statistics3, eps3),
    )
    weights = Weights.of(e, squeeze_weight, expand_weight, fusion_weight)
    maps, of_norm3 = _through_gate(
        *(case, case.laid(grad_out), case.laid(hidden), case.laid(gate_logits), norms),
        training=training,
    )
    of_norm2 = _Gradients.of(norms[1])
    middle = _through_middle(case, maps, weights, norms, (of_norm2, of_norm3), training=training)
    grad_hidden, of_norm1 = _grad_hidden(case, maps, middle, norms[0], training=training)
    grad_e, grad_w = _grad_input(case, maps, grad_hidden, middle.to_s)
    grad_squeeze = _product(case.matrix(grad_hidden), case.matrix(maps.s))
    return (
        grad_e,
        grad_w.to(w.dtype).contiguous(memory_format=memory_format(w)),
        grad_squeeze.to(squeeze_weight.dtype).view_as(squeeze_weight),
        *(of_norm1.weight.to(bn1_weight.dtype), of_norm1.bias.to(bn1_bias.dtype)),
        middle.grad_expand.to(expand_weight.dtype).view_as(expand_weight),
        *(of_norm2.weight.to(bn2_weight.dtype), of_norm2.bias.to(bn2_bias.dtype)),
        middle.grad_fusion.to(fusion_weight.dtype).view_as(fusion_weight),
        *(of_norm3.weight.to(bn3_weight.dtype), of_norm3.bias.to(bn3_bias.dtype)),
    )
