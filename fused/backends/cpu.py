"""Backend "cpu": C++ kernels for AVX-512, AVX2 or any processor, chosen when first used.

The environment variable FUSED_CPU_ISA=avx512bf16|avx512|avx2|portable forces one; one that this
processor lacks is a reason not to run, never a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from . import cpu_slabs, cpu_stages, native
from .backend import Backend


def _load() -> native.NativeLibrary:
    library = native.load("cpu")
    if library.error is None:
        try:
            native.kernel("cpu_isa")()
        except RuntimeError as error:  # FUSED_CPU_ISA asks for the impossible
            return replace(library, error=str(error))
    return library


LIBRARY = _load()
KERNELS: Mapping[str, Callable[..., object]] = {
    **native.kernels(),
    **cpu_stages.KERNELS,
    "coordinate_attention": cpu_slabs.coordinate_attention,
    "coordinate_attention_backward": cpu_slabs.coordinate_attention_backward,
    "cross_spatial": cpu_slabs.cross_spatial,
    "cross_spatial_backward": cpu_slabs.cross_spatial_backward,
}


def can_run(op: str, x: torch.Tensor) -> str | None:
    """None if this backend runs `op` on `x` (B, C, H, W), else the reason."""
    return native.why_not(LIBRARY, "cpu", KERNELS, op, x)


BACKEND = Backend("cpu", KERNELS, can_run)
