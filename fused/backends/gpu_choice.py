"""Which of the GPU backends "auto" prefers for a stage: what was measured, in gpu_choice.json.

`python -m benchmarks.gpu_choice` writes that file from the timings of `benchmarks/on_gpu.sh`. Where
nobody has measured a stage and dtype, the registry's order decides.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_suffix(".json")
FORMAT = 1
_HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Measured:
    """One timing of a stage.

    Attributes:
        gpu: its name.
        capability: its compute capability, as "9.0".
        stage: as in `contract.STAGES`.
        backward: measured over forward and backward, not a forward in evaluation.
        dtype: of the maps, as "float16".
        pixels: B·H·W.
        quickest: the backend's name.
    """

    gpu: str
    capability: str
    stage: str
    backward: bool
    dtype: str
    pixels: int
    quickest: str


def read(file: Path = FILE) -> tuple[Measured, ...]:
    """The rows of a file of choices.

    Raises:
        ValueError: it is none.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        return tuple(Measured(**row) for row in content["measured"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no table of choices: {error!r}") from error


@functools.cache
def _shipped() -> tuple[Measured, ...]:
    return read()


def quickest(op: str, x: torch.Tensor, capability: str) -> Measured | None:
    """The measurement closest to `op` on x (B, C, H, W); None if there is none.

    Half precision that was not measured takes the other one's row: the instructions cost the same.
    On a GPU whose compute capability was not measured the others' count.
    """
    stage = op.removesuffix("_backward").removesuffix(
        "_mean"
    )  # the mean of a map takes its products
    dtype, backward = str(x.dtype).removeprefix("torch."), op.endswith("_backward")
    rows = [row for row in _shipped() if (row.stage, row.backward) == (stage, backward)]
    wanted = _HALVES if dtype in _HALVES else (dtype,)
    rows = [row for row in rows if row.dtype == dtype] or [r for r in rows if r.dtype in wanted]
    rows = [row for row in rows if row.capability == capability] or rows
    pixels = x.shape[0] * x.shape[-2] * x.shape[-1]
    return min(rows, key=lambda row: abs(math.log(row.pixels / pixels)), default=None)
