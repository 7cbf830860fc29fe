"""Backend "cuda" on CPU tensors: its launches, as Python makes them, run in the emulator."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from fused.backends import cuda
from fused.backends.cuda.launch import Launch, intercept

from .build import CSRC, build
from .session import ORDERS, Report, Session


@functools.cache
def file_of_entries() -> dict[str, str]:
    """Entry without dtype → stem of the file of csrc/cuda that defines it."""
    found = {}
    for file in sorted((CSRC / "cuda").glob("*.cu")):
        for name in re.findall(r'\{"(\w+)_float32",', file.read_text()):
            found[name] = file.stem
    return found


def module_of(launch: Launch) -> ModuleType:
    """The build of the emulator that holds a launch's entry."""
    return _module(file_of_entries()[launch.entry.rpartition("_")[0]])


@functools.cache
def _module(stem: str) -> ModuleType:
    return build(CSRC / "cuda" / f"{stem}.cu")


def emulate(launch: Launch, order: str = "forward", plant: int = 0) -> Report:
    """Run one launch; its outputs and scratch are written, the report says what was found."""
    session = Session(module_of(launch), order, len(launch.entry), plant)
    addresses = {name: session.input(name, t) for name, t in launch.reads.items()}
    addresses |= {name: session.output(name, t) for name, t in launch.writes.items()}
    addresses |= {name: session.inout(name, t) for name, t in launch.updates.items()}
    addresses |= {name: session.scratch(name, t) for name, t in launch.scratch.items()}
    session.launch(launch.entry, reals=launch.reals, **addresses, **launch.integers)
    return session.finish()


@contextlib.contextmanager
def emulated(
    check: Callable[[Launch, Report], None] | None = None,
    order: str | None = None,
    plant: int = 0,
) -> Iterator[None]:
    """Within it `backend="cuda"` runs on CPU tensors.

    Args:
        check: gets every launch with its report; by default any finding fails the test.
        order: of threads and blocks; by default the launches take the four in turn.
        plant: which of their planted bugs the kernels are to have (``PLANT``), 0 for none.
    """
    count = 0

    def run(launch: Launch) -> None:
        nonlocal count
        report = emulate(launch, order or ORDERS[count % len(ORDERS)], plant)
        count += 1
        if check is None:
            assert report.findings == [], f"{launch.entry}: {report.findings}"
        else:
            check(launch, report)

    with pytest.MonkeyPatch.context() as patch, intercept(run):
        patch.setattr(cuda, "emulated", True)
        yield
