"""Host side of gated_fusion: the sizes, layouts and scratch of one call, for all its launches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch

from ...contract import memory_format
from ..maps import flat, strides
from .launch import floats, launch, takes_tf32

TILE = 128  # pixels and channels of a product's tile, csrc/cuda/product_loop.cuh: WideTile
# Blocks of an elementwise kernel: enough for the largest GPU, few enough that each may begin by
# merging what the blocks of the launch before left.
_TARGET_BLOCKS = 512


class Finish(IntEnum):
    """What becomes of a product's results, as in csrc/cuda/gated_fusion.cuh."""

    PLAIN = 0
    RELU = 1
    GATE = 2
    MASK = 3


@dataclass(frozen=True)
class Norm:
    """One batch norm, its vectors contiguous float32."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    eps: float

    def vectors(self, which: str = "") -> dict[str, torch.Tensor]:
        """By the entries' names for them."""
        return {
            f"weight{which}": self.weight,
            f"bias{which}": self.bias,
            f"mean{which}": self.mean,
            f"var{which}": self.var,
        }


@dataclass(frozen=True)
class Weights:
    """The weights of the three convolutions as matrices, all of one dtype."""

    squeeze: torch.Tensor
    expand: torch.Tensor
    fusion: torch.Tensor

    @staticmethod
    def of(like: torch.Tensor, *weights: torch.Tensor) -> Weights:
        """In the map's dtype or, unless all are of that, in float32."""
        same = all(weight.dtype == like.dtype for weight in weights)
        dtype = like.dtype if same else torch.float32
        return Weights(*(w.to(dtype).flatten(1).contiguous() for w in weights))

    @property
    def is_float(self) -> int:
        """1 for float32."""
        return int(self.squeeze.dtype == torch.float32)


def _runs(x: torch.Tensor, channels_last: bool) -> bool:
    """Whether a `flat` map has the neighbours that kernels of this layout expect."""
    _, channel, pixel = strides(x)
    if channels_last:
        return channel == 1 or x.shape[1] == 1
    return pixel == 1 or x.shape[2] * x.shape[3] == 1


