"""Channel interaction (spec.md 2.1): e = a ⊙ x + (1 − a) ⊙ (Wci ∗ x)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...contract import memory_format, product_dtype, statistics_dtype
from .products import convolve, convolve_input_backward

Statistics = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def channel_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, maximum and the maximum's first position h·W + w of each channel, (B, C) each."""
    dtype = statistics_dtype(x.dtype)
    mean = x.mean((2, 3), dtype=dtype)
    maximum, argmax = x.flatten(2).max(2)
    return mean, maximum.to(dtype), argmax


def channel_statistics_backward(
    grad_mean: torch.Tensor, grad_maximum: torch.Tensor, argmax: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Gradient for x: the mean's everywhere, the maximum's at its position."""
    batch, channels, height, width = x.shape
    grad = (grad_mean / (height * width))[:, :, None].repeat(1, 1, height * width)
    at = argmax[:, :, None]  # one a channel: scattered sums would be added in any order on a GPU
    grad.scatter_(2, at, grad.gather(2, at) + grad_maximum[:, :, None])
    grad = grad.reshape(batch, channels, height, width).to(x.dtype)
    return grad.contiguous(memory_format=memory_format(x))


def forward(
    x: torch.Tensor,
    squeeze_weight: torch.Tensor,
    excite_weight: torch.Tensor,
    interaction_weight: torch.Tensor,
    x_mean: torch.Tensor | None = None,
    x_maximum: torch.Tensor | None = None,
    x_argmax: torch.Tensor | None = None,
    *,
    statistics: Statistics = channel_statistics,
) -> tuple[torch.Tensor, ...]:
    """Return e (B, C, H, W), the gate a (B, C), and x's mean, maximum and argmax (B, C).

    The first pass over x, for its statistics, is left out where they are given; `statistics` may be
    another backend's kernel for it.
    """
    dtype = statistics_dtype(x.dtype)
    if x_mean is None or x_maximum is None or x_argmax is None:
        mean, maximum, argmax = statistics(x)
    else:  # an op's outputs may not be its inputs
        mean, maximum, argmax = x_mean.clone(), x_maximum.clone(), x_argmax.clone()
    squeeze, excite = squeeze_weight.to(dtype), excite_weight.to(dtype)
    hidden = (mean @ squeeze.T).relu() + (maximum @ squeeze.T).relu()
    gate = (hidden @ excite.T).sigmoid()
    product = convolve(x, interaction_weight).to(dtype)
    share = gate[:, :, None, None]  # not lerp: where the product is infinite, it gives NaN
    e = torch.addcmul(share * x.to(dtype), 1 - share, product).to(x.dtype)
    return e.contiguous(memory_format=memory_format(x)), gate, mean, maximum, argmax


class SmallGradients(NamedTuple):
    """The gradients that are no maps."""

    mean: torch.Tensor
    maximum: torch.Tensor
    squeeze_weight: torch.Tensor
    excite_weight: torch.Tensor
    interaction_weight: torch.Tensor


def small_backward(
    outer: torch.Tensor,
    gate: torch.Tensor,
    mean: torch.Tensor,
    maximum: torch.Tensor,
    squeeze: torch.Tensor,
    excite: torch.Tensor,
    interaction_weight: torch.Tensor,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul,
) -> SmallGradients:
    """Gradients of x's statistics and of the weights from grad·xᵀ (B, C, C) of each sample.

    `product` multiplies matrices; a backend may have its own.
    """
    complement = 1 - gate
    grad_gate = outer.diagonal(dim1=1, dim2=2) - (outer * interaction_weight[:, :, 0, 0]).sum(2)
    grad_interaction = torch.einsum("bo,boi->oi", complement, outer)[:, :, None, None]
    hidden_mean, hidden_max = (product(v, squeeze.T).relu() for v in (mean, maximum))
    grad_logits = grad_gate * gate * complement
    grad_excite = product(grad_logits.T, hidden_mean + hidden_max)
    grad_hidden = product(grad_logits, excite)
    grad_hidden_mean = grad_hidden * (hidden_mean > 0)
    grad_hidden_max = grad_hidden * (hidden_max > 0)
    grad_squeeze = product(grad_hidden_mean.T, mean) + product(grad_hidden_max.T, maximum)
    of_statistics = (product(grad_hidden_mean, squeeze), product(grad_hidden_max, squeeze))
    return SmallGradients(*of_statistics, grad_squeeze, grad_excite, grad_interaction)


def backward(
    grad_e: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    mean: torch.Tensor,
    maximum: torch.Tensor,
    argmax: torch.Tensor,
    squeeze_weight: torch.Tensor,
    excite_weight: torch.Tensor,
    interaction_weight: torch.Tensor,
    *,
    statistics_backward: Callable[..., torch.Tensor] = channel_statistics_backward,
) -> tuple[torch.Tensor, ...]:
    """Gradients for x and the three weights.

    Wci ∗ x is not recomputed: Σ_pixels grad·(Wci x) is a row sum of Wci ⊙ (grad·xᵀ), a product
    that Wci's own gradient needs.
    """
    dtype = statistics_dtype(x.dtype)
    complement = 1 - gate
    product = product_dtype(x)
    outer = torch.bmm(grad_e.to(product).flatten(2), x.to(product).flatten(2).transpose(1, 2)).to(
        dtype
    )
    parameters = (squeeze_weight.to(dtype), excite_weight.to(dtype), interaction_weight.to(dtype))
    small = small_backward(outer, gate, mean, maximum, *parameters)

    grad_x = convolve_input_backward(
        (grad_e * complement[:, :, None, None]).to(product), interaction_weight
    ).to(dtype)
    grad_x = torch.addcmul(grad_x, grad_e.to(dtype), gate[:, :, None, None])
    grad_x = grad_x + statistics_backward(small.mean, small.maximum, argmax, x)
    return (
        grad_x.to(x.dtype).contiguous(memory_format=memory_format(x)),
        small.squeeze_weight.to(squeeze_weight.dtype),
        small.excite_weight.to(excite_weight.dtype),
        small.interaction_weight.to(interaction_weight.dtype),
    )
