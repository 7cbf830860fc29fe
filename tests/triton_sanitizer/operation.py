"""What one call of an op allocates, and which of it has been written, across all its launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .shadow import Shadow


class Finding(AssertionError):
    """A kernel or a launcher does what it must not."""


# Ops whose result is memory that nobody wrote.
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# Ops that look at the sizes of a tensor only, and ops that write without reading.
_SIZES_ONLY = (
    *(*_EMPTY, "_unsafe_view"),
    *("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"),
)
_OVERWRITING = ("copy_", "fill_", "zero_")


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists and tuples."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)


def address(x: torch.Tensor) -> int:
    """Where the storage of x begins; 0 if it holds nothing."""
    return x.untyped_storage().data_ptr()


class Operation(TorchDispatchMode):
    """One call of an op: active while its launcher runs.

    It keeps every storage that the launcher makes until the end of the call, so that no address is
    used twice. Nothing is done to tensors from outside of it, so that tracing and `torch.compile`
    see no mode.

    Attributes:
        name: the op.
        shadows: address → shadow of every storage made within the call.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.shadows: dict[int, Shadow] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`; check what it reads, note what it writes and makes."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        written: list[torch.Tensor] = []
        for argument in func._schema.arguments:
            found = list(tensors_in(given.get(argument.name)))
            writes = argument.alias_info is not None and argument.alias_info.is_write
            is_view = argument.alias_info is not None and not writes
            if writes:
                written += found
            if not (is_view or argument.is_out or name in _SIZES_ONLY or name in _OVERWRITING):
                for x in found:
                    self._check_read(func, x)
            if name == "copy_" and argument.name == "src":
                self._check_read(func, found[0])
        for x in written:
            if x.numel() > 0 and address(x) not in self.shadows:
                raise Finding(f"{self.name}: {func} writes an input of the op")
        result = func(*args, **kwargs)
        for x in written:
            if (shadow := self.shadows.get(address(x))) and shadow.written is not None:
                shadow.of(x)[...] = True
        self._keep(name, [*tensors_in(tuple(given.values()))], tensors_in(result))
        return result

    def _keep(self, name: str, given: list[torch.Tensor], results: Iterator[torch.Tensor]) -> None:
        known = {address(x) for x in given}
        for x in results:
            where = address(x)
            if where and where not in known and where not in self.shadows:
                storage, cell = x.untyped_storage(), x.element_size()
                self.shadows[where] = Shadow(storage, cell, written=name not in _EMPTY)

    def _unwritten(self, x: torch.Tensor) -> int:
        """Elements of x that nobody wrote."""
        shadow = self.shadows.get(address(x))
        if shadow is None or shadow.written is None or x.numel() == 0 or shadow.written.all():
            return 0
        return int((~shadow.of(x).all(-1)).sum())

    def _check_read(self, func: Any, x: torch.Tensor) -> None:
        if missing := self._unwritten(x):
            raise Finding(
                f"{self.name}: {func} reads memory that nobody wrote, {missing} of {x.numel()} "
                f"elements of {tuple(x.shape)}"
            )

    def check_results(self, results: Any, names: Sequence[str] = ()) -> None:
        """Raise if an op returns elements that nobody wrote."""
        values = results if isinstance(results, (list, tuple)) else (results,)
        for index, value in enumerate(values):
            for x in tensors_in(value):
                if missing := self._unwritten(x):
                    what = names[index] if index < len(names) else f"result {index}"
                    raise Finding(
                        f"{self.name}: returns {what} {tuple(x.shape)} with {missing} of "
                        f"{x.numel()} elements that nobody wrote"
                    )
