"""Backend "cuda": CUDA C++ kernels for NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from . import native
from .backend import Backend

LIBRARY = native.load("cuda")
KERNELS: Mapping[str, Callable[..., object]] = native.kernels()


def can_run(op: str, x: torch.Tensor) -> str | None:
    """None if this backend runs `op` on `x` (B, C, H, W), else the reason."""
    return native.why_not(LIBRARY, "cuda", KERNELS, op, x)


BACKEND = Backend("cuda", KERNELS, can_run)
