"""Shadow memory: who wrote and read each cell of a storage, in this launch and before it.

A cell is as large as the smallest element type through which the storage is used.
"""

from __future__ import annotations

import bisect
import ctypes
from typing import NamedTuple

import numpy as np
import torch

Array = np.ndarray
Program = tuple[int, int, int]

NOBODY, MANY = -1, -2


class Problem(NamedTuple):
    """What is wrong with an access, and the first cell of it where that is so."""

    text: str
    first: int


def _first(bad: Array) -> int:
    return int(np.argmax(bad))


class Clock:
    """Time within a launch: a stamp for every program, and a new one at each of its barriers.

    Programs are ordered only by atomics that release and acquire: after one, a program sees what
    the earlier ones at that address had stored before their last barrier.

    Attributes:
        now: stamp of what the running program does.
        first: its first stamp; smaller ones are foreign to it.
        visible: number of a program → stamps of it below this are visible to the running one.
    """

    def __init__(self) -> None:
        self.now = self.first = -1
        self.visible: dict[int, int] = {}
        self._starts: list[int] = []
        self._programs: list[Program] = []
        self._released: dict[int, dict[int, int]] = {}

    def begin(self, program: Program) -> None:
        """The next program starts."""
        self.now += 1
        self.first = self.now
        self.visible = {}
        self._starts.append(self.now)
        self._programs.append(program)

    def barrier(self) -> None:
        """The program's threads have met: each sees what the others stored."""
        self.now += 1

    def synchronise(self, where: int, acquires: bool, releases: bool) -> None:
        """An atomic of the running program at an address."""
        known = self._released.get(where, {})
        if acquires:
            self.visible = _latest(self.visible, known)
        if releases:
            own = {len(self._starts) - 1: self.now}
            self._released[where] = _latest(_latest(known, self.visible), own)

    def _number(self, stamp: int) -> int:
        return bisect.bisect_right(self._starts, stamp) - 1

    def program(self, stamp: int) -> Program:
        """The program that a stamp belongs to."""
        return self._programs[self._number(stamp)]

    def sees(self, stamp: int) -> bool:
        """Whether the running program comes after what happened at a foreign stamp."""
        return stamp < self.visible.get(self._number(stamp), 0)

    def unseen(self, stamps: Array, foreign: Array) -> Array:
        """Those of the foreign stamps that the running program does not come after."""
        if not self.visible or not foreign.any():
            return foreign
        hidden = [stamp for stamp in np.unique(stamps[foreign]) if not self.sees(int(stamp))]
        return foreign & np.isin(stamps, hidden)