class Case:
    """The maps of one call and the sizes that its launches need.

    Attributes:
        e: the map (B, C, H, W), its pixels one axis.
        w: the gates (B, G, H, W) in e's dtype, likewise.
        squeezed: C // 4.
        groups: G.
        group_channels: C / G.
        pixels: H·W.
        total: B·H·W.
        channels_last: the layout of all maps.
    """

    def __init__(self, e: torch.Tensor, w: torch.Tensor) -> None:
        """From the op's maps."""
        self.memory_format = memory_format(e)
        self.channels_last = self.memory_format == torch.channels_last
        self.dtype = e.dtype
        self.batch, self.channels, height, width = e.shape
        self.e, self.w = self.laid(e), self.laid(w)
        self.squeezed, self.groups = self.channels // 4, w.shape[1]
        self.group_channels = self.channels // self.groups
        self.shape = (height, width)
        self.pixels = height * width
        self.total = self.batch * self.pixels
        self.tiles = -(-self.pixels // TILE)

    def laid(self, x: torch.Tensor) -> torch.Tensor:
        """A map in e's dtype and layout: x itself, or a copy of it."""
        x = flat(x.to(self.dtype))
        if _runs(x, self.channels_last):
            return x
        return x.contiguous(memory_format=self.memory_format)

    def new_map(self, channels: int) -> torch.Tensor:
        """An empty map (B, channels, H, W) in e's dtype and memory format."""
        shape = (self.batch, channels, *self.shape)
        e = self.e
        return torch.empty(shape, dtype=e.dtype, device=e.device, memory_format=self.memory_format)

    def new_matrix(self, channels: int) -> torch.Tensor:
        """An empty map of which `matrix` is a view: the library multiplies it as it lies."""
        if self.channels_last:
            return self.new_map(channels)
        shape = (channels, self.batch, *self.shape)
        return torch.empty(shape, dtype=self.dtype, device=self.e.device).transpose(0, 1)

    def matrix(self, x: torch.Tensor) -> torch.Tensor:
        """A map from `new_matrix`, or channels of one, as a matrix (C, B·H·W)."""
        if self.channels_last:
            return x.permute(0, 2, 3, 1).flatten(0, 2).T
        return x.transpose(0, 1).flatten(1)

    def new_floats(self, *shape: int) -> torch.Tensor:
        """Empty float32 vectors or scratch."""
        return torch.empty(shape, dtype=torch.float32, device=self.e.device)

    @property
    def counts(self) -> int:
        """Channel tiles of a product with C channels, of the smallest size."""
        return -(-self.channels // 64)

    def new_counters(self) -> torch.Tensor:
        """Room for a counter of each channel tile."""
        return torch.empty(self.counts, dtype=torch.int32, device=self.e.device)

    def new_moments(self, channels: int) -> torch.Tensor:
        """Room for the moments of the tiles of a product's result."""
        return self.new_floats(self.batch * self.tiles, 2, channels)

    def norm(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor | None,
        var: torch.Tensor | None,
        eps: float,
    ) -> Norm:
        """A norm of given statistics, or with room for those of the batch."""
        mean = self.new_floats(*weight.shape) if mean is None else floats(mean)
        var = self.new_floats(*weight.shape) if var is None else floats(var)
        return Norm(floats(weight), floats(bias), mean, var, eps)

    def runs(self, channels: int) -> int:
        """Blocks along the pixels of an elementwise kernel over a map of so many channels."""
        width = 8 * 16 // self.dtype.itemsize if self.channels_last else 8
        most = self.batch * -(-self.pixels // TILE)
        return min(most, -(-_TARGET_BLOCKS // -(-channels // width)))

    @property
    def sizes(self) -> dict[str, int]:
        """What every entry may ask for."""
        return {
            "batch": self.batch,
            "channels": self.channels,
            "squeezed": self.squeezed,
            "groups": self.groups,
            "group_channels": self.group_channels,
            "pixels": self.pixels,
            "channels_last": int(self.channels_last),
            "tf32": takes_tf32(),
        }

    def launch(
        self,
        entry: str,
        *,
        reads: Mapping[str, torch.Tensor | None],
        writes: Mapping[str, torch.Tensor | None] | None = None,
        updates: Mapping[str, torch.Tensor | None] | None = None,
        scratch: Mapping[str, torch.Tensor | None] | None = None,
        **numbers: int | float,
    ) -> None:
        """Start `gated_fusion_<entry>` with the sizes and all maps' strides beside `numbers`."""
        every = {**reads, **(writes or {}), **(scratch or {})}
        steps = {
            f"{name}_stride_{axis}": step
            for name, x in every.items()
            if x is not None and x.dim() == 4
            for axis, step in zip("bcs", strides(x), strict=True)
        }
        launch(
            *(f"gated_fusion_{entry}", self.dtype),
            reads=reads,
            writes=writes or {},
            updates=updates,
            scratch=scratch,
            numbers={**self.sizes, **steps, **numbers},
        )

    def multiply(
        self,
        entry: str,
        rows: int,
        operands: list[tuple[torch.Tensor, torch.Tensor]],
        *,
        finish: Finish,
        scaled: bool,
        reads: Mapping[str, torch.Tensor | None],
        writes: Mapping[str, torch.Tensor | None] | None = None,
        updates: Mapping[str, torch.Tensor | None] | None = None,
        scratch: Mapping[str, torch.Tensor | None] | None = None,
        **numbers: int | float,
    ) -> None:
        """A product of one or two (map, matrix) with `rows` channels; the first ⊙ w if `scaled`.

        Maps and matrices may be this op's scratch.
        """
        maps = {f"x{n}": x for n, (x, _) in enumerate(operands)}
        matrices = {f"weight_of_x{n}": weight for n, (_, weight) in enumerate(operands)}
        self.launch(
            entry,
            reads={**maps, **matrices, **reads},
            writes=writes,
            updates=updates,
            scratch=scratch,
            rows=rows,
            finish=int(finish),
            scaled=int(scaled),
            weight_is_float=int(operands[0][1].dtype == torch.float32),
            **{f"channels{n}": x.shape[1] for n, (x, _) in enumerate(operands)},
            **{f"weight_of_x{n}_stride": w.stride(0) for n, (_, w) in enumerate(operands)},
            **numbers,
        )
