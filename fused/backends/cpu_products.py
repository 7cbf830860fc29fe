"""Stages built on the native products: their weights are packed a call, 4 MB for 1024 × 1024.

A frozen network packs once and calls the `_packed` ops itself: native.py has their schemas, and
`gated_fusion_weights` and `folded_norm` give their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .native import kernel


def pack(
    weight: torch.Tensor, x: torch.Tensor, *, exact: bool = False, kept: bool = False
) -> torch.Tensor:
    """Pack a weight for products with maps of the dtype of `x`.

    Args:
        weight: (M, K) or (M, K, 1, 1).
        x: a map; for a bfloat16 one weights are rounded to that where the processor multiplies it.
        exact: multiply in float32 all the same. Training wants this of what a ReLU follows: an
            error of 2^-9 there switches pixels on or off, and the gradient's error is its root.
        kept: for many calls with maps of any size, not for this `x` alone.
    """
    bfloat16 = x.dtype == torch.bfloat16 and not exact
    plane = None if kept else x.shape[2] * x.shape[3]
    packed: torch.Tensor = kernel("pack_product_weight")(weight.float(), bfloat16, plane)
    return packed


def rounds_weights(x: torch.Tensor) -> bool:
    """Whether `pack` rounds weights for maps like `x`, unless told otherwise."""
    return x.dtype == torch.bfloat16 and kernel("cpu_isa")() == "avx512bf16"


def matrix_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of float32 matrices (M, K) and (K, N), or of a matrix and a vector (K).

    The library's has other bits with other numbers of threads; ours has not.
    """
    columns = b if b.dim() == 2 else b[:, None]
    packed = kernel("pack_product_weight")(a, False, columns.shape[1])
    out: torch.Tensor = kernel("pointwise_packed")(
        columns[None, :, None], packed, None, None, False
    )
    return out[0, :, 0] if b.dim() == 2 else out[0, :, 0, 0]


def folded_norm(
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 scale and shift (C,) that do what a batch norm with these statistics does."""
    assert mean is not None  # the contract refuses evaluation without running statistics
    assert var is not None
    scale = weight.double() * (var.double() + eps).rsqrt()
    return scale, bias.double() - mean.double() * scale


# --------------------------------------------------------------------------- channel interaction


def channel_interaction(
    x: torch.Tensor,
    squeeze_weight: torch.Tensor,
    excite_weight: torch.Tensor,
    interaction_weight: torch.Tensor,
    *known: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Return e (B, C, H, W), the gate a (B, C), and x's mean, maximum and argmax (B, C).

    Where these three are `known`, x is read once less.
    """
    results: tuple[torch.Tensor, ...] = kernel("channel_interaction_packed")(
        x, squeeze_weight.float(), excite_weight.float(), pack(interaction_weight, x), *known
    )
    return results


# ---------------------------------------------------------------------------------- gated fusion


class FusionWeights(NamedTuple):
    """What `gated_fusion_packed` takes after e and w, before packing; float32."""

    squeeze: torch.Tensor
    squeeze_scale: torch.Tensor
    squeeze_shift: torch.Tensor
    fusion_of_s: torch.Tensor
    fusion_of_r: torch.Tensor
    fusion_scale: torch.Tensor
    fusion_shift: torch.Tensor

    def packed(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The op's arguments for the maps `x`."""
        weights = ("squeeze", "fusion_of_s", "fusion_of_r")
        pairs = self._asdict().items()
        return tuple(pack(v, x) if key in weights else v.float() for key, v in pairs)


def gated_fusion_weights(
    squeeze_weight: torch.Tensor,
    expand_weight: torch.Tensor,
    fusion_weight: torch.Tensor,
    norms: Sequence[tuple[torch.Tensor, torch.Tensor]],
    dtype: torch.dtype = torch.float64,
) -> FusionWeights:
    """Fold gated fusion by identity 5.3.

    Args:
        squeeze_weight: W1.
        expand_weight: W2.
        fusion_weight: Wf.
        norms: scale and shift of the three batch norms.
        dtype: of the product Wf_m·D2·W2, which costs C³/4 multiply-adds; float32 is quick.
    """
    channels = fusion_weight.shape[0]
    of_s, of_m = fusion_weight[:, :, 0, 0].to(dtype).split(channels, 1)
    (scale1, shift1), (scale2, shift2), (scale3, shift3) = norms
    product = matrix_product if dtype == torch.float32 else torch.matmul
    of_r = product(of_m, scale2.to(dtype)[:, None] * expand_weight[:, :, 0, 0].to(dtype))
    bias = product(of_m, shift2.to(dtype)).double()
    return FusionWeights(
        *(squeeze_weight, scale1.float(), shift1.float(), of_s, of_r),
        *(scale3.float(), (shift3 + scale3 * bias).float()),
    )


class FusionParameters(NamedTuple):
    """The parameters of gated fusion in the op's order."""

    squeeze_weight: torch.Tensor
    bn1_weight: torch.Tensor
    bn1_bias: torch.Tensor
    running_mean1: torch.Tensor | None
    running_var1: torch.Tensor | None
    expand_weight: torch.Tensor
    bn2_weight: torch.Tensor
    bn2_bias: torch.Tensor
    running_mean2: torch.Tensor | None
    running_var2: torch.Tensor | None
    fusion_weight: torch.Tensor
    bn3_weight: torch.Tensor
    bn3_bias: torch.Tensor
    running_mean3: torch.Tensor | None
    running_var3: torch.Tensor | None
    training: bool
    eps1: float
    eps2: float
    eps3: float


def gated_fusion_folded(
    e: torch.Tensor, w: torch.Tensor, p: FusionParameters, *, mean_only: bool = False
) -> torch.Tensor:
    """Out (B, C, H, W) in evaluation, or its means over H×W (B, C) in float32."""
    norms = [
        folded_norm(p.bn1_weight, p.bn1_bias, p.running_mean1, p.running_var1, p.eps1),
        folded_norm(p.bn2_weight, p.bn2_bias, p.running_mean2, p.running_var2, p.eps2),
        folded_norm(p.bn3_weight, p.bn3_bias, p.running_mean3, p.running_var3, p.eps3),
    ]
    # float32 here, not the default: every call folds, and 0.5 GFLOP in float64 would show.
    weights = gated_fusion_weights(
        p.squeeze_weight, p.expand_weight, p.fusion_weight, norms, torch.float32
    )
    out: torch.Tensor = kernel("gated_fusion_packed")(e, w, *weights.packed(e), mean_only)
    return out


# ------------------------------------------------------------------------------------------ msff


def packed_parts(
    features: Sequence[torch.Tensor], weight: torch.Tensor, *, exact: bool = False
) -> list[torch.Tensor]:
    """The packed part of msff's weight for each map; `exact` as in `pack`."""
    parts = weight.split([f.shape[1] for f in features], 1)
    return [pack(part, features[0], exact=exact) for part in parts]


def msff_folded(
    features: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bn_weight: torch.Tensor,
    bn_bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Out (B, C_out, H, W) in evaluation."""
    scale, shift = folded_norm(bn_weight, bn_bias, running_mean, running_var, eps)
    packed = packed_parts(features, weight)
    out: torch.Tensor = kernel("msff_packed")(list(features), packed, scale.float(), shift.float())
    return out
