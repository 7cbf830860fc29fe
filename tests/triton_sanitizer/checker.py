"""The sanitizer: hooks into Triton's interpreter, and the context that sets them.

Written for the interpreter of Triton 3.8.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpreterBuilder,
    InterpreterError,
    TensorHandle,
)

from fused.backends import triton as backend
from fused.backends.triton import launch as launcher

from .arithmetic import ArithmeticBuilder, repaired
from .launch_check import LaunchCheck, programs
from .operation import Finding, Operation
from .traffic import record

Array = np.ndarray


class _State:
    """What runs at this moment."""

    order = 0
    check: LaunchCheck | None = None
    operation: Operation | None = None
    scratch: frozenset[str] = frozenset()


def _active(mask: Any, pointers: TensorHandle) -> Array:
    return np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)


def _bits(values: Array) -> Array:
    return values.view(f"u{values.itemsize}") if values.itemsize > 1 else values.view(np.uint8)


class MemoryChecks(InterpreterBuilder):
    """The interpreter's memory operations, each checked before it touches memory."""

    def create_masked_load(self, ptrs: TensorHandle, mask: Any, *rest: Any, **kw: Any) -> Any:
        """`tl.load`."""
        if _State.check is not None:
            ptrs = _State.check.access("load", ptrs, _active(mask, ptrs))
        return super().create_masked_load(ptrs, mask, *rest, **kw)

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: Any, *rest: Any, **kw: Any
    ) -> Any:
        """`tl.store`; reads back what it stored, since two lanes may have stored differently."""
        if _State.check is None:
            return super().create_masked_store(ptrs, value, mask, *rest, **kw)
        active = _active(mask, ptrs)
        real = _State.check.access("store", ptrs, active)
        result = super().create_masked_store(real, value, mask, *rest, **kw)
        if active.any():
            now = super().create_masked_load(real, mask, None, None, None, False).data
            if now.itemsize == value.data.itemsize:
                lost = (_bits(now) != _bits(value.data)) & active
                if lost.any():
                    _State.check.clash(ptrs, lost)
        return result

    def create_atomic_rmw(
        self, op: Any, ptr: TensorHandle, val: Any, mask: Any, sem: Any, scope: Any
    ) -> TensorHandle:
        """`tl.atomic_add` and the like."""
        if _State.check is not None:
            active = _active(mask, ptr)
            real = _State.check.access("update", ptr, active)
            if active.any():
                _State.check.synchronise(ptr, sem, scope)
            ptr = real
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def create_atomic_cas(
        self, ptr: TensorHandle, cmp: Any, val: Any, sem: Any, scope: Any
    ) -> TensorHandle:
        """`tl.atomic_cas`."""
        if _State.check is not None:
            real = _State.check.access("update", ptr, np.ones(ptr.data.shape, bool))
            _State.check.synchronise(ptr, sem, scope)
            ptr = real
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def create_barrier(self) -> None:
        """`tl.debug_barrier`."""
        if _State.check is not None:
            _State.check.clock.barrier()


class CheckingBuilder(MemoryChecks, ArithmeticBuilder):
    """The interpreter with right arithmetic and checked memory."""


# -------------------------------------------------------------------------------------- launches


def _label(one: launcher.Launch) -> None:
    """Run a launch, whose scratch arguments the interpreter would not know."""
    _State.scratch = one.scratch
    try:
        one.run()
    finally:
        _State.scratch = frozenset()


def _error(error: Exception, check: LaunchCheck) -> Exception:
    """The finding inside of the interpreter's nested errors, or its innermost error."""
    while isinstance(error, InterpreterError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, Finding):
        return error
    return InterpreterError(f"{check.kernel}, program {check.program}: {error!r}")


def _grid(executor: GridExecutor, arguments: dict[str, Any]) -> tuple[int, int, int]:
    grid = executor.grid(arguments) if callable(executor.grid) else executor.grid
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


