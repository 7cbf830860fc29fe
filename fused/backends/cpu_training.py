"""Training of the stages built on the native products, forward and backward.

Only what `contract.SAVED` lists is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..contract import memory_format
from .cpu_products import (
    FusionParameters,
    folded_norm,
    matrix_product,
    pack,
    packed_parts,
    rounds_weights,
)
from .native import kernel
from .reference import channel_interaction as reference_channel_interaction
from .reference import msff as reference_msff

Vector = torch.Tensor

# --------------------------------------------------------------------------- channel interaction


def channel_interaction_backward(
    grad_e: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    mean: torch.Tensor,
    maximum: torch.Tensor,
    argmax: torch.Tensor,
    squeeze_weight: torch.Tensor,
    excite_weight: torch.Tensor,
    interaction_weight: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients for x and the three weights; as the reference, Wci ∗ x is not recomputed."""
    outer = kernel("product_gradient")(grad_e, x, None, None, None, True)
    weights = (squeeze_weight, excite_weight, interaction_weight)
    floats = (squeeze_weight.float(), excite_weight.float(), interaction_weight.float())
    small = reference_channel_interaction.small_backward(
        outer, gate, mean, maximum, *floats, matrix_product
    )
    transposed = pack(interaction_weight.transpose(0, 1), grad_e)
    grad_x = kernel("channel_interaction_input_backward")(
        grad_e, gate, transposed, small.mean, small.maximum, argmax
    )
    grad_x = grad_x.contiguous(memory_format=memory_format(x))
    return grad_x, *(g.to(w.dtype) for g, w in zip(small[2:], weights, strict=True))


# ---------------------------------------------------------------------------------- gated fusion


class _Statistics(NamedTuple):
    """Means and variances of the three norms, of the batch or running."""

    mean1: Vector
    var1: Vector
    mean2: Vector
    var2: Vector
    mean3: Vector
    var3: Vector


class _Fold(NamedTuple):
    """Float32 matrices of gated fusion, and its norms as scales and shifts."""

    squeeze: torch.Tensor
    expand: torch.Tensor
    of_s: torch.Tensor
    of_m: torch.Tensor
    of_r: torch.Tensor  # Wf_m·D2·W2, identity 5.3
    scale2: Vector
    shift2: Vector

    @staticmethod
    def of(p: FusionParameters, scale2: Vector, shift2: Vector) -> _Fold:
        expand = p.expand_weight[:, :, 0, 0].float()
        of_s, of_m = p.fusion_weight[:, :, 0, 0].float().split(p.fusion_weight.shape[0], 1)
        of_r = matrix_product(of_m, scale2[:, None] * expand)
        squeeze = p.squeeze_weight[:, :, 0, 0].float()
        return _Fold(squeeze, expand, of_s, of_m, of_r, scale2, shift2)


def _norm(
    weight: torch.Tensor, bias: torch.Tensor, mean: Vector | None, var: Vector | None, eps: float
) -> tuple[Vector, Vector]:
    scale, shift = folded_norm(weight, bias, mean, var, eps)
    return scale.float(), shift.float()


def gated_fusion_forward(
    e: torch.Tensor, w: torch.Tensor, p: FusionParameters, save: bool
) -> tuple[torch.Tensor, ...]:
    """Batch statistics, or running ones and maps kept for the backward.

    The norm after the expanding convolution needs the statistics of W2∗r; the map itself is never
    stored, and the last convolution reads r through identity 5.3.
    """
    product, training = kernel("product_moments"), p.training
    squeeze = pack(p.squeeze_weight, e, exact=True)
    hidden, *batch1 = product(e, squeeze, w, None, None, None, None, None, True, training)
    mean1, var1 = batch1 if training else (p.running_mean1, p.running_var1)
    scale1, shift1 = _norm(p.bn1_weight, p.bn1_bias, mean1, var1, p.eps1)
    mean2, var2 = p.running_mean2, p.running_var2
    batch2 = [e.new_empty(0, dtype=torch.float32) for _ in range(2)]
    if training:
        expand = pack(p.expand_weight, e)
        _, *batch2 = product(hidden, expand, None, None, None, scale1, shift1, None, False, True)
        mean2, var2 = batch2
    fold = _Fold.of(p, *_norm(p.bn2_weight, p.bn2_bias, mean2, var2, p.eps2))
    bias = matrix_product(fold.of_m, fold.shift2)
    if training and rounds_weights(e):
        # The second norm's result has the mean beta2; rounded, of_r would miss it by 2^-9 of r's.
        r = kernel("norm_relu")(hidden, scale1, shift1, e)
        mean_r = kernel("channel_statistics")(r)[0].mean(0)
        bias = matrix_product(fold.of_m, p.bn2_bias.float())
        bias -= matrix_product(fold.of_r.to(e.dtype).float(), mean_r)
    packed = (pack(fold.of_s, e), pack(fold.of_r, e))
    logits, *batch3 = product(
        *(e, packed[0], w, hidden, packed[1], scale1, shift1, bias, True, training)
    )
    mean3, var3 = batch3 if training else (p.running_mean3, p.running_var3)
    scale3, shift3 = _norm(p.bn3_weight, p.bn3_bias, mean3, var3, p.eps3)
    out = kernel("gated_fusion_apply")(e, w, logits, scale3, shift3)
    if not save:
        hidden, logits = e.new_empty(0), e.new_empty(0)
    return out, hidden, logits, *batch1, *batch2, *batch3


