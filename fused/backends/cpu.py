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


def passed_over(op: str, x: torch.Tensor) -> str | None:
    """Why "auto" does not take this backend although it can run; None if it may."""
    hidden = x.shape[1] // 4 if op.startswith("gated_fusion") and x.dim() == 4 else 2
    if hidden < 2 and x.element_size() < 4:
        return "gradients of one hidden channel, behind two norms, are left to 16 bits' rounding"
    return None


BACKEND = Backend("cpu", KERNELS, can_run, passed_over=passed_over)