@contextlib.contextmanager
def _language() -> Iterator[None]:
    """Let `tl` act on the interpreter; once a launch, not at every call of a device function."""
    stock = interpreter._patch_lang
    patches = stock(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    try:
        yield
    finally:
        interpreter._patch_lang = stock
        patches.restore()


def _programs(
    executor: GridExecutor, check: LaunchCheck, arguments: dict[str, Any], order: int
) -> None:
    """Run every program of a launch under inspection."""
    grid = _grid(executor, arguments)
    builder = interpreter.interpreter_builder
    builder.set_grid_dim(*grid)
    _State.check = check
    try:
        with _language():
            for program in programs(grid, order):
                check.begin(program)
                builder.set_grid_idx(*program)
                executor.fn(**arguments)
    except Exception as error:
        found = _error(error, check)
        raise found from (None if isinstance(found, Finding) else error)
    finally:
        _State.check = None


# Kernels with atomics, with grid and constants, whose results did not depend on the order.
_compared: set[tuple[object, ...]] = set()


def _execute(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
    """Instead of `GridExecutor.__call__`: one launch, checked, in the order that is asked for."""
    known = inspect.getfullargspec(executor.fn).args
    kwargs = {key: value for key, value in kwargs.items() if key in known}
    named = inspect.getcallargs(executor.fn, *args, **kwargs)

    def fresh() -> tuple[LaunchCheck, dict[str, Any]]:
        check = LaunchCheck(executor.fn.__name__, _State.operation)
        return check, check.bind(named, executor.constexprs)

    check, arguments = fresh()
    before = [memory.copy() for memory in check.memory()]
    _programs(executor, check, arguments, _State.order)
    grid = _grid(executor, arguments)
    record(check.traffic(grid, _State.scratch))
    # Without atomics the other checks leave no way to depend on the order.
    key = (check.kernel, grid, *(str(named[name]) for name in executor.constexprs))
    if not check.updates or key in _compared:
        return
    after = [memory.copy() for memory in check.memory()]
    for memory, old in zip(check.memory(), before, strict=True):
        memory[...] = old
    again, arguments = fresh()
    _programs(executor, again, arguments, 0 if _State.order else 1)
    again.program = None
    for index, (memory, old) in enumerate(zip(check.memory(), after, strict=True)):
        if not np.array_equal(memory, old):
            again.fail("differs between two orders of the programs", again.memory_name(index))
    _compared.add(key)


# ---------------------------------------------------------------------------------------- context


@contextlib.contextmanager
def operation(name: str) -> Iterator[Operation]:
    """One call of an op: its `torch.empty` is unwritten memory, its inputs are read only."""
    if _State.operation is not None:  # an op that calls another one's launcher
        yield _State.operation
        return
    with Operation(name) as one:
        _State.operation = one
        try:
            yield one
        finally:
            _State.operation = None


def _checked(op: str, kernel: Callable[..., object]) -> Callable[..., object]:
    """A function of the backend's table, run as an operation whose results are looked at."""
    names = [r.name for r in getattr(torch.ops.ciema, op).default._schema.returns]

    @functools.wraps(kernel)
    def run(*args: object) -> object:
        with operation(op) as one:
            results = kernel(*args)
            if one.name == op:
                one.check_results(results, names)
        return results

    return run


@contextlib.contextmanager
def sanitized(order: int | None = None) -> Iterator[None]:
    """Check every launch of the interpreter, and every op of the triton backend.

    Args:
        order: of the programs: 0 ascending, 1 reversed, others seeds of a shuffle; by default what
            FUSED_TRITON_ORDER says, else 1.
    """
    stock, kernels, before = GridExecutor.__call__, dict(backend.KERNELS), _State.order
    _State.order = int(os.environ.get("FUSED_TRITON_ORDER", "1")) if order is None else order
    GridExecutor.__call__ = _execute
    backend.KERNELS.update({op: _checked(op, kernel) for op, kernel in kernels.items()})
    try:
        with repaired(CheckingBuilder), launcher.intercept(_label):
            yield
    finally:
        GridExecutor.__call__, _State.order = stock, before
        backend.KERNELS.update(kernels)
