"""Compiles Triton kernels for GPUs that are not here.

A mock driver tells Triton of the GPU that is wanted, and `JITFunction.warmup` then specialises and
compiles as a launch on it would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from fused.backends.triton.launch import Launch


@dataclass(frozen=True)
class Target:
    """A GPU architecture.

    Attributes:
        name: "sm_90", or AMD's "gfx942".
        shared_bytes: what one block may ask for (CUDA programming guide; AMD's LDS).
        multiprocessors: of a GPU of that kind; launchers size their grids by it.
    """

    name: str
    shared_bytes: int
    multiprocessors: int

    @property
    def is_nvidia(self) -> bool:
        """Whether it is an NVIDIA GPU."""
        return self.name.startswith("sm_")

    @property
    def gpu(self) -> GPUTarget:
        """As Triton calls it."""
        if self.is_nvidia:
            return GPUTarget("cuda", int(self.name.removeprefix("sm_")), 32)
        return GPUTarget("hip", self.name, 64 if self.name.startswith("gfx9") else 32)


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", 163 * 1024, 108),  # A100
        Target("sm_86", 99 * 1024, 82),  # RTX 3090
        Target("sm_89", 99 * 1024, 58),  # L4
        Target("sm_90", 227 * 1024, 132),  # H100
        Target("sm_100", 227 * 1024, 148),  # B200
        Target("sm_120", 99 * 1024, 170),  # RTX 5090
        Target("gfx942", 64 * 1024, 304),  # MI300X
        Target("gfx1100", 64 * 1024, 48),  # RX 7900 XTX, in pairs of compute units
    )
}


# ------------------------------------------------------------------------------------ mock driver


class MockDriver(DriverBase):
    """Stands in for the GPU's driver as far as compiling asks it; it launches nothing."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        """Never chosen by itself."""
        return False

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target.gpu

    def get_current_device(self) -> str:
        """A name of its own, because a JITFunction keeps its compiled kernels by device."""
        return self.target.name

    def get_current_stream(self, device: object) -> int:
        """Any: nothing is launched."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors would lie."""
        return torch.device("cuda", 0)

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Of the launcher, which is never built."""
        return ty

    def get_benchmarker(self) -> Callable[..., Any]:
        """Refuse: nothing can be timed."""
        raise RuntimeError("the mock driver cannot time a kernel")


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Let Triton compile for `target` inside; afterwards it looks for a GPU again."""
    driver = triton.runtime.driver
    driver.set_active(MockDriver(target))
    hip = None if target.is_nvidia else "7.0"  # launches ask torch for what a GPU understands
    try:
        with mock.patch.object(torch.version, "hip", hip):
            yield
    finally:
        driver.set_active(None)


class Pointer:
    """What Triton looks at in a tensor argument: dtype, alignment and reach.

    The allocator of torch gives addresses that are multiples of 512, so a tensor that has none
    (a fake one) is as aligned as its offset into its storage is.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = int(tensor.storage_offset()) * tensor.dtype.itemsize
        self._bytes = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        """The address, the storage's beginning being 0."""
        return self._address

    def ptr_range(self) -> int:
        """Bytes of the storage; AMD's buffer instructions reach 2 GiB."""
        return self._bytes


def compile_launch(launch: Launch) -> Any:
    """The compiled kernel that this launch would run, inside `compiling_for`."""
    args = [_without_storage(value) for value in launch.args]
    return launch.kernel.warmup(*args, grid=launch.grid, **launch.options)


def _without_storage(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_without_storage(part) for part in value)
    return Pointer(value) if isinstance(value, torch.Tensor) else value
