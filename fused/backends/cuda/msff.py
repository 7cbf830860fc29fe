"""Multi-scale feature fusion (spec.md 1, by identity 5.1) on CUDA.

Launches for n maps: n − 1 products at the other maps' own sizes, and one that multiplies the map of
the target size, adds them resized, normalises and rectifies (csrc/cuda/msff.cuh). In training that
one is preceded by itself for the moments of z and by their join. The channel statistics of out, if
asked for, are left in parts by its tiles and joined by another. The backward multiplies for z
with the kernel again, and with what rounding took from W: where rounding turns the sign of z, the
gradient of the ReLU is lost or made up. The other products there are the library's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import memory_format
from ..maps import is_channels_last, readable
from ..reference import msff as reference
from . import channel_statistics, product
from .launch import floats, geometry, launch

# Products that a launch resizes, kMostProducts of csrc/cuda/msff.cuh; with more the reference runs.
MOST_PRODUCTS = 6


@dataclass(frozen=True)
class _Sum:
    """z = W ∗ x + Σ resize(products): what a launch reads.

    Attributes:
        like: out, of which all maps have the layout.
        size: H and W of the results.
        x: the map of that size, or None.
        weight: its columns of W.
        products: (B, C_out, h, w) float32 of the other maps.
    """

    like: torch.Tensor
    size: torch.Size
    x: torch.Tensor | None
    weight: torch.Tensor
    products: Sequence[torch.Tensor] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Samples, channels and pixels of the results."""
        return self.like.shape[0], self.weight.shape[0], self.size.numel()

    def launch(
        self,
        tile: int,
        eps: float,
        made: Mapping[str, torch.Tensor],
        vectors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Make what `made` has room for: "product", "partials", or "out" from `vectors`."""
        reads: dict[str, torch.Tensor | None] = {"x": self.x, "weight": self.weight}
        integers = {
            **product.numbers(self.like, self.weight, self.shape, tile),
            "weight_stride": self.weight.stride(0),
            "channels": 0 if self.x is None else self.x.shape[1],
            "products": len(self.products),
            **{"height": self.size[0], "width": self.size[1]},
        }
        if self.x is not None:
            integers |= geometry("x", self.x)
        for index, one in enumerate(self.products):
            reads[f"product{index}"] = one
            integers |= geometry(f"product{index}", one)
            integers |= {f"height{index}": one.shape[2], f"width{index}": one.shape[3]}
        for name, map_ in made.items():
            if map_.dim() == 4:
                integers |= geometry(name, map_)
        launch(
            *("msff", self.like.dtype),
            reads=reads | dict(vectors or {}),
            writes=made,
            numbers={**integers, "eps": eps},
        )


def _native_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """W ∗ x (B, C_out, h, w) in float32, in the layout of out."""
    last = is_channels_last(out)
    made = torch.empty(
        (x.shape[0], weight.shape[0], *x.shape[2:]),
        dtype=torch.float32,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    one = _Sum(out, x.shape[2:], x, weight)
    one.launch(product.choose_tile(x, *one.shape), 0.0, {"product": made})
    return made


def _prepare(features: Sequence[torch.Tensor], weight: torch.Tensor, out: torch.Tensor) -> _Sum:
    """Launch the products at the maps' own sizes."""
    matrix = product.rows_of(weight)
    weights = matrix.split([f.shape[1] for f in features], 1)
    maps = [product.in_layout_of(f, out) for f in features]
    sizes = [f.shape[2:] for f in maps]
    native = sizes.index(out.shape[2:]) if out.shape[2:] in sizes else None
    products = [
        _native_product(x, part, out)
        for index, (x, part) in enumerate(zip(maps, weights, strict=True))
        if index != native
    ]
    if native is None:
        return _Sum(out, out.shape[2:], None, matrix, products)
    return _Sum(out, out.shape[2:], maps[native], weights[native], products)


def _batch_statistics(z: _Sum, tile: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of z, (C_out,) float32."""
    batch, rows, pixels = z.shape
    parts = product.parts(tile, batch, pixels)
    partials = torch.empty((parts, 2, rows), dtype=torch.float32, device=z.like.device)
    z.launch(tile, eps, {"partials": partials})
    return product.join_moments(partials, pixels, tile)


def forward(
    features: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bn_weight: torch.Tensor,
    bn_bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    eps: float,
    statistics: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Return relu(BN(W ∗ cat)) (B, C_out, H, W), and statistics of the batch and of the channels.

    Of the batch: mean and biased variance, (C_out,) in training and (0,) in evaluation. Of out's
    channels, if asked for: mean, maximum, its first position, (B, C_out) each, else (0,).
    """
    if len(features) > MOST_PRODUCTS:
        return reference.forward(
            *(features, weight, bn_weight, bn_bias, running_mean, running_var, training, eps),
            *(statistics,),
            statistics_of=channel_statistics.forward,
        )
    like = features[0]
    size = reference.target_size(features)
    out = torch.empty(
        (like.shape[0], weight.shape[0], *size),
        dtype=like.dtype,
        device=like.device,
        memory_format=memory_format(like),
    )
    z = _prepare(features, weight, out)
    tile = product.choose_tile(like, *z.shape)
    of_batch = reference.nothing(like.new_empty(0, dtype=torch.float32), 2)
    if training:
        of_batch = _batch_statistics(z, tile, eps)
        mean, var = of_batch
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = floats(running_mean), floats(running_var)
    vectors = {"gamma": floats(bn_weight), "beta": floats(bn_bias), "mean": mean, "var": var}
    if statistics:
        batch, rows, pixels = z.shape
        tiles = product.room_for_extremes(tile, out, rows, pixels)
        z.launch(tile, eps, {"out": out, **tiles}, vectors)
        return out, *of_batch, *product.join_extremes(tiles, batch, pixels)
    z.launch(tile, eps, {"out": out}, vectors)
    return out, *of_batch, *reference.unknown_statistics(like.new_empty(0, dtype=torch.float32))


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """W ∗ x (B, C_out, h, w) in float32; of a wider weight (C_out, C_in, 1, 1) nothing is lost."""
    x = readable(x)
    matrix = product.rows_of(weight)
    rounded = matrix.to(x.dtype)
    z = _native_product(x, rounded, x)
    if matrix.dtype != x.dtype:
        z += _native_product(x, (matrix - rounded).to(x.dtype), x)
    return z


def backward(
    grad_out: torch.Tensor,
    features: Sequence[torch.Tensor],
    batch_mean: torch.Tensor,
    batch_var: torch.Tensor,
    weight: torch.Tensor,
    *rest: Any,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference's, with z as exact as its sign needs, and then with statistics of this z."""
    training: bool = rest[4]
    return reference.backward(
        *(grad_out, features, batch_mean, batch_var, weight, *rest),
        multiply=_product,
        statistics_anew=training and weight.dtype != features[0].dtype,
    )
