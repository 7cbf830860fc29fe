"""Host side of gated_fusion: the sizes, tiles and scratch of one call, for all of its launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...contract import memory_format
from . import configs, launch

# Programs of an elementwise kernel: enough for the largest GPU, few enough that each may begin by
# merging all parts of its channels.
TARGET_PROGRAMS = 512


class Tiling(NamedTuple):
    """How a product's programs cover its result.

    Attributes:
        config: blocks, warps, stages.
        tiles: pixel tiles of one sample.
        parts: pixel tiles of all samples.
        column_tiles: channel tiles.
    """

    config: configs.Config
    tiles: int
    parts: int
    column_tiles: int

    @property
    def grid(self) -> launch.Grid:
        """One program a part and channel tile."""
        return (self.parts * self.column_tiles,)

    @property
    def block_p(self) -> int:
        """Pixels of a tile."""
        return self.config.blocks["BLOCK_P"]


class Spans(NamedTuple):
    """How the programs of an elementwise kernel cover a map: channel blocks × runs of parts.

    Attributes:
        config: blocks, warps, stages.
        tiles: pixel tiles of one sample.
        parts: pixel tiles of all samples.
        run: parts that one program walks through.
        runs: programs along the parts.
        blocks: channel blocks.
    """

    config: configs.Config
    tiles: int
    parts: int
    run: int
    runs: int
    blocks: int

    @property
    def grid(self) -> launch.Grid:
        """One program a run and channel block."""
        return (self.runs * self.blocks,)


class Packed(NamedTuple):
    """Weights in the map's dtype, so that products load tiles of them as they multiply them.

    Attributes:
        numbers: all of them in one row, which some launch before the products fills; or None.
        sources: the parameters, contiguous.
        weights: what the products read: views of `numbers`, or the parameters.
        sizes: how many numbers each has, 0 where nothing is packed.
    """

    numbers: torch.Tensor | None
    sources: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]
    sizes: tuple[int, ...]

    def programs(self, config: configs.Config) -> int:
        """Programs that fill `numbers`, of BLOCK_N each."""
        return launch.cdiv(sum(self.sizes), config.blocks["BLOCK_N"])


class Norm(NamedTuple):
    """One batch norm; the forward in training writes mean and var, everything else reads them."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    eps: float


class Case:
    """The maps of one call and the sizes that its launches need.

    Attributes:
        e: the map (B, C, H, W), its pixels one axis.
        w: the gates (B, G, H, W), likewise.
        squeezed: C // 4.
        size: C / G.
        pixels: H·W.
        total: B·H·W.
        wide: whether offsets need 64 bits.
        precision: of products.
    """

    def __init__(self, e: torch.Tensor, w: torch.Tensor, *others: torch.Tensor) -> None:
        """From the op's maps; `others` also count for `wide`."""
        self.e, self.w = launch.flat(e), launch.flat(w)
        self.batch, self.channels, height, width = e.shape
        self.squeezed, self.size = self.channels // 4, self.channels // w.shape[1]
        self.pixels = height * width
        self.total = self.batch * self.pixels
        self.shape = (height, width)
        self.memory_format = memory_format(e)
        self.wide = launch.is_wide(self.e, self.w, *others)
        self.precision = launch.dot_precision(e)

    @property
    def strides(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Strides of e and of w."""
        return launch.strides(self.e), launch.strides(self.w)

    def new_map(self, channels: int) -> torch.Tensor:
        """An empty map (B, channels, H, W) in e's dtype and memory format."""
        shape = (self.batch, channels, *self.shape)
        e = self.e
        return torch.empty(shape, dtype=e.dtype, device=e.device, memory_format=self.memory_format)

    def new_floats(self, *shape: int) -> torch.Tensor:
        """Empty float32 scratch."""
        return torch.empty(shape, dtype=torch.float32, device=self.e.device)

    def norm(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor | None,
        var: torch.Tensor | None,
        eps: float,
    ) -> Norm:
        """A norm of given statistics, or with room for those of the batch."""
        mean = self.new_floats(*weight.shape) if mean is None else mean
        var = self.new_floats(*weight.shape) if var is None else var
        return Norm(weight, bias, mean, var, eps)

    def packed(self, *weights: torch.Tensor) -> Packed:
        """Room for the weights in e's dtype; nothing is packed where they have it already."""
        if all(weight.dtype == self.e.dtype for weight in weights):
            return Packed(None, weights, weights, tuple(0 for _ in weights))
        sources = tuple(weight.contiguous() for weight in weights)
        sizes = tuple(weight.numel() for weight in weights)
        numbers = self.e.new_empty(sum(sizes))
        targets = (n.view(w.shape) for n, w in zip(numbers.split(sizes), weights, strict=True))
        return Packed(numbers, sources, tuple(targets), sizes)

    def tiling(self, kernel: Any, columns: int) -> Tiling:
        """Tiles of a product with `columns` output channels, chosen by the size of the result.

        `pixels` of its configurations are those of a result with 1024 channels.
        """
        config = configs.choose(kernel.__name__, self.e, self.total * columns // 1024)
        tiles = launch.cdiv(self.pixels, config.blocks["BLOCK_P"])
        column_tiles = launch.cdiv(columns, config.blocks["BLOCK_O"])
        return Tiling(config, tiles, self.batch * tiles, column_tiles)

    def spans(self, kernel: Any) -> Spans:
        """Runs of an elementwise kernel over all C channels."""
        config = configs.choose(kernel.__name__, self.e, self.total)
        tiles = launch.cdiv(self.pixels, config.blocks["BLOCK_P"])
        blocks = launch.cdiv(self.channels, config.blocks["BLOCK_C"])
        parts = self.batch * tiles
        run = launch.cdiv(parts, launch.cdiv(TARGET_PROGRAMS, blocks))
        return Spans(config, tiles, parts, run, launch.cdiv(parts, run), blocks)

    def one_group(self, tiling: Tiling) -> bool:
        """Whether BLOCK_K successive channels of s lie in one group."""
        return self.size % tiling.config.blocks["BLOCK_K"] == 0


def matrix_strides(weight: torch.Tensor) -> tuple[int, int]:
    """Strides of a 1×1 convolution's weight (O, I, 1, 1) as weight[i, o]."""
    return weight.stride(1), weight.stride(0)
