"""Gated fusion (spec.md 2.4) on CUDA, forward.

Evaluation takes two launches (identity 5.3): `product` (r, and the folding of the weights in more
blocks) and `product` again (out), or `moments` and `mean` for out's means (5.6). Where maps are
kept, M is never formed either: hidden = W1∗s with moments; relu (r); the statistics of W2∗r, which
is not stored; folding; logits = Wf_s∗s + combined∗r + Wf_m·shift2 with moments; out: six launches.
Frozen norms need no moments: five.
"""

from __future__ import annotations

import torch

from .gated_fusion_case import Case, Finish, Norm, Weights


def _fold(
    case: Case, weights: Weights, norms: tuple[Norm, Norm, Norm]
) -> tuple[torch.Tensor, torch.Tensor]:
    """combined (C, C//4) and Wf_m·shift2 (C,), of norm 2's statistics."""
    combined = weights.fusion.new_empty(case.channels, case.squeezed)
    shift = case.new_floats(case.channels)
    case.launch(
        "product",
        reads={"fusion": weights.fusion, "expand": weights.expand, **norms[1].vectors("2")},
        writes={"combined": combined, "bias_of_r": shift},
        eps2=norms[1].eps,
        weight_is_float=weights.is_float,
    )
    return combined, shift


def _evaluate(
    case: Case, weights: Weights, norms: tuple[Norm, Norm, Norm], *, mean: bool
) -> torch.Tensor:
    """Out, or with `mean` its means over H×W (B, C) in float32."""
    r = case.new_map(case.squeezed)
    combined = weights.fusion.new_empty(case.channels, case.squeezed)
    affine3 = case.new_floats(2, case.channels)
    case.multiply(
        "product",
        case.squeezed,
        [(case.e, weights.squeeze)],
        finish=Finish.RELU,
        scaled=True,
        reads={
            **{"w": case.w, "fusion": weights.fusion, "expand": weights.expand},
            **norms[0].vectors(),
            **norms[1].vectors("2"),
            **norms[2].vectors("3"),
        },
        writes={"out": r, "combined": combined, "bias_of_r": affine3},
        eps=norms[0].eps,
        eps2=norms[1].eps,
        eps3=norms[2].eps,
    )
    out = None if mean else case.new_map(case.channels)
    partials = case.new_moments(case.channels) if mean else None
    case.multiply(
        "moments" if mean else "product",
        case.channels,
        [(case.e, weights.fusion), (r, combined)],
        finish=Finish.GATE,
        scaled=True,
        reads={"w": case.w, "scale": affine3[0], "shift": affine3[1]},
        writes={"out": out, "partials": partials},
    )
    if out is not None:
        return out
    means = case.new_floats(case.batch, case.channels)
    case.launch("mean", reads={"moments": partials}, writes={"mean": means})
    return means


def _normalise(
    case: Case,
    entry: str,
    norm: Norm,
    moments: torch.Tensor | None,
    reads: dict[str, torch.Tensor],
    writes: dict[str, torch.Tensor],
    channels: int,
) -> None:
    """A pass that normalises by a norm, whose statistics it writes where there are moments."""
    statistics = {"mean": norm.mean, "var": norm.var}
    reads = {**reads, "weight": norm.weight, "bias": norm.bias}
    if moments is None:
        reads |= statistics
    else:
        writes = writes | statistics
    case.launch(
        entry,
        reads={**reads, "moments": moments},
        writes=writes,
        eps=norm.eps,
        runs=case.runs(channels),
        counts=case.counts,
    )


