"""Channel statistics of MSFF's output from those of its tiles: a pass over the map less.

    mean = Σ_t share_t     maximum = max_t maximum_t     argmax = the first tile's that holds it

`msff_forward_kernel` leaves a part for each tile of `BLOCK_N` pixels of a sample, parts in order:
extremes (parts, {Σ out / HW, maximum}, C_out) float32, positions (parts, C_out) int32. One program
of the kernel here joins `BLOCK_C` channels of one sample, `BLOCK_TILES` tiles at a time. A NaN is
the maximum, the first one wins, as in `channel_statistics.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .channel_statistics import mean_and_first_maximum
from .launch import cdiv, launch


@triton.jit
def msff_statistics_kernel(
    extremes, positions, mean, maximum, argmax, rows, tiles,
    BLOCK_C: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Channel statistics of `BLOCK_C` channels of a sample from its tiles' parts."""
    row_tiles = tl.cdiv(rows, BLOCK_C)
    batch = (tl.program_id(0) // row_tiles).to(tl.int64)
    row = tl.program_id(0) % row_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = row < rows
    average = tl.zeros((BLOCK_C,), tl.float32)
    best = tl.full((BLOCK_C,), -float("inf"), tl.float32)
    position = tl.zeros((BLOCK_C,), tl.int32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        mask = inside[:, None] & (tile < tiles)[None, :]
        part = (batch * tiles + tile)[None, :]
        own = extremes + part * 2 * rows + row[:, None]
        share = tl.load(own, mask=mask, other=0.0)
        value = tl.load(own + rows, mask=mask, other=-float("inf"))
        first = tl.load(positions + part * rows + row[:, None], mask=mask, other=0x7FFFFFFF)
        # Positions grow from tile to tile, so the smallest one that holds the maximum is the first.
        total, largest, there = mean_and_first_maximum(share, value, first, 1)
        average += total
        better = (largest > best) | ((largest != largest) & (best == best))
        best = tl.where(better, largest, best)
        position = tl.where(better, there, position)
    at = batch * rows + row
    tl.store(mean + at, average, mask=inside)
    tl.store(maximum + at, best, mask=inside)
    tl.store(argmax + at, position.to(tl.int64), mask=inside)


def empty_parts(parts: int, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for extremes and positions of `parts` tiles."""
    extremes = torch.empty((parts, 2, rows), dtype=torch.float32, device=device)
    return extremes, torch.empty((parts, rows), dtype=torch.int32, device=device)


def join_parts(
    extremes: torch.Tensor, positions: torch.Tensor, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, maximum (B, C_out) float32 and argmax (B, C_out) int64 from the parts of all tiles."""
    parts, rows = positions.shape
    mean, maximum = extremes.new_empty((batch, rows)), extremes.new_empty((batch, rows))
    argmax = extremes.new_empty((batch, rows), dtype=torch.int64)
    config = configs.choose("msff_statistics_kernel", extremes, parts)
    launch(
        msff_statistics_kernel,
        (batch * cdiv(rows, config.blocks["BLOCK_C"]),),
        *(extremes, positions, mean, maximum, argmax, rows, parts // batch),
        config=config,
        scratch=("extremes", "positions"),
    )
    return mean, maximum, argmax
