"""The second stage of sums over programs: rows of partial results, added in a fixed order.

One launch serves all parameters of a stage. Partial results are float32 matrices (rows, columns);
every output is the sum over the rows of a range of columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import configs
from .launch import cdiv, launch


@triton.jit
def sum_partials_kernel(
    partials, outs, rows, columns, firsts, COUNT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Grid (blocks of the largest output, outputs); every argument is a tuple, one an output.

    The last of `firsts` is followed by the outputs' sizes.
    """
    block = tl.program_id(0)
    for k in tl.static_range(COUNT):
        if tl.program_id(1) == k:
            at = block * BLOCK_N + tl.arange(0, BLOCK_N)
            ok = at < firsts[COUNT + k]
            source = partials[k] + firsts[k] + at
            total = tl.zeros((BLOCK_N,), tl.float32)
            for _ in range(0, rows[k]):
                total += tl.load(source, mask=ok, other=0.0)
                source += columns[k]
            tl.store(outs[k] + at, total.to(outs[k].dtype.element_ty), mask=ok)


def sum_partials(x: torch.Tensor, parts: Sequence[tuple[torch.Tensor, int, torch.Tensor]]) -> None:
    """Fill outputs with sums over rows; one launch.

    Args:
        x: the stage's map, for its device.
        parts: for each output (partials (rows, columns) float32, first column, the contiguous
            output of any shape and floating dtype).
    """
    config = configs.choose("sum_partials_kernel", x, 0)
    largest = max(out.numel() for _, _, out in parts)
    sizes = tuple(out.numel() for _, _, out in parts)
    launch(
        sum_partials_kernel,
        (cdiv(largest, config.blocks["BLOCK_N"]), len(parts)),
        tuple(partials for partials, _, _ in parts),
        tuple(out for _, _, out in parts),
        tuple(partials.shape[0] for partials, _, _ in parts),
        tuple(partials.shape[1] for partials, _, _ in parts),
        (*(first for _, first, _ in parts), *sizes),
        config=config,
        COUNT=len(parts),
    )
