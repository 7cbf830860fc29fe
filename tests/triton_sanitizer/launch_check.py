"""One launch under inspection: arguments at addresses of their own, programs in some order."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from .operation import Finding, Operation, address
from .shadow import Array, Clock, Program, Shadow
from .traffic import ArgumentTraffic, LaunchTraffic

# An argument's pointer is moved to the middle of a slot of 2⁴⁴ bytes: whatever a kernel adds to it,
# the slot tells which argument it comes from, and no argument lies beside another.
_SLOT_BITS = 44


def _extent(x: torch.Tensor) -> int:
    """Elements from the first to the last of x."""
    if x.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _holes(x: torch.Tensor, extent: int) -> Array | None:
    """(extent,) whether an element belongs to x; None if all do."""
    if x.numel() == extent:
        return None
    member = np.zeros(extent, bool)
    np.lib.stride_tricks.as_strided(member, x.shape, x.stride())[...] = True
    return None if member.all() else member


class Argument:
    """One tensor argument of a launch."""

    def __init__(self, name: str, x: torch.Tensor, slot: int, shadow: Shadow) -> None:
        self.name, self.shadow, self.size = name, shadow, x.element_size()
        # The real address modulo 4096 is kept, so alignment is what it will be.
        self.base = (slot << _SLOT_BITS) + (1 << (_SLOT_BITS - 1)) + x.data_ptr() % 4096
        self.shift = (x.data_ptr() - self.base) % 2**64
        self.elements = _extent(x)
        self.member = _holes(x, self.elements)
        self.first_cell = x.storage_offset() * self.size // shadow.cell
        cells = self.elements * self.size // shadow.cell
        self.was_read, self.was_written = np.zeros(cells, bool), np.zeros(cells, bool)
        self.loaded = self.stored = 0

    def pointer(self, x: torch.Tensor) -> Any:
        """The argument as the kernel gets it."""
        pointer = interpreter._implicit_cvt(x)
        pointer.handle.data = np.array([self.base], np.uint64)
        return pointer

    def traffic(self, scratch: bool) -> ArgumentTraffic:
        """What the launch has read and written of it."""
        cell = self.shadow.cell
        read, written = (int(a.sum()) * cell for a in (self.was_read, self.was_written))
        return ArgumentTraffic(read, written, self.loaded, self.stored, scratch)


class LaunchCheck:
    """The state of one launch; the builder asks it about every access.

    Attributes:
        kernel: name of the kernel.
        arguments: the tensor arguments; slot s is number s − 1.
        clock: the programs so far.
        updates: whether an atomic was used.
    """

    def __init__(self, kernel: str, operation: Operation | None) -> None:
        self.kernel, self.operation = kernel, operation
        self.arguments: list[Argument] = []
        self.clock = Clock()
        self.program: Program | None = None
        self.updates = False
        self._shadows: dict[int, Shadow] = {} if operation is None else operation.shadows
        self._inputs: dict[int, Shadow] = {}

    # --------------------------------------------------------------------------------- arguments

    def bind(self, named: dict[str, Any], constexprs: list[str]) -> dict[str, Any]:
        """The kernel's arguments as the interpreter hands them over; tensors are registered."""
        tensors: list[tuple[str, torch.Tensor]] = []

        def collect(name: str, value: Any) -> None:
            if isinstance(value, torch.Tensor):
                tensors.append((name, value))
            elif isinstance(value, tuple):
                for index, one in enumerate(value):
                    collect(f"{name}[{index}]", one)

        runtime = {name: value for name, value in named.items() if name not in constexprs}
        for name, value in runtime.items():
            collect(name, value)
        cells: dict[int, int] = {}
        for _, x in tensors:
            cells[address(x)] = min(cells.get(address(x), 16), x.element_size())
        for _, x in tensors:
            self._shadow(x, cells[address(x)]).begin_launch(cells[address(x)])
        for name, x in tensors:
            shadow = self._shadow(x, cells[address(x)])
            self.arguments.append(Argument(name, x, len(self.arguments) + 1, shadow))
        pointers = iter([a.pointer(x) for a, (_, x) in zip(self.arguments, tensors, strict=True)])

        def convert(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return next(pointers)
            if isinstance(value, tuple):
                return interpreter._tuple_create(value, map(convert, value))
            return interpreter._implicit_cvt(value)

        return named | {name: convert(value) for name, value in runtime.items()}

    def _shadow(self, x: torch.Tensor, cell: int) -> Shadow:
        where = address(x)
        if where in self._shadows:
            return self._shadows[where]
        if where not in self._inputs:
            writable = self.operation is None
            self._inputs[where] = Shadow(x.untyped_storage(), cell, writable=writable)
        return self._inputs[where]

    def _written(self) -> list[Argument]:
        """One argument of each storage that the launch may write."""
        by_storage = {id(a.shadow): a for a in reversed(self.arguments) if a.shadow.writable}
        return list(by_storage.values())

    def memory(self) -> list[Array]:
        """The bytes that the launch may write, one array a storage."""
        return [a.shadow.raw() for a in self._written()]

    def memory_name(self, index: int) -> str:
        """The argument that has the memory of this index."""
        return self._written()[index].name

    def clash(self, pointers: TensorHandle, lost: Array) -> None:
        """Two lanes of a store wrote different values to one address."""
        where = int(pointers.data[lost][0])
        argument = self.arguments[(where >> _SLOT_BITS) - 1]
        element = (where - argument.base) // argument.size
        text = f"two lanes of one store write different values to element {element}"
        self.fail(text, argument.name)

    # ---------------------------------------------------------------------------------- programs

    def synchronise(self, pointers: TensorHandle, semantic: Any, scope: Any) -> None:
        """An atomic has been done; that of a single element may order programs."""
        self.updates = True
        if pointers.data.size == 1 and scope != ir.MEM_SYNC_SCOPE.CTA:
            both = ir.MEM_SEMANTIC.ACQUIRE_RELEASE
            acquires = semantic in (both, ir.MEM_SEMANTIC.ACQUIRE)
            releases = semantic in (both, ir.MEM_SEMANTIC.RELEASE)
            self.clock.synchronise(int(pointers.data.reshape(-1)[0]), acquires, releases)

    def begin(self, program: Program) -> None:
        """The next program starts."""
        self.program = program
        self.clock.begin(program)

    def fail(self, what: str, name: str = "") -> None:
        """Raise the finding."""
        where = "" if self.program is None else f", program {self.program}"
        argument = f" {name}:" if name else ""
        raise Finding(f"{self.kernel}{where}:{argument} {what}") from None

    # ------------------------------------------------------------------------------------ access

    def access(self, kind: str, pointers: TensorHandle, active: Array) -> TensorHandle:
        """Check a "load", "store" or "update" of the active lanes; the real pointers of it."""
        addresses = pointers.data
        lanes = addresses.reshape(-1) if active.all() else addresses[active]
        if lanes.size == 0:
            return pointers
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        slots = lanes >> _SLOT_BITS
        slot = int(slots[0])
        if (slots == slot).all():
            argument = self._argument(slot, kind)
            self._check(kind, argument, lanes, size)
            shift: Any = np.uint64(argument.shift)
        else:  # a selection between pointers
            shift = np.zeros(addresses.shape, np.uint64)
            every = addresses >> _SLOT_BITS
            for one in np.unique(slots):
                argument = self._argument(int(one), kind)
                self._check(kind, argument, lanes[slots == one], size)
                shift[every == one] = argument.shift
        return TensorHandle(addresses + shift, pointers.dtype)

    def _argument(self, slot: int, kind: str) -> Argument:
        if not 1 <= slot <= len(self.arguments):
            self.fail(f"{kind} through a pointer that is no argument's")
        return self.arguments[slot - 1]

    def _check(self, kind: str, argument: Argument, lanes: Array, size: int) -> None:
        offsets = lanes - np.uint64(argument.base)
        shadow, cell = argument.shadow, argument.shadow.cell

        def fail(text: str, lane: int, bad: int = 0) -> None:
            element = int(offsets[lane : lane + 1].view(np.int64)[0]) / argument.size
            count = f", {bad} of {lanes.size} lanes" if bad else ""
            place = f"element {element:g} of {argument.elements}"
            self.fail(f"{kind} {text} ({place}{count})", argument.name)

        if size > 1 and (astray := (lanes & np.uint64(size - 1)) != 0).any():
            fail(f"of {size} bytes is misaligned", int(np.argmax(astray)))
        room = argument.elements * argument.size - size
        outside = offsets > np.uint64(room) if room >= 0 else np.ones(lanes.size, bool)
        if outside.any():
            fail("outside of it", int(np.argmax(outside)), int(outside.sum()))
        if argument.member is not None:
            holes = ~argument.member[offsets // np.uint64(argument.size)]
            if holes.any():
                fail("between its elements", int(np.argmax(holes)), int(holes.sum()))
        if size < cell:
            fail(f"of {size} bytes: a pointer cast to a narrower type is not followed", 0)
        cells = (offsets // np.uint64(cell)).astype(np.int64)
        step = size // cell
        if step > 1:
            cells = (cells[:, None] + np.arange(step)).reshape(-1)
        if kind != "store":
            argument.was_read[cells] = True
            argument.loaded += lanes.size * size
        if kind != "load":
            argument.was_written[cells] = True
            argument.stored += lanes.size * size
        if argument.first_cell:
            cells = cells + argument.first_cell
        check = {"load": shadow.load, "store": shadow.store, "update": shadow.update}[kind]
        if problem := check(cells, self.clock):
            fail(problem.text, problem.first // step)

    def traffic(self, grid: Program, scratch: frozenset[str]) -> LaunchTraffic:
        """The access log of the launch."""
        arguments = {a.name: a.traffic(a.name in scratch) for a in self.arguments}
        op = None if self.operation is None else self.operation.name
        return LaunchTraffic(self.kernel, grid, op, arguments)


def programs(grid: Program, order: int) -> list[Program]:
    """All programs of a grid: 0 as the interpreter takes them, 1 reversed, else shuffled."""
    every = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
    if order == 1:
        every.reverse()
    elif order > 1:
        random.Random(order).shuffle(every)
    return every
