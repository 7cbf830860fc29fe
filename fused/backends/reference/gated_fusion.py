"""Gated fusion (spec.md 2.4): e, w → out = φ ⊙ e + (1 − φ) ⊙ s with s = e ⊙ w."""

from __future__ import annotations

from typing import NamedTuple

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


class _Norm(NamedTuple):
    """One batch norm with the statistics it uses, all (1, C, 1, 1)."""

    mean: torch.Tensor
    var: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    @staticmethod
    def of(
        statistics: tuple[torch.Tensor | None, torch.Tensor | None],
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> _Norm:
        """From vectors (C,); the contract refuses evaluation without running statistics."""
        mean, var = statistics
        assert mean is not None
        assert var is not None
        mean, var = _column(mean, dtype), _column(var, dtype)
        return _Norm(mean, var, _column(weight, dtype), _column(bias, dtype), eps)

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """Normalise z in the statistics' dtype."""
        return normalisation.affine(z.to(self.mean.dtype), *self)

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift (C,) that do the same."""
        scale = self.weight * (self.var + self.eps).rsqrt()
        return scale.flatten(), (self.bias - self.mean * scale).flatten()

    def backward(
        self, grad: torch.Tensor, z: torch.Tensor, training: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients for z, γ and β."""
        n = normalisation.normalised(z.to(grad.dtype), self.mean, self.var, self.eps)
        dims = _DIMS if training else None
        grad_z = normalisation.backward(grad, n, self.var, self.weight, self.eps, dims)
        return grad_z, (grad * n).sum(_DIMS), grad.sum(_DIMS)


def _norm(
    z: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running: tuple[torch.Tensor | None, torch.Tensor | None],
    eps: float,
    training: bool,
) -> _Norm:
    """A norm over z: of its own statistics in training, of the running ones in evaluation."""
    dtype = statistics_dtype(z.dtype)
    if not training:
        return _Norm.of(running, weight, bias, eps, dtype)
    mean, var = normalisation.batch_statistics(z.to(dtype), _DIMS)
    return _Norm(mean, var, _column(weight, dtype), _column(bias, dtype), eps)


def _folded(
    e: torch.Tensor,
    w: torch.Tensor,
    squeeze_weight: torch.Tensor,
    expand_weight: torch.Tensor,
    fusion_weight: torch.Tensor,
    norms: tuple[_Norm, _Norm, _Norm],
) -> torch.Tensor:
    """out in evaluation by identity 5.3: M is linear behind the ReLU, so Wf_m·D2·W2 is one product.

    Batch norms become scales of the weights and biases; 1.5 C² instead of 2.5 C² multiply-adds.
    """
    product, channels = product_dtype(e), e.shape[1]
    scales, shifts = zip(*(norm.folded() for norm in norms), strict=True)
    of_s, of_m = fusion_weight.to(shifts[0].dtype)[:, :, 0, 0].split(channels, 1)
    expand = scales[1][:, None] * expand_weight[:, :, 0, 0].to(of_m.dtype)
    combined = torch.cat([of_s, of_m @ expand], 1) * scales[2][:, None]
    bias = torch.addmv(shifts[2], of_m * scales[2][:, None], shifts[1])

    slabs = grouped(e, w.shape[1])
    s = (slabs * w[:, :, None]).to(product).reshape(e.shape)
    squeeze = squeeze_weight * scales[0][:, None, None, None]
    r = convolve(s, squeeze, shifts[0]).relu()
    phi = convolve(torch.cat([s, r], 1), combined[:, :, None, None], bias).sigmoid()
    # Identity 5.2: out = e ⊙ (w + φ (1 − w)).
    gate = w[:, :, None].to(of_s.dtype)
    out = slabs * torch.addcmul(gate, grouped(phi, w.shape[1]), 1 - gate)
    return out.reshape(e.shape).to(e.dtype).contiguous(memory_format=memory_format(e))


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
    if not training and not save and _folding_pays(e):
        norm1 = _Norm.of((running_mean1, running_var1), bn1_weight, bn1_bias, eps1, dtype)
        norm2 = _Norm.of((running_mean2, running_var2), bn2_weight, bn2_bias, eps2, dtype)
        norm3 = _Norm.of((running_mean3, running_var3), bn3_weight, bn3_bias, eps3, dtype)
        out = _folded(e, w, squeeze_weight, expand_weight, fusion_weight, (norm1, norm2, norm3))
        nothing = (e.new_empty(0) for _ in range(2))
        return (out, *nothing, *(e.new_empty(0, dtype=dtype) for _ in range(6)))
    gate = _spread(w, channels).to(dtype)
    s = (e * gate).to(product)
    hidden = convolve(s, squeeze_weight)
    running = (running_mean1, running_var1)
    norm1 = _norm(hidden, bn1_weight, bn1_bias, running, eps1, training)
    expanded = convolve(norm1.apply(hidden).relu().to(product), expand_weight)
    running = (running_mean2, running_var2)
    norm2 = _norm(expanded, bn2_weight, bn2_bias, running, eps2, training)
    of_s, of_m = fusion_weight.split(channels, 1)
    logits = convolve(s, of_s) + convolve(norm2.apply(expanded).to(product), of_m)
    running = (running_mean3, running_var3)
    norm3 = _norm(logits, bn3_weight, bn3_bias, running, eps3, training)
    # Identity 5.2: out = e ⊙ (w + φ (1 − w)).
    out = (e * torch.addcmul(gate, norm3.apply(logits).sigmoid(), 1 - gate)).to(e.dtype)

    empty = e.new_empty(0)
    kept = [empty, torch.empty_like(empty)]
    if save:
        fmt = memory_format(e)
        kept = [z.to(e.dtype).contiguous(memory_format=fmt) for z in (hidden, logits)]
    statistics = [v.flatten() for norm in (norm1, norm2, norm3) for v in (norm.mean, norm.var)]
    if not training:
        statistics = [empty.new_empty(0, dtype=dtype) for _ in statistics]
    return (out.contiguous(memory_format=memory_format(e)), *kept, *statistics)


def _folding_pays(e: torch.Tensor) -> bool:
    """Whether the map has the pixels to win back the fold's product of C × C/4 × C.

    While torch traces a graph the batch may be of any size, and must not be asked for.
    """
    if torch.compiler.is_compiling():
        return True
    return e.shape[0] * e.shape[2] * e.shape[3] > e.shape[1] // 4


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
    norm1 = _Norm.of(statistics1, bn1_weight, bn1_bias, eps1, dtype)
    norm2 = _Norm.of(statistics2, bn2_weight, bn2_bias, eps2, dtype)
    norm3 = _Norm.of(statistics3, bn3_weight, bn3_bias, eps3, dtype)
    gate, values, grad = _spread(w, channels).to(dtype), e.to(dtype), grad_out.to(dtype)
    s = (values * gate).to(product)
    r = norm1.apply(hidden).relu().to(product)
    expanded = convolve(r, expand_weight).to(dtype)
    m = norm2.apply(expanded).to(product)
    phi = norm3.apply(gate_logits).sigmoid()

    through = grad * values
    grad_e = grad * torch.addcmul(gate, phi, 1 - gate)
    grad_gate = through * (1 - phi)
    grad_phi = through * (1 - gate) * phi * (1 - phi)
    grad_logits, grad_bn3_weight, grad_bn3_bias = norm3.backward(grad_phi, gate_logits, training)
    grad_logits = grad_logits.to(product)
    grad_fusion = torch.cat([convolve_weight_backward(grad_logits, z, 1) for z in (s, m)], 1)
    of_s, of_m = fusion_weight.split(channels, 1)
    grad_s = convolve_input_backward(grad_logits, of_s).to(dtype)
    grad_m = convolve_input_backward(grad_logits, of_m).to(dtype)
    grad_expanded, grad_bn2_weight, grad_bn2_bias = norm2.backward(grad_m, expanded, training)
    grad_expanded = grad_expanded.to(product)
    grad_expand = convolve_weight_backward(grad_expanded, r, 1)
    grad_r = convolve_input_backward(grad_expanded, expand_weight).to(dtype) * (r > 0)
    grad_hidden, grad_bn1_weight, grad_bn1_bias = norm1.backward(grad_r, hidden, training)
    grad_hidden = grad_hidden.to(product)
    grad_squeeze = convolve_weight_backward(grad_hidden, s, 1)
    grad_s = grad_s + convolve_input_backward(grad_hidden, squeeze_weight)

    grad_e = torch.addcmul(grad_e, grad_s, gate)
    grad_w = grouped(torch.addcmul(grad_gate, grad_s, values), w.shape[1]).sum(2)
    return (
        grad_e.to(e.dtype).contiguous(memory_format=memory_format(e)),
        grad_w.to(w.dtype).contiguous(memory_format=memory_format(w)),
        grad_squeeze.to(squeeze_weight.dtype),
        *(grad_bn1_weight.to(bn1_weight.dtype), grad_bn1_bias.to(bn1_bias.dtype)),
        grad_expand.to(expand_weight.dtype),
        *(grad_bn2_weight.to(bn2_weight.dtype), grad_bn2_bias.to(bn2_bias.dtype)),
        grad_fusion.to(fusion_weight.dtype),
        *(grad_bn3_weight.to(bn3_weight.dtype), grad_bn3_bias.to(bn3_bias.dtype)),
    )
