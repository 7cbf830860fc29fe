"""The one place that launches Triton kernels, so that tests can count, check or compile them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from ..maps import allows_tf32
from ..maps import flat as flat
from ..maps import strides as strides
from .configs import Config

Grid = tuple[int, ...]
LARGEST_GRID = 65535  # of CUDA's second and third axis, which the interpreter does not have


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: programs along up to three axes.
        args: its arguments in order: tensors, numbers, tuples of them.
        constexprs: its compile-time arguments that are no block sizes.
        config: block sizes, warps and stages.
        scratch: names of the tensor arguments that only this op's launches read and write.
    """

    kernel: Any
    grid: Grid
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    config: Config
    scratch: frozenset[str] = field(default_factory=frozenset)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(getattr(self.kernel, "__name__", self.kernel))

    @property
    def options(self) -> dict[str, Any]:
        """All keyword arguments of the call."""
        limit = self.config.registers if torch.version.hip is None else 0  # AMD's has no such limit
        return {
            **({"maxnreg": limit} if limit else {}),
            **self.constexprs,
            **self.config.blocks,
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
            "enable_fp_fusion": self.config.fp_fusion,
        }

    def named_args(self) -> dict[str, Any]:
        """Run-time arguments by the names that the kernel gives them."""
        return dict(zip(self.kernel.arg_names, self.args, strict=False))

    def run(self) -> None:
        """Launch on the device of the tensors, on its current stream."""
        device = next(tensors(self.args)).device
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with guard:
            self.kernel[self.grid](*self.args, **self.options)


def tensors(args: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among arguments, those in tuples included."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from tensors(arg)


_interceptors: list[Callable[[Launch], None]] = []


@contextlib.contextmanager
def intercept(handle: Callable[[Launch], None]) -> Iterator[None]:
    """Hand every launch to `handle`, which may call its `run`; the innermost handler counts."""
    _interceptors.append(handle)
    try:
        yield
    finally:
        _interceptors.pop()


def launch(
    kernel: Any,
    grid: Grid,
    *args: Any,
    config: Config,
    scratch: tuple[str, ...] = (),
    **constexprs: Any,
) -> None:
    """Launch `kernel`; every launch of this backend goes through here.

    Args:
        kernel: a `@triton.jit` function.
        grid: programs along up to three axes, each at least 1; only the first may grow with a map.
        *args: run-time arguments in order; vectors of any stride, which kernels read without.
        config: from `configs.choose`.
        scratch: names of the arguments that are scratch memory of the op.
        **constexprs: compile-time arguments besides the block sizes.

    Raises:
        ValueError: The grid is larger than GPUs take.
    """
    one = Launch(kernel, grid, _with_dense_vectors(args), constexprs, config, frozenset(scratch))
    if any(size > LARGEST_GRID for size in grid[1:]):
        raise ValueError(f"{one.name}: grid={grid}: a GPU takes {LARGEST_GRID} behind the first")
    if _interceptors:
        _interceptors[-1](one)
    else:
        one.run()


def _with_dense_vectors(args: tuple[Any, ...]) -> tuple[Any, ...]:
    def dense(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(map(dense, arg))
        return arg.contiguous() if isinstance(arg, torch.Tensor) and arg.dim() == 1 else arg

    return tuple(map(dense, args))


def cdiv(total: int, size: int) -> int:
    """Blocks of `size` that cover `total`."""
    return -(-total // size)


def power_of_two(size: int, least: int = 16) -> int:
    """The next power of two, at least `least`: products need 16 along every axis."""
    return max(least, int(triton.next_power_of_2(size)))


# ------------------------------------------------------------------------------------------- maps


def is_wide(*tensors: torch.Tensor) -> bool:
    """Whether an offset into one of the tensors passes 32 bits."""
    return any(
        sum((size - 1) * abs(step) for size, step in zip(t.shape, t.stride(), strict=True))
        >= 2**31 - 2**16  # a tile's masked lanes may point a little past the end
        for t in tensors
        if t.numel() > 0
    )


def dot_precision(x: torch.Tensor) -> str:
    """`input_precision` of products of maps like `x`.

    float32 on NVIDIA: tf32 only where torch allows it, otherwise three tf32 products, which keep
    float32's accuracy (the dropped term is 2**-22 of a product) and run on tensor cores. Elsewhere
    plain float32.
    """
    if x.dtype != torch.float32 or x.device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32" if allows_tf32() else "tf32x3"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (AMD: compute units) of a device; 4 for the interpreter's CPU."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
