"""Clocks, memory and CUDA graphs: how one call is measured on a GPU, and on a CPU for tests."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .memory import peak_of

Call = Callable[[], Sequence[torch.Tensor]]
SECONDS = 0.15  # of timed calls a row, where the rounds below do not decide
MIN_ROUNDS, MAX_ROUNDS = 5, 200
WARM_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, and where a fifth of the rounds lies outside."""

    ms: float
    low: float
    high: float
    rounds: int


def timing_of(milliseconds: Sequence[float]) -> Timing:
    """Median, 20 % and 80 % of the rounds."""
    if len(milliseconds) == 1:
        (only,) = milliseconds
        return Timing(only, only, only, 1)
    fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Timing(statistics.median(milliseconds), fifths[0], fifths[-1], len(milliseconds))


class Clock(Protocol):
    """What a row is measured with."""

    def measure(self, call: Callable[[], object]) -> Timing:
        """Time a call."""

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Memory that one call adds at its peak, its results included."""


def rounds_for(seconds: float) -> int:
    """Rounds of a call that takes `seconds`."""
    return min(max(round(SECONDS / max(seconds, 1e-7)), MIN_ROUNDS), MAX_ROUNDS)


class HostClock:
    """For a CPU: the wall clock, and the growth of resident memory."""

    def measure(self, call: Callable[[], object]) -> Timing:
        """Time a call."""
        first = self._once(call)
        return timing_of([self._once(call) for _ in range(rounds_for(1e-3 * first))])

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Memory that one call adds at its peak, its results included."""
        return peak_of(call)

    @staticmethod
    def _once(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)


class CudaClock:
    """For a GPU: events around each call, the second-level cache overwritten before it."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        cache = getattr(properties, "L2_cache_size", 0) or 64 * 2**20
        self._flush = torch.empty(4 * cache, dtype=torch.int8, device="cuda")

    def measure(self, call: Callable[[], object]) -> Timing:
        """Time a call; the host runs ahead, so short kernels do not wait for it."""
        for _ in range(WARM_ROUNDS - 1):
            call()
        torch.cuda.synchronize()
        (first,) = self._rounds(call, 1)
        return timing_of(self._rounds(call, rounds_for(1e-3 * first)))

    def _rounds(self, call: Callable[[], object], count: int) -> list[float]:
        marks = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(count)
        ]
        for start, end in marks:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Memory that one call adds at its peak, its results included."""
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before


def clock_for(device: str) -> Clock:
    """The clock of a device."""
    return CudaClock() if device == "cuda" else HostClock()


class GraphError(RuntimeError):
    """A replayed graph gave something else than the calls that it was captured from."""


def graphed(call: Call) -> Callable[[], object]:
    """Capture a call into a CUDA graph; the replay, after it gave the same bits as the call.

    Raises:
        GraphError: the replay differs.
        RuntimeError: the call cannot be captured, in CUDA's words.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_ROUNDS):
            want = call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for tensor in got:
        tensor.fill_(0 if tensor.dtype == torch.int64 else float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for index, (replayed, eager) in enumerate(zip(got, want, strict=True)):
        if not torch.equal(replayed, eager):
            raise GraphError(f"replay of the captured graph differs from eager in tensor {index}")

    def replay(keep: Sequence[torch.Tensor] = got) -> None:
        graph.replay()

    return replay
