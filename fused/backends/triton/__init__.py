"""Backend "triton": kernels for any GPU that Triton knows, compiled when first used.

NVIDIA compute capability 8.0 and later, AMD CDNA and RDNA 3. This package imports Triton with the
first kernel that runs; how that is to run must be settled before. Without a GPU the kernels run
through Triton's interpreter, far slower than anything else, and only where
FUSED_TRITON_INTERPRETER=1 asks for that: it is for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping

import torch

from ..backend import Backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)
AMD_ARCHITECTURES = ("gfx90a", "gfx942", "gfx950", "gfx11")
# A group's 3c features of a tile stay in registers, which ends at this width.
LARGEST_GROUP = 64
# The most pixels of a map. Grids have 65535 programs on their second axis, here one for each 32 or
# 128 pixels; offsets into a slab's two padded maps, 2·H·W·64 elements at most, are of 32 bits.
LARGEST_PLANES = {
    "coordinate_attention": 2**24 - 1,
    "coordinate_attention_backward": 2**24 - 1,
    "cross_spatial": 65535 * 128,
    "cross_spatial_backward": 65535 * 32,
}
GROUPED_STAGES = ("coordinate_attention", "cross_spatial")

# Op → (module of this folder, function in it).
_FUNCTIONS: Mapping[str, tuple[str, str]] = {
    "channel_statistics": ("channel_statistics", "forward"),
    "channel_statistics_backward": ("channel_statistics", "backward"),
    "msff": ("msff", "forward"),
    "msff_backward": ("msff_backward", "backward"),
    "channel_interaction": ("channel_interaction", "forward"),
    "channel_interaction_backward": ("channel_interaction_backward", "backward"),
    "coordinate_attention": ("coordinate_attention", "forward"),
    "coordinate_attention_backward": ("coordinate_attention", "backward"),
    "cross_spatial": ("cross_spatial", "forward"),
    "cross_spatial_backward": ("cross_spatial_backward", "backward"),
    "gated_fusion": ("gated_fusion", "forward"),
    "gated_fusion_backward": ("gated_fusion_backward", "backward"),
    "gated_fusion_mean": ("gated_fusion", "forward_mean"),
}


def _interpreter_requested() -> bool:
    """Whether the test switch is set; read once, and Triton is told before it is imported."""
    if os.environ.get("FUSED_TRITON_INTERPRETER") != "1":
        return False
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    return os.environ.get("TRITON_INTERPRET") == "1"


INTERPRETER = _interpreter_requested()
AUTOTUNE = os.environ.get("FUSED_TRITON_AUTOTUNE") == "1"  # read once, see autotune.py


def _lazy(op: str, module: str, function: str) -> Callable[..., object]:
    def run(*args: object) -> object:
        kernel: Callable[..., object] = getattr(
            importlib.import_module(f".{module}", __name__), function
        )
        return kernel(*args)

    def run_tuned(*args: object) -> object:
        from . import autotune

        return autotune.run(op, run, args)

    return run_tuned if AUTOTUNE else run


KERNELS: Mapping[str, Callable[..., object]] = {
    op: _lazy(op, *where) for op, where in _FUNCTIONS.items()
}


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _device_reason(index: int) -> str | None:
    """Why the GPU of this index cannot run the kernels, or None."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        if name.startswith(AMD_ARCHITECTURES):
            return None
        return f"{name} is not supported, the triton kernels know {', '.join(AMD_ARCHITECTURES)}"
    capability = (properties.major, properties.minor)
    if capability >= OLDEST_CAPABILITY:
        return None
    told, oldest = (".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
    return f"{properties.name} has compute capability {told}, the triton kernels need {oldest}"


def can_run(op: str, x: torch.Tensor) -> str | None:
    """None if this backend runs `op` on `x` (B, C, H, W), else the reason."""
    if not _installed():
        return "Triton is not installed"
    if op not in KERNELS:
        return f"{op} has no triton kernel"
    if x.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"{x.dtype} is not supported, the triton kernels know {known}"
    pixels = x.shape[2] * x.shape[3] if x.dim() == 4 else 0
    if pixels > (largest := LARGEST_PLANES.get(op, pixels)):
        return f"H*W = {pixels} is over {largest}"
    if x.device.type == "cpu":
        if not INTERPRETER:
            return (
                "the input is on cpu, the triton kernels run on a GPU "
                "(for tests FUSED_TRITON_INTERPRETER=1 runs them in Triton's interpreter)"
            )
    elif x.device.type != "cuda":
        return f"the input is on {x.device.type}, the triton kernels run on cuda"
    elif INTERPRETER:
        return "FUSED_TRITON_INTERPRETER=1 is set, so the triton kernels run on the cpu only"
    elif (reason := _device_reason(x.device.index or 0)) is not None:
        return reason
    return None


def takes_groups(op: str, x: torch.Tensor, groups: int) -> str | None:
    """None if this backend runs `op` on `x` (B, C, H, W) cut into `groups`, else the reason."""
    if op.removesuffix("_backward") in GROUPED_STAGES and x.dim() == 4 and groups > 0:
        width = x.shape[1] // groups
        if width > LARGEST_GROUP:
            return f"a group has {width} channels, the triton kernels take at most {LARGEST_GROUP}"
    return None


def passed_over(op: str, x: torch.Tensor) -> str | None:
    """Why "auto" does not take this backend although it can run; None if it may."""
    return "the interpreter is for tests and runs only when asked for" if INTERPRETER else None


BACKEND = Backend("triton", KERNELS, can_run, takes_groups, passed_over)
