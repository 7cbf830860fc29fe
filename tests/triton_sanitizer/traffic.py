"""Which bytes a launch reads and writes, per argument."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class ArgumentTraffic:
    """Traffic of one tensor argument of one launch, in bytes.

    Attributes:
        read: different bytes that are read.
        written: different bytes that are written.
        loaded: bytes of all loads together, each lane of each load counted.
        stored: bytes of all stores together.
        scratch: whether the launcher says that only its own op's launches use this memory.
    """

    read: int = 0
    written: int = 0
    loaded: int = 0
    stored: int = 0
    scratch: bool = False


@dataclass
class LaunchTraffic:
    """Traffic of one launch.

    Attributes:
        kernel: name of the kernel.
        grid: programs along the three axes.
        op: the op that launches it, None outside of one.
        arguments: the tensor arguments by the kernel's names for them.
    """

    kernel: str
    grid: tuple[int, int, int]
    op: str | None
    arguments: dict[str, ArgumentTraffic] = field(default_factory=dict)

    @property
    def read(self) -> int:
        """Different bytes read; memory that is passed as two arguments counts twice."""
        return sum(a.read for a in self.arguments.values())

    @property
    def written(self) -> int:
        """Different bytes written."""
        return sum(a.written for a in self.arguments.values())

    @property
    def loaded(self) -> int:
        """Bytes of all loads together, each lane of each load counted."""
        return sum(a.loaded for a in self.arguments.values())


_logs: list[list[LaunchTraffic]] = []


def record(launch: LaunchTraffic) -> None:
    """Add a launch to every open log."""
    for log in _logs:
        log.append(launch)


@contextlib.contextmanager
def collecting() -> Iterator[list[LaunchTraffic]]:
    """A list that fills with the traffic of each launch of the sanitized interpreter."""
    log: list[LaunchTraffic] = []
    _logs.append(log)
    try:
        yield log
    finally:
        _logs[:] = [other for other in _logs if other is not log]
