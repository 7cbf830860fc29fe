"""One emulated device: buffers, launches, and what the checkers and counters say afterwards."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

ORDERS = ("forward", "reverse", "shuffled", "interleaved")


@dataclass(frozen=True)
class Report:
    """What a session found.

    Attributes:
        findings: ``"kind: text"`` for each kind and place, with the number of occurrences.
        totals: counters: ``{global,shared}_{read,write,atomic}_{bytes,requests,units,ideal_units}``
            (a unit is a 32-byte sector of global memory or a wavefront of shared memory, ideal is
            what the same bytes need at best), ``launches``, ``barriers``, ``warp_operations``,
            a warp's ``mma_{float16,bfloat16,tf32}`` and ``ldmatrix``, a thread's ``copy_async``,
            ``copy_async_bytes``; events that did not occur have no entry.
        sites: the same counters for each place in the kernel.
    """

    findings: list[str]
    totals: dict[str, int]
    sites: list[dict[str, Any]]

    @property
    def kinds(self) -> set[str]:
        """The kinds of the findings, as ``{"race"}``."""
        return {finding.split(":")[0] for finding in self.findings}


class Session:
    """A fresh device in one build of the emulator; one at a time for each build.

    Args:
        module: from ``build``.
        order: in which threads and blocks run, one of ``ORDERS``.
        seed: of the order ``shuffled``.
    """

    def __init__(self, module: ModuleType, order: str = "forward", seed: int = 0) -> None:
        self._module = module
        self._results: list[tuple[int, torch.Tensor]] = []
        self._addresses: set[int] = set()
        module.configure(order, seed)

    def input(self, name: str, data: torch.Tensor | np.ndarray) -> int:
        """The device address of a read-only copy of ``data``."""
        return self._allocate(name, data, "input")

    def output(self, name: str, data: torch.Tensor | np.ndarray) -> int:
        """The address of uninitialised memory (NaNs), copied to ``data`` by ``finish``."""
        return self._allocate(name, data, "output")

    def inout(self, name: str, data: torch.Tensor | np.ndarray) -> int:
        """The address of a copy of ``data``, copied back by ``finish``."""
        return self._allocate(name, data, "inout")

    def scratch(self, name: str, data: torch.Tensor | np.ndarray) -> int:
        """As ``output``, but kernels need not write all of it."""
        return self._allocate(name, data, "scratch")

    def launch(
        self, entry: str, *, reals: Mapping[str, float] | None = None, **numbers: int
    ) -> None:
        """Runs an entry of the kernel file.

        Args:
            entry: its name.
            reals: numbers with a fraction, by name.
            **numbers: integers by name, and the addresses of buffers under theirs.
        """
        addresses = {name: n for name, n in numbers.items() if n in self._addresses}
        integers = {name: int(n) for name, n in numbers.items() if name not in addresses}
        self._module.launch(entry, addresses, integers, dict(reals or {}))

    def finish(self) -> Report:
        """Copies outputs back, frees the device's memory and reports."""
        for address, tensor in self._results:
            span, inside = _span(tensor)
            stored = np.frombuffer(self._module.read(address), np.uint8).copy()
            device = torch.from_numpy(stored).view(tensor.dtype)
            span[inside] = device[inside]
        self._results.clear()
        raw, sites = self._module.findings(), self._module.sites()
        names = _source_lines(self._module.__file__ or "", [text for _, text, _ in raw], sites)
        findings = [
            f"{kind}: {_named(text, names)}" + (f" [{count} times]" if count > 1 else "")
            for kind, text, count in raw
        ]
        sites = [{**site, "site": _named(site["site"], names)} for site in sites]
        totals = dict(self._module.totals())
        self._module.configure("forward", 0)
        return Report(findings, totals, sites)

    def _allocate(self, name: str, data: torch.Tensor | np.ndarray, role: str) -> int:
        tensor = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; the emulator takes CPU tensors")
        if tensor.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: nothing to allocate")
        span, inside = _span(tensor)
        content = span.clone().view(torch.uint8).numpy().tobytes()
        address = self._module.allocate(
            name,
            content if role in ("input", "inout") else b"\xff" * len(content),
            inside.to(torch.uint8).numpy().tobytes(),
            tensor.element_size(),
            role,
            # As if the storage came from the GPU's allocator, which aligns to 256 bytes and more.
            tensor.storage_offset() * tensor.element_size() % 256,
        )
        if role != "input":
            self._results.append((address, tensor))
        self._addresses.add(int(address))
        return int(address)


def _span(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The storage from a tensor's first to its last element, and which of it is the tensor's."""
    tensor = tensor.detach()
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    span = torch.as_strided(tensor, (last + 1,), (1,), tensor.storage_offset())
    inside = torch.zeros(last + 1, dtype=torch.bool)
    torch.as_strided(inside, tensor.shape, tensor.stride()).fill_(True)
    return span, inside


# Of a library, what addr2line has said once.
_known_lines: dict[str, dict[str, str]] = {}


def _source_lines(library: str, texts: list[str], sites: list[dict[str, Any]]) -> dict[str, str]:
    """``{"@0x1f3a": "kernel.cuh:42"}`` for all offsets in the texts."""
    known = _known_lines.setdefault(library, {})
    everything = " ".join([*texts, *(site["site"] for site in sites)])
    offsets = sorted({f"@{offset}" for offset in re.findall(r"@(0x[0-9a-f]+)", everything)})
    if not set(offsets) <= known.keys():
        known |= {offset: offset for offset in offsets} | _addr2line(library, offsets)
    return known


def _addr2line(library: str, offsets: list[str]) -> dict[str, str]:
    command = ["addr2line", "-a", "-i", "-e", library, *(offset[1:] for offset in offsets)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names: dict[str, str] = {}
    inner: dict[str, str] = {}
    offset = ""
    for line in output.splitlines():
        if line.startswith("0x"):
            offset = f"@{int(line, 16):#x}"
            continue
        file, _, number = line.partition(":")
        file = os.path.normpath(file)
        # Inlined callees come before callers. Not the emulator's own frames, and those of the
        # instructions only if there is no other.
        if re.search(r"csrc/emulator/[^/]+$|^/usr", file):
            continue
        found = inner if re.search(r"csrc/cuda/(fragments|ptx)\.cuh$", file) else names
        found.setdefault(offset, f"{file.rpartition('/')[2]}:{number.split(' ')[0]}")
    return inner | names


def _named(text: str, names: dict[str, str]) -> str:
    return re.sub(r"@0x[0-9a-f]+", lambda match: names.get(match[0], match[0]), text)
