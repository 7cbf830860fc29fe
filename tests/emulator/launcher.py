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


def module_of(launch: Launch, defines: tuple[str, ...] = ()) -> ModuleType:
    """The build of the emulator that holds a launch's entry."""
    stem = file_of_entries()[launch.entry.rpartition("_")[0]]
    return _module(stem, defines)


@functools.cache
def _module(stem: str, defines: tuple[str, ...]) -> ModuleType:
    return build(CSRC / "cuda" / f"{stem}.cu", defines)


def emulate(launch: Launch, order: str = "forward", defines: tuple[str, ...] = ()) -> Report:
    """Run one launch; its outputs and scratch are written, the report says what was found."""
    session = Session(module_of(launch, defines), order, seed=len(launch.entry))
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
    defines: tuple[str, ...] = (),
) -> Iterator[None]:
    """Within it `backend="cuda"` runs on CPU tensors.

    Args:
        check: gets every launch with its report; by default any finding fails the test.
        order: of threads and blocks; by default the launches take the four in turn.
        defines: of the kernels' build, as ``("PLANT=1",)``.
    """
    count = 0

    def run(launch: Launch) -> None:
        nonlocal count
        report = emulate(launch, order or ORDERS[count % len(ORDERS)], defines)
        count += 1
        if check is None:
            assert report.findings == [], f"{launch.entry}: {report.findings}"
        else:
            check(launch, report)

    with pytest.MonkeyPatch.context() as patch, intercept(run):
        patch.setattr(cuda, "emulated", True)
        yield