def _forward_saving(
    case: Case, weights: Weights, norms: tuple[Norm, Norm, Norm], *, training: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Out, hidden and logits; in training the norms' mean and var are written."""
    entry = "moments" if training else "product"
    hidden, r = case.new_map(case.squeezed), case.new_map(case.squeezed)
    logits, out = case.new_map(case.channels), case.new_map(case.channels)
    partials = case.new_moments(case.squeezed) if training else None
    case.multiply(
        entry,
        case.squeezed,
        [(case.e, weights.squeeze)],
        finish=Finish.PLAIN,
        scaled=True,
        reads={"w": case.w},
        writes={"out": hidden, "partials": partials},
    )
    counters = case.new_counters() if training else None
    written = {"r": r} if counters is None else {"r": r, "counters": counters}
    _normalise(case, "relu", norms[0], partials, {"hidden": hidden}, written, case.squeezed)
    if training:
        partials = case.new_moments(case.channels)
        statistics = {"mean_of_out": norms[1].mean, "var_of_out": norms[1].var}
        case.multiply(
            "moments",
            case.channels,
            [(r, weights.expand)],
            finish=Finish.PLAIN,
            scaled=False,
            reads={},
            writes=statistics,
            updates={"counters": counters},
            scratch={"partials": partials},
        )
    combined, shift = _fold(case, weights, norms)
    partials = case.new_moments(case.channels) if training else None
    case.multiply(
        entry,
        case.channels,
        [(case.e, weights.fusion), (r, combined)],
        finish=Finish.PLAIN,
        scaled=True,
        reads={"w": case.w, "shift": shift},
        writes={"out": logits, "partials": partials},
    )
    maps = {"e": case.e, "w": case.w, "logits": logits}
    _normalise(case, "out", norms[2], partials, maps, {"out": out}, case.channels)
    return out, hidden, logits


def forward(
    e: torch.Tensor,
    w: torch.Tensor,
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
    save: bool,
) -> tuple[torch.Tensor, ...]:
    """Return out, the maps kept for the backward, and the batch statistics of the three norms.

    The kept maps are W1∗s (B, C//4, H, W) and Wf∗[s; M] (B, C, H, W) in e's dtype, or (0,) without
    `save`; the statistics are (0,) in evaluation.
    """
    case = Case(e, w)
    running = (
        *((running_mean1, running_var1), (running_mean2, running_var2)),
        (running_mean3, running_var3),
    )
    statistics = ((None, None),) * 3 if training else running
    norms = (
        case.norm(bn1_weight, bn1_bias, *statistics[0], eps1),
        case.norm(bn2_weight, bn2_bias, *statistics[1], eps2),
        case.norm(bn3_weight, bn3_bias, *statistics[2], eps3),
    )
    weights = Weights.of(e, squeeze_weight, expand_weight, fusion_weight)
    if not training and not save:
        out = _evaluate(case, weights, norms, mean=False)
        return (out, *(e.new_empty(0) for _ in range(2)), *(case.new_floats(0) for _ in range(6)))
    out, hidden, logits = _forward_saving(case, weights, norms, training=training)
    kept = (hidden, logits) if save else (e.new_empty(0), e.new_empty(0))
    if not training:
        return (out, *kept, *(case.new_floats(0) for _ in range(6)))
    return (out, *kept, *(vector for norm in norms for vector in (norm.mean, norm.var)))


def forward_mean(
    e: torch.Tensor,
    w: torch.Tensor,
    squeeze_weight: torch.Tensor,
    bn1_weight: torch.Tensor,
    bn1_bias: torch.Tensor,
    running_mean1: torch.Tensor,
    running_var1: torch.Tensor,
    expand_weight: torch.Tensor,
    bn2_weight: torch.Tensor,
    bn2_bias: torch.Tensor,
    running_mean2: torch.Tensor,
    running_var2: torch.Tensor,
    fusion_weight: torch.Tensor,
    bn3_weight: torch.Tensor,
    bn3_bias: torch.Tensor,
    running_mean3: torch.Tensor,
    running_var3: torch.Tensor,
    eps1: float,
    eps2: float,
    eps3: float,
) -> torch.Tensor:
    """Means over H×W of evaluation's out, (B, C) float32; the map is never written (5.6)."""
    case = Case(e, w)
    norms = (
        case.norm(bn1_weight, bn1_bias, running_mean1, running_var1, eps1),
        case.norm(bn2_weight, bn2_bias, running_mean2, running_var2, eps2),
        case.norm(bn3_weight, bn3_bias, running_mean3, running_var3, eps3),
    )
    weights = Weights.of(e, squeeze_weight, expand_weight, fusion_weight)
    return _evaluate(case, weights, norms, mean=True)