def gated_fusion_backward(
    grad_out: torch.Tensor,
    e: torch.Tensor,
    w: torch.Tensor,
    hidden: torch.Tensor,
    gate_logits: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    """Gradients for e, w and the nine parameters.

    M and its gradient are never formed: they meet the pixels only through r (C//4 channels), so
    what the second norm needs follows from grad_logits·rᵀ and r·rᵀ.
    """
    p = FusionParameters(*rest[6:])
    s = _Statistics(*(rest[:6] if p.training else _running(p)))
    norm1 = [v.float() for v in (s.mean1, s.var1, p.bn1_weight, p.bn1_bias)]
    norm3 = [v.float() for v in (s.mean3, s.var3, p.bn3_weight, p.bn3_bias)]
    grad_logits, grad_bn3_weight, grad_bn3_bias = kernel("norm_gate_backward")(
        grad_out, e, w, gate_logits, *norm3, p.eps3, p.training
    )
    scale1, shift1 = _norm(p.bn1_weight, p.bn1_bias, s.mean1, s.var1, p.eps1)
    r = kernel("norm_relu")(hidden, scale1, shift1, hidden)
    fold = _Fold.of(p, *_norm(p.bn2_weight, p.bn2_bias, s.mean2, s.var2, p.eps2))
    gradient = kernel("product_gradient")
    grad_of_s = gradient(grad_logits, e, w, None, None, False)[0]
    # The sum of what leaves a batch norm backwards is zero when its statistics are the batch's.
    scale3, shift3 = _norm(p.bn3_weight, p.bn3_bias, s.mean3, s.var3, p.eps3)
    total = torch.zeros_like(scale3) if p.training else scale3 * grad_bn3_bias
    middle = _middle_backward(grad_logits, total, r, fold, p, s)
    grad_hidden, grad_bn1_weight, grad_bn1_bias = kernel("norm_relu_backward")(
        middle.grad_r, hidden, *norm1, p.eps1, p.training
    )
    grad_squeeze = gradient(grad_hidden, e, w, None, None, False)[0]
    grad_e, grad_w = kernel("gated_fusion_input_backward")(
        *(grad_out, e, w, gate_logits, scale3, shift3),
        *(grad_logits, pack(fold.of_s.T, e), grad_hidden, pack(fold.squeeze.T, e)),
    )
    grad_fusion = torch.cat([grad_of_s, middle.of_m], 1)
    gradients = {
        "squeeze_weight": grad_squeeze[:, :, None, None],
        "bn1_weight": grad_bn1_weight,
        "bn1_bias": grad_bn1_bias,
        "expand_weight": middle.expand[:, :, None, None],
        "bn2_weight": middle.bn2_weight,
        "bn2_bias": middle.bn2_bias,
        "fusion_weight": grad_fusion[:, :, None, None],
        "bn3_weight": grad_bn3_weight,
        "bn3_bias": grad_bn3_bias,
    }
    return grad_e, grad_w, *(g.to(getattr(p, name).dtype) for name, g in gradients.items())


def _running(p: FusionParameters) -> tuple[torch.Tensor, ...]:
    values = (
        *(p.running_mean1, p.running_var1, p.running_mean2, p.running_var2),
        *(p.running_mean3, p.running_var3),
    )
    assert all(v is not None for v in values)  # the contract refuses evaluation without them
    return tuple(v.float() for v in values if v is not None)


class _Middle(NamedTuple):
    grad_r: torch.Tensor
    of_m: torch.Tensor
    expand: torch.Tensor
    bn2_weight: Vector
    bn2_bias: Vector


def _middle_backward(
    grad_logits: torch.Tensor,
    total: Vector,
    r: torch.Tensor,
    fold: _Fold,
    p: FusionParameters,
    s: _Statistics,
) -> _Middle:
    """Back through Wf_m, the second norm and W2.

    Args:
        grad_logits: gradient of the last convolution's result.
        total: its sum over samples and pixels.
        r: what W2 multiplies.
        fold: the weights.
        p: the parameters.
        s: the norms' statistics.
    """
    gradient, product = kernel("product_gradient"), kernel("product_moments")
    by_r = gradient(grad_logits, r, None, None, None, False)[0]  # grad_logits·rᵀ
    by_expanded = matrix_product(by_r, fold.expand.T)
    rstd = (s.var2.double() + p.eps2).rsqrt().float()
    by_normalised = (by_expanded - total[:, None] * s.mean2) * rstd
    grad_bn2_weight = (fold.of_m * by_normalised).sum(0)
    grad_bn2_bias = matrix_product(fold.of_m.T, total)
    grad_of_m = by_expanded * fold.scale2 + total[:, None] * fold.shift2
    grad_expand = fold.scale2[:, None] * matrix_product(fold.of_m.T, by_r)
    back = pack(fold.of_r.T, grad_logits)
    if not p.training:
        grad_r, *_ = product(grad_logits, back, *[None] * 6, True, False)
        return _Middle(grad_r, grad_of_m, grad_expand, grad_bn2_weight, grad_bn2_bias)
    # Through the statistics too: grad_expanded = scale·(grad_m − share − n·product_share).
    count = r.shape[0] * r.shape[2] * r.shape[3]
    share, product_share = grad_bn2_bias / count, grad_bn2_weight / count
    sum_r = r.sum((0, 2, 3), dtype=torch.float32)
    squares = gradient(r, r, None, None, None, False)[0]
    by_n = rstd[:, None] * (matrix_product(fold.expand, squares) - s.mean2[:, None] * sum_r)
    removed = share[:, None] * sum_r + product_share[:, None] * by_n
    grad_expand -= fold.scale2[:, None] * removed
    slope = fold.scale2 * product_share * rstd
    of_r = matrix_product(fold.expand.T, slope[:, None] * fold.expand)
    bias = matrix_product(fold.expand.T, slope * s.mean2 - fold.scale2 * share)
    grad_r, *_ = product(
        *(grad_logits, back, None, r, pack(-of_r, r), None, None, bias, True, False)
    )
    return _Middle(grad_r, grad_of_m, grad_expand, grad_bn2_weight, grad_bn2_bias)


# ------------------------------------------------------------------------------------------ msff


def msff_forward(
    features: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bn_weight: torch.Tensor,
    bn_bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """Out and the batch's statistics; the sum before the norm is not kept."""
    z, mean, var = kernel("msff_sum")(list(features), packed_parts(features, weight), True)
    scale, shift = _norm(bn_weight, bn_bias, mean, var, eps)
    return kernel("norm_relu")(z, scale, shift, features[0]), mean, var


def msff_backward(
    grad_out: torch.Tensor,
    features: Sequence[torch.Tensor],
    batch_mean: torch.Tensor,
    batch_var: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor,
    bn_bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    eps: float,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for the maps, W, γ and β; the sum before the norm is recomputed."""
    # Where weights are rounded, this z is more exact than the forward's: it has its own statistics.
    anew = training and rounds_weights(features[0])
    z, *of_z = kernel("msff_sum")(list(features), packed_parts(features, weight, exact=True), anew)
    mean, var = (batch_mean, batch_var) if training else (running_mean, running_var)
    if anew:
        mean, var = of_z
    assert mean is not None
    assert var is not None
    norm = (v.float() for v in (mean, var, bn_weight, bn_bias))
    grad_z, grad_bn_weight, grad_bn_bias = kernel("norm_relu_backward")(
        grad_out, z, *norm, eps, training
    )
    del z
    size = list(reference_msff.target_size(features))
    parts = weight.split([f.shape[1] for f in features], 1)
    grad_features, grad_weights = [], []
    for feature, part in zip(features, parts, strict=True):
        native = grad_z
        if list(feature.shape[2:]) != size:
            native = kernel("msff_shrink")(grad_z, *feature.shape[2:])
        grad_weights.append(kernel("product_gradient")(native, feature, None, None, None, False)[0])
        back = pack(part.transpose(0, 1), native)
        grad_feature = kernel("pointwise_packed")(native, back, None, None, False)
        grad_features.append(grad_feature.contiguous(memory_format=memory_format(feature)))
    grad_weight = torch.cat(grad_weights, 1)[:, :, None, None]
    return (
        grad_features,
        grad_weight.to(weight.dtype),
        grad_bn_weight.to(bn_weight.dtype),
        grad_bn_bias.to(bn_bias.dtype),
    )