def _latest(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    return one | {number: max(stamp, one.get(number, 0)) for number, stamp in other.items()}


class Shadow:
    """What is known about the memory of one storage.

    Attributes:
        storage: kept alive, so that its address stays its own.
        cell: bytes of a cell.
        written: (cells,) bool, or None where all is written, as in an op's inputs.
        writable: False for an op's inputs.
    """

    def __init__(
        self,
        storage: torch.UntypedStorage,
        cell: int,
        *,
        written: bool = True,
        writable: bool = True,
    ) -> None:
        self.storage, self.cell, self.writable = storage, cell, writable
        self.written = None if written else np.zeros(self._cells, bool)
        self.begin_launch(cell)

    @property
    def _cells(self) -> int:
        return -(-self.storage.nbytes() // self.cell)

    def begin_launch(self, cell: int) -> None:
        """Forget the programs of the last launch; from here cells are no larger than `cell`."""
        if cell < self.cell:
            if self.written is not None:
                self.written = np.repeat(self.written, self.cell // cell)
            self.cell = cell
        # Stamp of the last plain store, and the program (its first stamp) that read or updated.
        self._writer: Array | None = None
        self._readers: Array | None = None
        self._updaters: Array | None = None

    def _array(self) -> Array:
        return np.full(self._cells, NOBODY, np.int32)

    # ------------------------------------------------------------------------------------ access

    def load(self, cells: Array, clock: Clock) -> Problem | None:
        """A program loads these cells."""
        if not self.writable:
            return None
        if problem := self._unwritten(cells) or self._foreign_store(cells, clock, "reads"):
            return problem
        if self._writer is not None and (recent := self._writer[cells] == clock.now).any():
            text = "reads what other threads of the program may have stored: no tl.debug_barrier"
            return Problem(text, _first(recent))
        if problem := self._others(self._updaters, cells, clock, "reads what {} updates"):
            return problem
        if self._readers is None:
            self._readers = self._array()
        self._join(self._readers, cells, clock)
        return None

    def store(self, cells: Array, clock: Clock) -> Problem | None:
        """A program stores to these cells."""
        if problem := self._write(cells, clock):
            return problem
        if problem := self._others(self._updaters, cells, clock, "overwrites what {} updates"):
            return problem
        if self._writer is None:
            self._writer = self._array()
        self._writer[cells] = clock.now
        if self.written is not None:
            self.written[cells] = True
        return None

    def update(self, cells: Array, clock: Clock) -> Problem | None:
        """A program updates these cells atomically, as others may too."""
        if problem := self._unwritten(cells) or self._write(cells, clock):
            return problem
        if self._updaters is None:
            self._updaters = self._array()
        self._join(self._updaters, cells, clock)
        return None

    # ------------------------------------------------------------------------------------ checks

    def _write(self, cells: Array, clock: Clock) -> Problem | None:
        if not self.writable:
            return Problem("writes an input of the op", 0)
        return self._foreign_store(cells, clock, "overwrites") or self._others(
            self._readers, cells, clock, "overwrites what {} reads"
        )

    def _unwritten(self, cells: Array) -> Problem | None:
        if self.written is None or (written := self.written[cells]).all():
            return None
        return Problem("reads memory that nobody wrote", _first(~written))

    def _foreign_store(self, cells: Array, clock: Clock, verb: str) -> Problem | None:
        if self._writer is None:
            return None
        stamps = self._writer[cells]
        foreign = stamps.view(np.uint32) < clock.first  # NOBODY is the largest uint32
        if not (foreign := clock.unseen(stamps, foreign)).any():
            return None
        first = _first(foreign)
        return Problem(f"{verb} what program {clock.program(stamps[first])} stores", first)

    @staticmethod
    def _others(seen: Array | None, cells: Array, clock: Clock, text: str) -> Problem | None:
        if seen is None:
            return None
        who = seen[cells]
        others = (who != NOBODY) & (who != clock.first)
        if clock.visible:  # whether all of many come before is not known, so it is not told
            others &= who != MANY
        if not (others := clock.unseen(who, others)).any():
            return None
        stamp = int(who[first := _first(others)])
        other = "another program" if stamp == MANY else f"program {clock.program(stamp)}"
        return Problem(text.format(other), first)

    @staticmethod
    def _join(seen: Array, cells: Array, clock: Clock) -> None:
        who = seen[cells]
        seen[cells] = np.where((who == NOBODY) | (who == clock.first), clock.first, MANY)

    # ----------------------------------------------------------------------------------- tensors

    def raw(self) -> Array:
        """The storage's bytes themselves."""
        if (size := self.storage.nbytes()) == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(
            (ctypes.c_uint8 * size).from_address(self.storage.data_ptr()), np.uint8
        )

    def of(self, x: torch.Tensor) -> Array:
        """`written` of the elements of a view x of this storage, (*x.shape, cells an element)."""
        assert self.written is not None
        if x.element_size() < self.cell:
            self.begin_launch(x.element_size())
        step = x.element_size() // self.cell
        return np.lib.stride_tricks.as_strided(
            self.written[x.storage_offset() * step :],
            (*x.shape, step),
            (*(stride * step for stride in x.stride()), 1),
        )
