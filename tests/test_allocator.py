"""The program keeps freed memory: a map of the same size costs no new pages."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from mobilesteelnet import allocator

FAULTS = """
import resource, torch
from mobilesteelnet.allocator import keep_freed_memory
print(keep_freed_memory() if {keep} else "untouched")
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(12 << 20).fill_(1).sum()  # 48 MiB
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool, **variables: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_maps_are_used_again() -> None:
    did, *counts = faults(True)
    if did != "True":
        pytest.skip("this C library has no mallopt, or the environment sets its variables")
    pages = (48 << 20) // os.sysconf("SC_PAGE_SIZE")
    # Once its heap has settled; a busy machine may take idle pages away now and then.
    assert min(int(count) for count in counts[-6:]) < pages / 10
    assert min(int(count) for count in faults(False)[-6:]) > pages / 2  # what it is for


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize(("most", "done"), [(2**31, True), (1 << 25, True), (0, False)])
def test_a_threshold_that_is_not_taken_leaves_the_other_alone(
    most: int, done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def mallopt(parameter: int, value: int) -> int:
        taken = parameter == allocator._TRIM_THRESHOLD or value <= most
        asked.extend([parameter] * taken)
        return int(taken)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    for name in allocator._BY_USER:
        monkeypatch.delenv(name, raising=False)
    assert allocator.keep_freed_memory() == done
    assert asked == ([allocator._MMAP_THRESHOLD, allocator._TRIM_THRESHOLD] if done else [])


def test_a_users_own_setting_is_respected() -> None:
    assert faults(True, MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


def test_the_program_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from mobilesteelnet.__main__ import main

    asked = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: asked.append(True))
    assert main(["--version"]) == 0
    assert asked == [True]
