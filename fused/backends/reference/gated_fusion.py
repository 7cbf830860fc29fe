"""Gated fusion (spec.md 2.4): e, w → out = φ ⊙ e + (1 − φ) ⊙ s with s = e ⊙ w."""

from __future__ import annotations

import torch

from ...contract import memory_format, product_dtype, statistics_dtype
from . import normalisation
from .blocks import grouped
from .products import convolve, convolve_input_backward, convolve_weight_backward

_DIMS = (0, 2, 3)


def _column(vector: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return vector.to(dtype)[None, :, None, None]


def _spread(w: torch.Tensor, channels: int) -> torch.Tensor:
    """w (B, G, H, W) repeated over the channels of its group, (B, C, H, W)."""
    return w.repeat_interleave(channels // w.shape[1], 1)


def _statistics(
    z: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if training:
        return normalisation.batch_statistics(z, _DIMS)
    assert running_mean is not None
    assert running_var is not None
    return _column(running_mean, z.dtype), _column(running_var, z.dtype)


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
    dtype, product, channels = statistics_dtype(e.dtype), product_dtype(e), e.shape[1]
    gate = _spread(w, channels).to(dtype)
    s = (e * gate).to(product)
    hidden = convolve(s, squeeze_weight)
    mean1, var1 = _statistics(hidden.to(dtype), running_mean1, running_var1, training)
    column1 = _column(bn1_weight, dtype), _column(bn1_bias, dtype)
    r = normalisation.affine(hidden.to(dtype), mean1, var1, *column1, eps1).relu().to(product)
    expanded = convolve(r, expand_weight).to(dtype)
    mean2, var2 = _statistics(expanded, running_mean2, running_var2, training)
    column2 = _column(bn2_weight, dtype), _column(bn2_bias, dtype)
    m = normalisation.affine(expanded, mean2, var2, *column2, eps2).to(product)
    of_s, of_m = fusion_weight.split(channels, 1)
    logits = convolve(s, of_s) + convolve(m, of_m)
    mean3, var3 = _statistics(logits.to(dtype), running_mean3, running_var3, training)
    column3 = _column(bn3_weight, dtype), _column(bn3_bias, dtype)
    phi = normalisation.affine(logits.to(dtype), mean3, var3, *column3, eps3).sigmoid()
    # Identity 5.2: out = e ⊙ (w + φ (1 − w)).
    out = (e * torch.addcmul(gate, phi, 1 - gate)).to(e.dtype)

    empty = e.new_empty(0)
    kept = [empty, torch.empty_like(empty)]
    if save:
        fmt = memory_format(e)
        kept = [z.to(e.dtype).contiguous(memory_format=fmt) for z in (hidden, logits)]
    statistics = [s.flatten() for s in (mean1, var1, mean2, var2, mean3, var3)]
    if not training:
        statistics = [empty.new_empty(0, dtype=dtype) for _ in statistics]
    return (out.contiguous(memory_format=memory_format(e)), *kept, *statistics)


def _normalisation_backward(
    grad: torch.Tensor,
    z: torch.Tensor,
    statistics: tuple[torch.Tensor | None, torch.Tensor | None],
    weight: torch.Tensor,
    eps: float,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for z, γ and β of a batch norm over channels."""
    assert statistics[0] is not None
    assert statistics[1] is not None
    mean, var = _column(statistics[0], grad.dtype), _column(statistics[1], grad.dtype)
    n = normalisation.normalised(z.to(grad.dtype), mean, var, eps)
    gamma = _column(weight, grad.dtype)
    grad_z = normalisation.backward(grad, n, var, gamma, eps, _DIMS if training else None)
    return grad_z, (grad * n).sum(_DIMS).to(weight.dtype), grad.sum(_DIMS).to(weight.dtype)


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
    dtype, product, channels = statistics_dtype(e.dtype), product_dtype(e), e.shape[1]
    statistics1 = (mean1, var1) if training else (running_mean1, running_var1)
    statistics2 = (mean2, var2) if training else (running_mean2, running_var2)
    statistics3 = (mean3, var3) if training else (running_mean3, running_var3)
    gate, values, grad = _spread(w, channels).to(dtype), e.to(dtype), grad_out.to(dtype)
    s = (values * gate).to(product)

    def affine(z, statistics, weight, bias, eps):  # type: ignore[no-untyped-def]
        mean, var = (_column(v, dtype) for v in statistics)
        columns = _column(weight, dtype), _column(bias, dtype)
        return normalisation.affine(z.to(dtype), mean, var, *columns, eps)

    r = affine(hidden, statistics1, bn1_weight, bn1_bias, eps1).relu().to(product)
    expanded = convolve(r, expand_weight).to(dtype)
    m = affine(expanded, statistics2, bn2_weight, bn2_bias, eps2).to(product)
    phi = affine(gate_logits, statistics3, bn3_weight, bn3_bias, eps3).sigmoid()

    through = grad * values
    grad_e = grad * torch.addcmul(gate, phi, 1 - gate)
    grad_gate = through * (1 - phi)
    grad_phi = through * (1 - gate) * phi * (1 - phi)
    grad_logits, grad_bn3_weight, grad_bn3_bias = _normalisation_backward(
        grad_phi, gate_logits, statistics3, bn3_weight, eps3, training
    )
    grad_logits = grad_logits.to(product)
    grad_fusion = torch.cat([convolve_weight_backward(grad_logits, z, 1) for z in (s, m)], 1)
    of_s, of_m = fusion_weight.split(channels, 1)
    grad_s = convolve_input_backward(grad_logits, of_s).to(dtype)
    grad_m = convolve_input_backward(grad_logits, of_m).to(dtype)
    grad_expanded, grad_bn2_weight, grad_bn2_bias = _normalisation_backward(
        grad_m, expanded, statistics2, bn2_weight, eps2, training
    )
    grad_expanded = grad_expanded.to(product)
    grad_expand = convolve_weight_backward(grad_expanded, r, 1)
    grad_r = convolve_input_backward(grad_expanded, expand_weight).to(dtype) * (r > 0)
    grad_hidden, grad_bn1_weight, grad_bn1_bias = _normalisation_backward(
        grad_r, hidden, statistics1, bn1_weight, eps1, training
    )
    grad_hidden = grad_hidden.to(product)
    grad_squeeze = convolve_weight_backward(grad_hidden, s, 1)
    grad_s = grad_s + convolve_input_backward(grad_hidden, squeeze_weight)

    grad_e = torch.addcmul(grad_e, grad_s, gate)
    grad_w = grouped(torch.addcmul(grad_gate, grad_s, values), w.shape[1]).sum(2)
    return (
        grad_e.to(e.dtype).contiguous(memory_format=memory_format(e)),
        grad_w.to(w.dtype).contiguous(memory_format=memory_format(w)),
        grad_squeeze.to(squeeze_weight.dtype),
        *(grad_bn1_weight, grad_bn1_bias.to(bn1_bias.dtype)),
        grad_expand.to(expand_weight.dtype),
        *(grad_bn2_weight, grad_bn2_bias.to(bn2_bias.dtype)),
        grad_fusion.to(fusion_weight.dtype),
        *(grad_bn3_weight, grad_bn3_bias.to(bn3_bias.dtype)),
    )
