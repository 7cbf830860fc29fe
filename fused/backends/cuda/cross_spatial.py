"""Cross-spatial learning (spec.md 2.3) on CUDA in evaluation: two launches, pack and forward.

Training is in cross_spatial_training.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..maps import readable
from . import cross_spatial_training
from .launch import floats, geometry, launch, multiprocessors, takes_tf32

# c×c tiles and vectors of c of the packed weights (csrc/cuda/cross_spatial_tiles.cuh).
TILES = 57
VECTORS = 11
# Bands of a slab at most, and the multiprocessors for which the emulator's launches are cut.
MOST_BANDS = 32
_EMULATED_MULTIPROCESSORS = 8


def _width(e: torch.Tensor, groups: int) -> int:
    """Channels of a group as the kernels hold them."""
    channels = e.shape[1] // groups
    if channels > 32:
        return 64
    return 32 if channels > 16 or e.dtype == torch.float32 else 16


def _takes_tf32(e: torch.Tensor, groups: int) -> int:
    return int(e.dtype == torch.float32 and _width(e, groups) == 32 and takes_tf32())


@dataclass(frozen=True)
class Packed:
    """The weights as the kernels read them.

    Attributes:
        weights: fragments of c×c tiles.
        vectors: biases and folded norms, (VECTORS, padded width) float32.
        counters: zeros, one for each slab; the forward leaves them zero.
    """

    weights: torch.Tensor
    vectors: torch.Tensor
    counters: torch.Tensor

    @property
    def reads(self) -> dict[str, torch.Tensor]:
        """What the forward only reads."""
        return {"packed": self.weights, "vectors": self.vectors}


def _network(e: torch.Tensor, groups: int) -> dict[str, int | float]:
    """Which network of csrc/cuda/cross_spatial.cu runs, on how many slabs."""
    return {
        **{"slabs": e.shape[0] * groups, "group_channels": e.shape[1] // groups},
        **{"padded": _width(e, groups), "tf32": _takes_tf32(e, groups)},
    }


@dataclass(frozen=True)
class Packing:
    """The work of packing weights, for a launch of its own or one that does it beside other work.

    Attributes:
        packed: what is written.
        reads: the weights.
        numbers: sizes and flags.
    """

    packed: Packed
    reads: dict[str, torch.Tensor]
    numbers: dict[str, int | float]

    @property
    def writes(self) -> dict[str, torch.Tensor]:
        """What is written, by the entry's names."""
        return {**self.packed.reads, "counters": self.packed.counters}


def packing(
    e: torch.Tensor,
    groups: int,
    parameters: Mapping[str, torch.Tensor | None],
    attention_eps: float,
    reduce_eps: float,
) -> Packing:
    """What it takes to pack the op's parameters, by their names, for maps as `e`."""
    slabs, width = e.shape[0] * groups, _width(e, groups)
    given = {name: t for name, t in parameters.items() if t is not None}
    whole = all(t.dtype == e.dtype for t in given.values())
    # A float32 product in three tf32 terms reads two of every weight.
    terms = 2 if e.dtype == torch.float32 and not _takes_tf32(e, groups) else 1
    return Packing(
        Packed(
            e.new_empty((TILES, terms, width, width)),
            e.new_empty((VECTORS, width), dtype=torch.float32),
            e.new_empty((slabs,), dtype=torch.int32),
        ),
        {name: t.contiguous() if whole else floats(t) for name, t in given.items()},
        {
            **_network(e, groups),
            "counts": slabs,
            "float32_weights": int(not whole or e.dtype == torch.float32),
            **{"attention_eps": float(attention_eps), "reduce_eps": float(reduce_eps)},
        },
    )


def pack(e: torch.Tensor, work: Packing) -> Packed:
    """Pack weights for maps as `e`; one launch."""
    launch(
        *("cross_spatial_pack", e.dtype),
        reads=work.reads,
        writes=work.writes,
        numbers=work.numbers,
    )
    return work.packed


