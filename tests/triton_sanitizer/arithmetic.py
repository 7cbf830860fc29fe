"""Triton's interpreter made to compute what a GPU computes.

The interpreter of Triton 3.8 keeps bfloat16 as raw uint16 and adds, multiplies and compares these,
truncates where a cast must round to nearest, has no bfloat16 constants, ignores TF32, reduces with
a function of one's own element by element, and raises at argmax of nothing but NaN.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

from .speed import accelerated

Array = np.ndarray


def widen(bits: Array) -> Array:
    """bfloat16 bits (uint16) as float32 of the same value."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Array) -> Array:
    """Float32 rounded to nearest even bfloat16, as bits (uint16); NaN stays NaN."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def round_to_tf32(values: Array) -> Array:
    """Float32 rounded to TF32's 10 bits of mantissa, ties away from zero (`cvt.rna.tf32.f32`)."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def _is_bfloat16(handle: Any) -> bool:
    """Whether a handle holds bfloat16 bits; the result of a comparison keeps only the name."""
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _values(handle: Any) -> Array:
    return widen(handle.data) if _is_bfloat16(handle) else handle.data


class ArithmeticBuilder(InterpreterBuilder):
    """The interpreter's operations with right bfloat16, casts and products."""

    def get_bf16(self, value: float) -> TensorHandle:
        """A bfloat16 constant."""
        return TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        """A cast between any two of the standard types."""
        values, scalar = _values(src), dst_type.scalar
        if scalar == tl.bfloat16:
            return TensorHandle(narrow(values.astype(np.float32)), scalar)
        return TensorHandle(values.astype(interpreter._get_np_dtype(scalar)), scalar)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable) -> TensorHandle:
        """Elementwise op of two tensors; a bfloat16 result is rounded once."""
        if not (_is_bfloat16(lhs) or _is_bfloat16(rhs)):
            return super().binary_op(lhs, rhs, op)
        result = op(_values(lhs), _values(rhs))
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(narrow(result), tl.bfloat16)

    def unary_op(self, arg: TensorHandle, op: Callable) -> TensorHandle:
        """Elementwise op of one tensor."""
        if not _is_bfloat16(arg):
            return super().unary_op(arg, op)
        return TensorHandle(narrow(op(_values(arg))), tl.bfloat16)

    def ternary_op(
        self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Callable
    ) -> TensorHandle:
        """Elementwise op of three tensors; a selection leaves the bits alone."""
        if op is np.where or not _is_bfloat16(other):
            return super().ternary_op(lhs, rhs, other, op)
        return TensorHandle(narrow(op(*map(_values, (lhs, rhs, other)))), tl.bfloat16)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        """x·y + z, rounded once."""
        exact = _values(x).astype(np.float64) * _values(y) + _values(z)
        if _is_bfloat16(z):
            return TensorHandle(narrow(exact.astype(np.float32)), tl.bfloat16)
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def create_dot(
        self,
        a: TensorHandle,
        b: TensorHandle,
        d: TensorHandle,
        input_precision: Any,
        max_num_imprecise_acc: int,
    ) -> TensorHandle:
        """a·b + d: operands rounded as the precision asks, sums in float32."""
        kind = a.dtype.scalar
        if kind not in (tl.float16, tl.bfloat16, tl.float32):
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        lhs, rhs = (_values(operand).astype(np.float32, copy=False) for operand in (a, b))
        if kind == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            total = np.matmul(round_to_tf32(lhs), round_to_tf32(rhs))
        elif kind == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32x3:
            high = [round_to_tf32(lhs), round_to_tf32(rhs)]
            low = [round_to_tf32(lhs - high[0]), round_to_tf32(rhs - high[1])]
            total = np.matmul(low[0], high[1]) + np.matmul(high[0], low[1])
            total += np.matmul(*high)
        else:
            total = np.matmul(lhs, rhs)
        total = total + d.data.astype(np.float32, copy=False)
        return TensorHandle(total.astype(d.data.dtype, copy=False), d.dtype.scalar)


# ------------------------------------------------------------------------------------- reductions


def _pairwise(op: ReduceOps, tensors: tuple[Any, ...]) -> list[Any]:
    """Reduce neighbours with each other until one is left: any function, whole arrays at a time."""
    arrays, dtypes = [t.handle.data for t in tensors], [t.dtype for t in tensors]
    rank, axis = arrays[0].ndim, op.axis
    if axis is None:
        arrays, axis = [a.reshape(-1) for a in arrays], 0
    arrays = [np.moveaxis(a, axis, 0) for a in arrays]
    while arrays[0].shape[0] > 1:
        halves = [
            op.to_tensor(a[first::2], dtype)
            for first in (0, 1)
            for a, dtype in zip(arrays, dtypes, strict=True)
        ]
        results = op.combine_fn.fn(*halves)
        results = results if isinstance(results, (tuple, tl.tuple)) else (results,)
        arrays = [r.handle.data for r in results]
    if op.axis is None:
        left = [a.reshape((1,) * rank) if op.keep_dims else a[0] for a in arrays]
    else:
        left = [np.moveaxis(a, 0, axis) if op.keep_dims else a[0] for a in arrays]
    return [op.to_tensor(a, dtype) for a, dtype in zip(left, dtypes, strict=True)]


_stock_apply = ReduceOps.apply_impl


def _apply(op: ReduceOps, tensors: tuple[Any, ...]) -> Any:
    """A reduction; with NaN in it by the function itself, which NumPy's would not follow."""
    data = tensors[0].handle.data
    if op.combine_fn is not tl.standard._sum_combine and data.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            if np.isnan(data).any():
                return _pairwise(op, tensors)
    return _stock_apply(op, tensors)


@contextlib.contextmanager
def repaired(builder: type[InterpreterBuilder] = ArithmeticBuilder) -> Iterator[None]:
    """Let the interpreter compute with `builder`; `tl.device_assert` fires."""
    active = interpreter.interpreter_builder
    before = type(active), active.options, ReduceOps.generic_reduce, ReduceOps.apply_impl
    active.__class__ = builder
    # A check of every integer for overflow takes half as long again; no test is large enough.
    active.options = dataclasses.replace(active.options, debug=True, sanitize_overflow=False)
    ReduceOps.generic_reduce, ReduceOps.apply_impl = _pairwise, _apply
    try:
        with np.errstate(all="ignore"), accelerated():
            yield
    finally:
        active.__class__, active.options, ReduceOps.generic_reduce, ReduceOps.apply_impl = before
