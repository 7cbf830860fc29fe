"""The second stage of sums over blocks: one launch adds the partial results of all parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .launch import launch

LARGEST_COUNT = 16  # outputs of a launch
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def sum_partials(
    parts: Sequence[tuple[torch.Tensor, int, torch.Tensor]], taps: Sequence[int] | None = None
) -> None:
    """Fill outputs with sums over rows, in a fixed order.

    Args:
        parts: for each output (partials (rows, columns) float32, first column, the contiguous
            output of any shape and floating dtype), at most `LARGEST_COUNT`.
        taps: for each output, how many taps stand one after another in the columns, while the
            output has those of a weight together; 1 for all by default.
    """
    numbers: dict[str, int | float] = {"jobs": len(parts)}
    for job, (partials, first, out) in enumerate(parts):
        numbers |= {f"rows{job}": partials.shape[0], f"columns{job}": partials.shape[1]}
        numbers |= {f"first{job}": first, f"size{job}": out.numel()}
        numbers |= {f"kind{job}": _KINDS[out.dtype], f"taps{job}": taps[job] if taps else 1}
    launch(
        *("parameter_sums", torch.float32),
        reads={f"partials{job}": partials for job, (partials, _, _) in enumerate(parts)},
        writes={f"out{job}": out for job, (_, _, out) in enumerate(parts)},
        numbers=numbers,
    )