def forward(
    e: torch.Tensor,
    alpha_h: torch.Tensor,
    alpha_w: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gn_weight: torch.Tensor,
    gn_bias: torch.Tensor,
    conv3x3_weight: torch.Tensor,
    conv3x3_bias: torch.Tensor,
    spatial_conv1_weight: torch.Tensor,
    spatial_conv3_weight: torch.Tensor,
    spatial_conv5_weight: torch.Tensor,
    attention_weight: torch.Tensor,
    attention_bn_weight: torch.Tensor,
    attention_bn_bias: torch.Tensor,
    attention_running_mean: torch.Tensor | None,
    attention_running_var: torch.Tensor | None,
    reduce_weight: torch.Tensor,
    reduce_bn_weight: torch.Tensor,
    reduce_bn_bias: torch.Tensor,
    reduce_running_mean: torch.Tensor | None,
    reduce_running_var: torch.Tensor | None,
    channel_feat_weight: torch.Tensor,
    alpha: torch.Tensor,
    groups: int,
    training: bool,
    bn_statistics: str,
    attention_eps: float,
    reduce_eps: float,
) -> tuple[torch.Tensor, ...]:
    """As the reference's forward: w, two softmax vectors, four statistics."""
    if training:
        return cross_spatial_training.forward(
            *(e, alpha_h, alpha_w, mean, rstd, gn_weight, gn_bias, conv3x3_weight, conv3x3_bias),
            *(spatial_conv1_weight, spatial_conv3_weight, spatial_conv5_weight),
            *(attention_weight, attention_bn_weight, attention_bn_bias),
            *(reduce_weight, reduce_bn_weight, reduce_bn_bias, channel_feat_weight, alpha),
            groups,
            bn_statistics,
            attention_eps,
            reduce_eps,
        )
    parameters = {
        **{"gn_weight": gn_weight, "gn_bias": gn_bias},
        **{"conv3x3_weight": conv3x3_weight, "conv3x3_bias": conv3x3_bias},
        "spatial_conv1_weight": spatial_conv1_weight,
        "spatial_conv3_weight": spatial_conv3_weight,
        "spatial_conv5_weight": spatial_conv5_weight,
        "attention_weight": attention_weight,
        "attention_bn_weight": attention_bn_weight,
        "attention_bn_bias": attention_bn_bias,
        "attention_running_mean": attention_running_mean,
        "attention_running_var": attention_running_var,
        **{"reduce_weight": reduce_weight, "reduce_bn_weight": reduce_bn_weight},
        **{"reduce_bn_bias": reduce_bn_bias, "reduce_running_mean": reduce_running_mean},
        "reduce_running_var": reduce_running_var,
        **{"channel_feat_weight": channel_feat_weight, "alpha": alpha},
    }
    e = readable(e)
    packed = pack(e, packing(e, groups, parameters, attention_eps, reduce_eps))
    w, softmax1, softmax2 = learn(e, (alpha_h, alpha_w, mean, rstd), packed, groups)
    wide = softmax1.new_empty((0, 3 * e.shape[1] // groups))
    narrow = softmax1.new_empty((0, e.shape[1] // groups))
    return w, softmax1, softmax2, wide, torch.empty_like(wide), narrow, torch.empty_like(narrow)


def learn(
    e: torch.Tensor, vectors: tuple[torch.Tensor, ...], packed: Packed, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w and two softmax vectors from packed weights and coordinate attention's vectors."""
    batch, channels, height, width = e.shape
    w = e.new_empty((batch, groups, height, width))
    softmax1 = e.new_empty((batch, groups, channels // groups), dtype=torch.float32)
    softmax2 = torch.empty_like(softmax1)
    names = ("alpha_h", "alpha_w", "mean", "rstd")
    slabs, padded = batch * groups, _width(e, groups)
    launch(
        *("cross_spatial", e.dtype),
        reads={
            **{"e": e, **packed.reads},
            **{name: floats(t) for name, t in zip(names, vectors, strict=True)},
        },
        writes={"w": w, "softmax1": softmax1, "softmax2": softmax2},
        updates={"counters": packed.counters},
        scratch={
            "y": e.new_empty((slabs, 2, height * width, padded)),
            "partial": e.new_empty((slabs, MOST_BANDS, 2, padded), dtype=torch.float32),
        },
        numbers={
            **_network(e, groups),
            **{"groups": groups, "height": height, "width": width},
            **geometry("e", e),
            "most_bands": MOST_BANDS,
            "multiprocessors": multiprocessors(e.device) or _EMULATED_MULTIPROCESSORS,
        },
    )
    return w, softmax1, softmax2
