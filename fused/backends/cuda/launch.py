"""The one place that starts CUDA entries, so that tests can emulate, count or check them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from .. import native
from ..maps import allows_tf32, is_channels_last, strides

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Launch:
    """One call of an entry of `csrc/cuda`.

    Attributes:
        entry: its name, which ends in the maps' dtype.
        reads: tensors by the entry's names for them.
        writes: outputs, of which the entry writes every element.
        updates: memory that it reads and writes, as counters.
        scratch: memory that only this launch reads and writes.
        integers: sizes, strides and flags by name.
        reals: numbers with a fraction by name.
    """

    entry: str
    reads: Mapping[str, torch.Tensor]
    writes: Mapping[str, torch.Tensor]
    updates: Mapping[str, torch.Tensor]
    scratch: Mapping[str, torch.Tensor]
    integers: Mapping[str, int]
    reals: Mapping[str, float]

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {**self.reads, **self.writes, **self.updates, **self.scratch}

    def run(self) -> None:
        """On the GPU of the tensors, on its current stream."""
        buffers = self.buffers
        names = " ".join([*buffers, *self.integers, *self.reals])
        native.kernel("launch")(
            *(self.entry, names, list(buffers.values())),
            *(list(self.integers.values()), list(self.reals.values())),
        )


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
    entry: str,
    dtype: torch.dtype,
    *,
    reads: Mapping[str, torch.Tensor | None],
    writes: Mapping[str, torch.Tensor | None],
    updates: Mapping[str, torch.Tensor | None] | None = None,
    scratch: Mapping[str, torch.Tensor | None] | None = None,
    numbers: Mapping[str, int | float],
) -> None:
    """Start `<entry>_<dtype>`; every launch of this backend goes through here.

    Args:
        entry: its name without the dtype.
        dtype: of the maps.
        reads: tensors that it reads; None is a null pointer, as is an empty tensor.
        writes: tensors that it writes completely.
        updates: tensors that it reads and writes.
        scratch: memory that this launch alone uses, in which elements may stay unwritten.
        numbers: sizes and flags (int), and numbers with a fraction (float).
    """

    def present(tensors: Mapping[str, torch.Tensor | None] | None) -> dict[str, torch.Tensor]:
        given = tensors or {}
        return {name: t for name, t in given.items() if t is not None and t.numel() > 0}

    one = Launch(
        f"{entry}_{_NAMES[dtype]}",
        *(present(reads), present(writes), present(updates), present(scratch)),
        {name: int(n) for name, n in numbers.items() if not isinstance(n, float)},
        {name: n for name, n in numbers.items() if isinstance(n, float)},
    )
    if _interceptors:
        _interceptors[-1](one)
    else:
        one.run()


def geometry(name: str, x: torch.Tensor) -> dict[str, int]:
    """Strides and layout of a `readable` map, as `<name>_stride_b`, `…_c`, `…_s` and so on."""
    batch, channel, pixel = strides(x)
    return {
        f"{name}_stride_b": batch,
        f"{name}_stride_c": channel,
        f"{name}_stride_s": pixel,
        f"{name}_channels_last": int(is_channels_last(x)),
    }


def floats(vector: torch.Tensor) -> torch.Tensor:
    """A parameter as contiguous float32, as kernels take vectors and small matrices."""
    return vector.float().contiguous()


@functools.cache
def multiprocessors(device: torch.device) -> int | None:
    """Of a GPU; None for the emulator's CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def takes_tf32() -> int:
    """1 where torch lets float32 products round their operands to tf32, else 0."""
    return int(allows_tf32())
