"""Batch norms and the last products folded into weights, in float64, for the frozen form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn


class Affine(NamedTuple):
    """A batch norm in evaluation: y = scale·x + shift, float64 (C,)."""

    scale: torch.Tensor
    shift: torch.Tensor

    @staticmethod
    def of(norm: Any) -> Affine:
        """From the running statistics, γ and β of an affine norm that tracks them."""
        scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        return Affine(scale, norm.bias.double() - norm.running_mean.double() * scale)


class Product(NamedTuple):
    """A convolution's weight (O, I, k, k) and bias (O,), float64 when folded."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> Product:
        """The same, rounded to `dtype`."""
        return Product(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def fold(conv: nn.Conv2d, norm: nn.Module) -> Product:
    """A convolution and the norm behind it as one product."""
    scale, shift = Affine.of(norm)
    bias = shift if conv.bias is None else torch.addcmul(shift, scale, conv.bias.double())
    return Product(conv.weight.double() * scale[:, None, None, None], bias)


class Fusion(NamedTuple):
    """Gated fusion as two products: r = relu(squeeze∗s), φ = σ(of_s∗s + of_r∗r + bias)."""

    squeeze: Product
    of_s: torch.Tensor  # (C, C)
    of_r: torch.Tensor  # (C, C//4)
    bias: torch.Tensor

    def to(self, dtype: torch.dtype) -> Fusion:
        """The same, rounded to `dtype`."""
        of_s, of_r, bias = (t.to(dtype) for t in (self.of_s, self.of_r, self.bias))
        return Fusion(self.squeeze.to(dtype), of_s, of_r, bias)


def fold_fusion(block: Any) -> Fusion:
    """Identity 5.3: M is linear behind the ReLU, so Wf_m·D2·W2 becomes one product."""
    squeeze, norm1, _, expand, norm2 = block.multi_scale_fusion
    fusion, norm3, _ = block.final_fusion
    inner, outer = Affine.of(norm2), Affine.of(norm3)
    weight = fusion.weight.double()[:, :, 0, 0] * outer.scale[:, None]
    of_s, of_m = weight.chunk(2, 1)
    of_r = of_m @ (inner.scale[:, None] * expand.weight.double()[:, :, 0, 0])
    bias = torch.addmv(outer.shift, of_m, inner.shift)
    return Fusion(fold(squeeze, norm1), of_s, of_r, bias)
