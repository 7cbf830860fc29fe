"""Cache-sized pieces of a grouped map: on a CPU one giant batch of all groups falls out of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

# One core's second-level cache holds the input and the 3c-channel results of a block this size.
BLOCK_BYTES = 1024 * 1024


_ALL = slice(None)  # not slice(0, batch): that would bind a traced graph to one batch size


class Block(NamedTuple):
    """Samples and groups that are worked on together."""

    samples: slice
    groups: slice


def blocks(
    x: torch.Tensor, groups: int, *, whole_batch: bool, whole: bool = False
) -> Iterator[Block]:
    """Split a map (B, C, H, W) into blocks of samples and groups.

    Args:
        x: the map; on a GPU and while torch traces a graph there is one block.
        groups: G.
        whole_batch: keep all samples of a group together, as batch statistics need it.
        whole: one block, whatever the size.
    """
    batch = x.shape[0]
    if whole or x.device.type != "cpu" or torch.compiler.is_compiling():
        yield Block(_ALL, slice(0, groups))
        return
    one_group = x[0].numel() * x.element_size() // groups
    if whole_batch or batch * x[0].numel() * x.element_size() <= BLOCK_BYTES:
        step = max(1, min(groups, BLOCK_BYTES // max(one_group * batch, 1)))
        for start in range(0, groups, step):
            yield Block(_ALL, slice(start, min(start + step, groups)))
        return
    step = max(1, min(groups, BLOCK_BYTES // max(one_group, 1)))
    for sample in range(batch):
        for start in range(0, groups, step):
            yield Block(slice(sample, sample + 1), slice(start, min(start + step, groups)))


def grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    """View or copy of (B, C, ...) as (B, G, C/G, ...)."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])


def assemble(parts: list[tuple[Block, torch.Tensor]]) -> torch.Tensor:
    """Join what `blocks` split: tensors (samples, groups or channels, ...), in order of blocks."""
    rows: dict[int | None, list[torch.Tensor]] = {}
    for block, part in parts:
        rows.setdefault(block.samples.start, []).append(part)
    joined = [row[0] if len(row) == 1 else torch.cat(row, 1) for row in rows.values()]
    return joined[0] if len(joined) == 1 else torch.cat(joined)
