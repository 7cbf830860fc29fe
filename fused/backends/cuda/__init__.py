"""Backend "cuda": CUDA C++ kernels for NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import gpu_choice, native, triton
from ..backend import Backend

LIBRARY = native.load("cuda")
OLDEST_CAPABILITY = (8, 0)
# A group's 3c features of a tile stay in registers, which ends at this width.
LARGEST_GROUP = 64
LARGEST_SLAB = 2**31 - 1  # values of a group of one sample, which coordinate attention counts
LARGEST_BATCH = 65535  # of the second axis of a grid, kGridY of csrc/cuda/launch.h
GROUPED_STAGES = ("coordinate_attention", "cross_spatial")

# Op → (module of this folder, function in it).
_FUNCTIONS: Mapping[str, tuple[str, str]] = {
    "channel_statistics": ("channel_statistics", "forward"),
    "channel_statistics_backward": ("channel_statistics", "backward"),
    "coordinate_attention": ("coordinate_attention", "forward"),
    "coordinate_attention_backward": ("coordinate_attention", "backward"),
    "msff": ("msff", "forward"),
    "msff_backward": ("msff", "backward"),
    "channel_interaction": ("channel_interaction", "forward"),
    "channel_interaction_backward": ("channel_interaction", "backward"),
    "gated_fusion": ("gated_fusion", "forward"),
    "gated_fusion_backward": ("gated_fusion_backward", "backward"),
    "cross_spatial": ("cross_spatial", "forward"),
    "spatial_gate": ("spatial_gate", "forward"),
    "cross_spatial_backward": ("cross_spatial_backward", "backward"),
    "gated_fusion_mean": ("gated_fusion", "forward_mean"),
}


def _lazy(module: str, function: str) -> Callable[..., object]:
    def run(*args: object) -> object:
        kernel: Callable[..., object] = getattr(
            importlib.import_module(f".{module}", __name__), function
        )
        return kernel(*args)

    return run


KERNELS: Mapping[str, Callable[..., object]] = {
    op: _lazy(*where) for op, where in _FUNCTIONS.items()
}

# Set by tests that run the kernels' sources on the CPU; nothing else runs them there.
emulated = False


@functools.cache
def _device_reason(index: int) -> str | None:
    """Why the GPU of this index cannot run the kernels, or None."""
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    told, oldest = (".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
    if capability < OLDEST_CAPABILITY:
        return f"{properties.name} has compute capability {told}, the cuda kernels need {oldest}"
    plan = native.read_plan()
    if plan is None or holds_code_for(capability, plan):
        return None
    built = " ".join(plan["cuda_architectures"])
    return (
        f"{properties.name} has compute capability {told}, fused._cuda was built for {built}: "
        f"build it again here, or with TORCH_CUDA_ARCH_LIST={told}"
    )


def holds_code_for(capability: tuple[int, int], plan: Mapping[str, Any]) -> bool:
    """Whether a library built by this plan runs on a GPU of this compute capability.

    Machine code runs on the same major version from its minor one on, PTX on all from its own on.
    True for a plan that did not build the library, which tells nothing of it.
    """

    def numbers(name: str) -> tuple[int, int]:
        major, minor = name.removesuffix("+PTX").split(".")
        return int(major), int(minor)

    code = [numbers(name) for name in plan["cuda_architectures"]]
    ptx = [numbers(name) for name in plan.get("cuda_ptx", ())]
    if not plan["cuda"]:
        return True
    return any(major == capability[0] and minor <= capability[1] for major, minor in code) or any(
        one <= capability for one in ptx
    )


def can_run(op: str, x: torch.Tensor) -> str | None:
    """None if this backend runs `op` on `x` (B, C, H, W), else the reason."""
    if emulated:
        device, library = "cpu", native.NativeLibrary("cuda", None, None)
    else:
        device, library = "cuda", LIBRARY
    reason = native.why_not(library, device, KERNELS, op, x)
    if reason is None and x.dim() == 4 and x.shape[0] > LARGEST_BATCH:
        reason = f"a batch of {x.shape[0]} is over {LARGEST_BATCH}"
    if reason is None and x.device.type == "cuda" and not _is_fake(x):
        reason = _device_reason(x.device.index or 0)
    return reason


def _is_fake(x: torch.Tensor) -> bool:
    """Whether x has a device only by name, as while torch.compile traces."""
    return not torch.cuda.is_available()


def takes_groups(op: str, x: torch.Tensor, groups: int) -> str | None:
    """None if this backend runs `op` on `x` (B, C, H, W) cut into `groups`, else the reason."""
    if op.removesuffix("_backward") in GROUPED_STAGES and x.dim() == 4 and groups > 0:
        width = x.shape[1] // groups
        if width > LARGEST_GROUP:
            return f"a group has {width} channels, the cuda kernels take at most {LARGEST_GROUP}"
        values = width * x.shape[2] * x.shape[3]
        if op.startswith("coordinate_attention") and values > LARGEST_SLAB:
            return f"a group of {values} values is over {LARGEST_SLAB}"
    return None


def passed_over(op: str, x: torch.Tensor) -> str | None:
    """Why "auto" does not take this backend although it can run; None if it may."""
    if emulated:
        return "the emulator is for tests and runs only when asked for"
    if _is_fake(x):
        return None
    capability = ".".join(map(str, torch.cuda.get_device_capability(x.device)))
    known = gpu_choice.quickest(op, x, capability)
    if known is None or known.quickest != "triton" or triton.can_run(op, x) is not None:
        return None
    return f"triton was quicker for {known.pixels} pixels of {known.dtype} on {known.gpu}"


BACKEND = Backend("cuda", KERNELS, can_run, takes_groups, passed_over)
