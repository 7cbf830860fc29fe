"""The launches that the cuda backend makes at the paper's size, without making them.

The host code runs on fake tensors, and the entries of `csrc/cuda` in the emulator's dry form, which
notes each launch: grid, threads, dynamic shared memory.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "tests") not in sys.path:  # the emulator's Python face
    sys.path.append(str(ROOT / "tests"))

from emulator.launcher import file_of_entries, module_of  # noqa: E402

from benchmarks.budgets import short_name  # noqa: E402
from benchmarks.triton_capture import DTYPES, FAKE, LAYOUTS, Call, arguments, calls  # noqa: E402
from fused.backends import cuda  # noqa: E402
from fused.backends.cuda.launch import Launch, intercept, multiprocessors  # noqa: E402
from fused.evaluation_ops import spatial_gate  # noqa: E402

BATCHES = (1, 8)
MULTIPROCESSORS = 108


@dataclass(frozen=True)
class KernelLaunch:
    """One kernel that an entry starts.

    Attributes:
        entry: of `csrc/cuda`, with the dtype.
        kernel: as `budgets.short_name` gives it.
        grid: blocks along x, y and z.
        block: threads along x, y and z.
        dynamic_shared_bytes: of a block.
        parameters: bytes of what the kernel is handed; pointers are `pointer(0)`, `pointer(1)`, …
    """

    entry: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_shared_bytes: int
    parameters: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def threads(self) -> int:
        """Of a block."""
        return math.prod(self.block)


def pointer(index: int) -> int:
    """Where the tensor of that number is said to lie: no size or stride is as large."""
    return (index + 1) << 40


def entries(
    call: Call, dtype: torch.dtype, multiprocessor_count: int = MULTIPROCESSORS
) -> list[Launch]:
    """The entries that one call starts on a GPU like an A100, in order; its tensors are fake."""
    found: list[Launch] = []
    with FAKE, _gpu(multiprocessor_count), intercept(found.append), torch.no_grad():
        cuda.KERNELS[call.op](*_arguments(call, dtype))
    return found


def _arguments(call: Call, dtype: torch.dtype) -> list[Any]:
    if call.op != spatial_gate.name:
        return arguments(call, dtype)
    e, weight, bias, _, eps = arguments(replace(call, op="coordinate_attention"), dtype)
    return [e, weight, bias, eps, *arguments(replace(call, op="cross_spatial"), dtype)[5:]]


@contextlib.contextmanager
def _gpu(multiprocessor_count: int) -> Iterator[None]:
    """Let the host code see a GPU."""
    properties = SimpleNamespace(multi_processor_count=multiprocessor_count)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
        multiprocessors.cache_clear()
        try:
            yield
        finally:
            multiprocessors.cache_clear()


def dry(launches: Iterable[Launch]) -> list[KernelLaunch]:
    """The kernels that these entries start."""
    raw: list[tuple[str, str, str, tuple[Any, ...]]] = []
    for launch in launches:
        module = module_of(launch)
        pointers = {name: pointer(i) for i, name in enumerate(launch.buffers)}
        made = module.launch_dry(launch.entry, pointers, launch.integers, launch.reals)
        file = module.__file__ or ""
        raw += [(launch.entry, file, place, tuple(rest)) for _, place, *rest in made]
    names = _kernel_names({(file, place) for _, file, place, _ in raw})
    return [
        KernelLaunch(entry, names[file, place], grid, block, dynamic, tuple(parameters))
        for entry, file, place, (grid, block, dynamic, parameters) in raw
    ]


def file_of(made: KernelLaunch) -> str:
    """Stem of the file of `csrc/cuda` that holds the launch's kernel."""
    return file_of_entries()[made.entry.rpartition("_")[0]]


def _kernel_names(places: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(library, "@0x1f3a") → the kernel whose code is there."""
    names: dict[tuple[str, str], str] = {}
    for library in {library for library, _ in places}:
        offsets = sorted(place for file, place in places if file == library)
        command = ["addr2line", "-f", "-e", library, *(offset[1:] for offset in offsets)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        symbols = told.splitlines()[::2]
        names |= {
            (library, offset): short_name(symbol)
            for offset, symbol in zip(offsets, symbols, strict=True)
        }
    return names


def all_calls(ops: Iterable[str] | None = None) -> list[Call]:
    """Every op of the backend, or those named, in all modes and layouts."""
    wanted = list(cuda.KERNELS if ops is None else ops)
    gates = [Call(spatial_gate.name, training=False, layout=layout) for layout in LAYOUTS]
    stages = calls([op for op in wanted if op != spatial_gate.name], LAYOUTS)
    return [*stages, *(gates if spatial_gate.name in wanted else ())]


def all_launches(batches: Iterable[int] = BATCHES) -> list[KernelLaunch]:
    """Every kernel that an op starts at the paper's size, in all modes, dtypes and layouts."""
    return [
        made
        for batch in batches
        for call in all_calls()
        for dtype in DTYPES.values()
        for made in dry(entries(replace(call, batch=batch), dtype))
    ]


def dynamic_shared_bytes(launches: Iterable[KernelLaunch]) -> Mapping[str, int]:
    """Kernel → the most dynamic shared memory that a block of it is given."""
    most: dict[str, int] = {}
    for launch in launches:
        kernel = re.sub(r"\s+", " ", launch.kernel)
        most[kernel] = max(most.get(kernel, 0), launch.dynamic_shared_bytes)
    return most
