"""cross_spatial with batch statistics on CUDA: five launches, or with saved ones as a first part.

Sheets are maps (rows, H·W, parts, padded channels) in e's dtype, rows (branch, slab).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..maps import readable
from .launch import floats, geometry, launch

TILES = 57  # c×c tiles of packed weights
VECTORS = 3  # γ, β and b3; the norms are not affine maps here
TILE_PIXELS = 8, 16
# Blocks that fill a large GPU a few times over; rows are cut into shares until there are so many.
BLOCKS = 1024


def _moments_size(count: int) -> int:
    return 2 * count + 1


@dataclass
class Stage:
    """One call's input, sizes and scratch.

    Attributes:
        e: the readable map.
        groups: G.
        per_group: statistics by (branch, group), else one set of all.
        numbers: sizes that every launch takes.
    """

    e: torch.Tensor
    groups: int
    per_group: bool
    numbers: dict[str, int | float] = field(init=False)

    def __post_init__(self) -> None:
        batch, channels, height, width = self.e.shape
        self.c, self.slabs, self.pixels = (
            channels // self.groups,
            batch * self.groups,
            height * width,
        )
        self.padded = 32 if self.c <= 32 else 64
        self.tiles = -(-height // TILE_PIXELS[0]) * -(-width // TILE_PIXELS[1])
        self.shares = min(-(-BLOCKS // (2 * self.slabs)), self.tiles)
        self.sets = 2 * self.groups if self.per_group else 1
        self.numbers = {
            **{"slabs": self.slabs, "groups": self.groups, "group_channels": self.c},
            **{"height": height, "width": width, "padded": self.padded},
            **{"shares": self.shares, "per_group": int(self.per_group)},
        }

    def sheet(self, rows: int, parts: int = 1) -> torch.Tensor:
        """Uninitialised sheets."""
        return self.e.new_empty((rows, self.pixels, parts, self.padded))

    def partials(self, *columns: int) -> torch.Tensor:
        """Uninitialised float32 rows, one for every (row, share)."""
        return self.floats(2 * self.slabs * self.shares, *columns)

    def floats(self, *shape: int) -> torch.Tensor:
        """Uninitialised float32 memory."""
        return self.e.new_empty(shape, dtype=torch.float32)

    def launch(
        self,
        entry: str,
        reads: dict[str, torch.Tensor],
        writes: dict[str, torch.Tensor],
        updates: dict[str, torch.Tensor] | None = None,
        numbers: Mapping[str, int | float] | None = None,
    ) -> None:
        """Launch an entry with the stage's sizes."""
        launch(
            *(f"cross_spatial_{entry}", self.e.dtype),
            reads=reads,
            writes=writes,
            updates=updates,
            numbers={**self.numbers, **(numbers or {})},
        )


def pack(
    stage: Stage, parameters: dict[str, torch.Tensor], backward: bool = False
) -> dict[str, torch.Tensor]:
    """Packed weights (and after them, for the backward, their transposes), vectors, counters."""
    tiles = TILES * (2 if backward else 1)
    # float32 operands are two terms.
    values = stage.padded**2 * (2 if stage.e.dtype == torch.float32 else 1)
    counts = 2 * stage.sets
    packed = {
        "packed": stage.e.new_empty((tiles, values)),
        "vectors": stage.floats(VECTORS, stage.padded),
        "counters": stage.e.new_empty((counts,), dtype=torch.int32),
    }
    reads = {name: floats(weight) for name, weight in parameters.items()}
    numbers = {"counts": counts, "backward": int(backward)}
    stage.launch("training_pack", reads, packed, numbers=numbers)
    return packed


def weights(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of `pack` kernels only read."""
    return {name: packed[name] for name in ("packed", "vectors")}


def branches(
    stage: Stage,
    packed: dict[str, torch.Tensor],
    vectors: dict[str, torch.Tensor],
    copies_e: bool = False,
) -> torch.Tensor:
    """Sheets of x1 and x2 (and a copy of e)."""
    sheets = stage.sheet((3 if copies_e else 2) * stage.slabs)
    stage.launch(
        "branches",
        {"e": stage.e, **{name: floats(v) for name, v in vectors.items()}, **weights(packed)},
        {"sheets": sheets},
        numbers={"copies_e": int(copies_e), **geometry("e", stage.e)},
    )
    return sheets


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
    reduce_weight: torch.Tensor,
    reduce_bn_weight: torch.Tensor,
    reduce_bn_bias: torch.Tensor,
    channel_feat_weight: torch.Tensor,
    alpha: torch.Tensor,
    groups: int,
    bn_statistics: str,
    attention_eps: float,
    reduce_eps: float,
) -> tuple[torch.Tensor, ...]:
    """As the reference's in training: w, softmax vectors, means and biased variances."""
    stage = Stage(readable(e), groups, bn_statistics == "sequential")
    packed = pack(
        stage,
        {
            **{"gn_weight": gn_weight, "gn_bias": gn_bias},
            **{"conv3x3_weight": conv3x3_weight, "conv3x3_bias": conv3x3_bias},
            "spatial_conv1_weight": spatial_conv1_weight,
            "spatial_conv3_weight": spatial_conv3_weight,
            "spatial_conv5_weight": spatial_conv5_weight,
            **{"attention_weight": attention_weight, "reduce_weight": reduce_weight},
            **{"channel_feat_weight": channel_feat_weight, "alpha": alpha},
        },
    )
    vectors = {"alpha_h": alpha_h, "alpha_w": alpha_w, "mean": mean, "rstd": rstd}
    sheets = branches(stage, packed, vectors)
    features, sums = stage.sheet(2 * stage.slabs, 3), stage.partials(stage.padded)
    moments = stage.partials(_moments_size(3 * stage.padded))
    attention = {f"attention_{name}": stage.floats(stage.sets, 3 * stage.c) for name in _STATISTICS}
    counters = {"counters": packed["counters"]}
    stage.launch(
        "features",
        {"sheets": sheets, **weights(packed)},
        {"features": features, "sums": sums, "moments": moments, **attention},
        counters,
    )

    reduced = stage.sheet(2 * stage.slabs)
    reduced_moments = stage.partials(_moments_size(stage.padded))
    reduce = {f"reduce_{name}": stage.floats(stage.sets, stage.c) for name in _STATISTICS}
    norm = {
        "attention_weight": floats(attention_bn_weight),
        "attention_bias": floats(attention_bn_bias),
    }
    stage.launch(
        "reduce",
        {"features": features, **weights(packed), **attention, **norm},
        {"reduced": reduced, "reduced_moments": reduced_moments, **reduce},
        counters,
        {"attention_eps": float(attention_eps)},
    )

    batch, _, height, width = e.shape
    results = {
        "w": e.new_empty((batch, groups, height, width)),
        **{name: stage.floats(batch, groups, stage.c) for name in ("softmax1", "softmax2")},
    }
    reads = {
        **{"sheets": sheets, "sums": sums, "reduced": reduced, "reduced_moments": reduced_moments},
        **{"reduce_weight": floats(reduce_bn_weight), "reduce_bias": floats(reduce_bn_bias)},
        **{"channel_feat": floats(channel_feat_weight), "alpha": floats(alpha), **reduce},
    }
    stage.launch("gate", reads, results, numbers={"reduce_eps": float(reduce_eps)})
    return (*results.values(), *attention.values(), *reduce.values())


_STATISTICS = ("mean", "var")
