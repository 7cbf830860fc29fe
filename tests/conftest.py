"""Shared ground of the tests: poisoned memory, fixed seeds, and where the shared data lie."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fused import set_backend
from fused.backends.triton import INTERPRETER

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_configure() -> None:
    """No silent fallback: what asks for the interpreter must not test something else instead."""
    asked = os.environ.get("FUSED_TRITON_INTERPRETER") == "1"
    if asked and importlib.util.find_spec("triton") and not INTERPRETER:
        raise pytest.UsageError("FUSED_TRITON_INTERPRETER=1: Triton was imported before fused")


@pytest.fixture(autouse=True)
def _poisoned_and_seeded() -> Iterator[None]:
    """`torch.empty` gives NaN, the generators start anew, and no test leaves a backend behind."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    set_backend(None)


@pytest.fixture(autouse=INTERPRETER)
def _sanitized() -> Iterator[None]:
    """FUSED_TRITON_INTERPRETER=1: every Triton launch is checked, with one configuration of it."""
    from triton_sanitizer import sanitized

    from fused.backends.triton import configs

    index = os.environ.get("FUSED_TRITON_CONFIG")
    forced = contextlib.nullcontext() if index is None else configs.forced(int(index))
    with forced, sanitized():
        yield


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test at the place "emulated-cuda": every CUDA launch runs, checked, on the CPU."""
    callspec = getattr(request.node, "callspec", None)
    place = callspec.params.get("place") if callspec else None
    if str(place) != "emulated-cuda":
        yield
        return
    from emulator import emulated

    with emulated():
        yield


def shared_path(*parts: str) -> Path:
    """A path below shared/; skips the test where it is absent, fails where CI promises it."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        if os.environ.get("REQUIRE_SHARED"):
            pytest.fail(f"REQUIRE_SHARED is set, but shared/{'/'.join(parts)} is missing")
        pytest.skip(f"shared/{'/'.join(parts)} is not beside the project")
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For networks too small to share: a second thread would mostly wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
