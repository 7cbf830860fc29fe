"""Triton's interpreter at twice its speed.

Half of its time goes into making the type and the shape of every intermediate tensor anew, and into
copies of tensors that NumPy would broadcast. What follows from a type is remembered by its name.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


class _Shape(NamedTuple):
    """What block types and tensors of one element type and shape have in common."""

    dims: tuple[int, ...]
    shape: Any
    numel: int
    name: str
    tensor_shape: Any
    tensor_numel: Any


_SCALAR = _Shape((), (), 1, "", core.tuple([]), core.constexpr(1))
_known: dict[tuple[object, ...], _Shape] = {}

_np_dtypes: dict[str, np.dtype] = {}

_stock_block_type, _stock_tensor = core.block_type.__init__, core.tensor.__init__
_stock_np_dtype = interpreter._get_np_dtype
_stock_broadcast = TritonSemantic.broadcast_impl_value


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    dims = tuple(d.value if isinstance(d, core.constexpr) else d for d in shape)
    key = (element_ty.name, *dims)
    common = _known.get(key)
    if common is None:
        _stock_block_type(self, element_ty, list(dims))
        size, sizes = core.constexpr(math.prod(dims)), [core.constexpr(d) for d in dims]
        common = _Shape(dims, self.shape, self.numel, self.name, core.tuple(sizes), size)
        _known[key] = common
    self.element_ty, self.common = element_ty, common
    self.shape, self.numel, self.name = common.shape, common.numel, common.name


def _tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    common = type.common if type.is_block() else _SCALAR
    self.shape, self.numel = common.tensor_shape, common.tensor_numel


def _dims(x: Any) -> tuple[int, ...]:
    return x.type.common.dims if x.type.is_block() else ()


def _broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
    left, right = _dims(lhs), _dims(rhs)
    if left == right:
        return lhs, rhs
    if left and right and len(left) != len(right):
        return _stock_broadcast(self, lhs, rhs)
    if left and right:
        dims = tuple(b if a == 1 else a for a, b in zip(left, right, strict=True))
    else:
        dims = left or right

    def spread(x: Any, own: tuple[int, ...]) -> Any:
        if own == dims:
            return x
        handle = TensorHandle(np.broadcast_to(x.handle.data, dims), x.handle.dtype.scalar)
        return core.tensor(handle, core.block_type(x.type.scalar, dims))

    return spread(lhs, left), spread(rhs, right)


def _np_dtype(tt_dtype: Any) -> np.dtype:
    found = _np_dtypes.get(tt_dtype.name)
    if found is None:
        found = _np_dtypes[tt_dtype.name] = _stock_np_dtype(tt_dtype)
    return found


@contextlib.contextmanager
def accelerated() -> Iterator[None]:
    """Let the interpreter remember types and shapes."""
    core.block_type.__init__, core.tensor.__init__ = _block_type, _tensor
    TritonSemantic.broadcast_impl_value = _broadcast
    interpreter._get_np_dtype = _np_dtype
    try:
        yield
    finally:
        core.block_type.__init__, core.tensor.__init__ = _stock_block_type, _stock_tensor
        TritonSemantic.broadcast_impl_value = _stock_broadcast
        interpreter._get_np_dtype = _stock_np_dtype
