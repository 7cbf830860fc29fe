"""Clocks and CUDA graphs of the GPU timings, on stand-ins for what a GPU would do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import gpu_clock


def test_timings_are_medians_with_their_spread() -> None:
    timing = gpu_clock.timing_of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.ms, timing.low, timing.high, timing.rounds) == (3.5, 2.0, 5.0, 6)
    assert gpu_clock.timing_of([2.0]) == gpu_clock.Timing(2.0, 2.0, 2.0, 1)
    assert gpu_clock.rounds_for(10.0) == gpu_clock.MIN_ROUNDS
    assert gpu_clock.rounds_for(0.0) == gpu_clock.MAX_ROUNDS
    calls: list[int] = []
    timing = gpu_clock.HostClock().measure(lambda: (calls.append(1), time.sleep(0.02)))
    assert timing.ms >= 20
    assert len(calls) == 1 + timing.rounds


# ----------------------------------------------------------------------------------- a stand-in GPU


class Gpu:
    """A device whose calls run at once, on CPU memory; time passes only when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.allocated, self.peak = 0.0, 0, 0
        self.captured: Callable[[], None] | None = None
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        class Stream:
            def wait_stream(self, other: Any) -> None:
                pass

        class Graph:
            def replay(self) -> None:
                assert gpu.captured is not None
                gpu.captured()

        empty = torch.empty

        def on_cpu(*shape: int, device: str, **options: Any) -> torch.Tensor:
            return empty(*shape, **options)

        cuda = {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "stream": lambda stream: contextlib.nullcontext(),
            "graph": lambda graph: contextlib.nullcontext(),
            "current_stream": Stream,
            "current_device": lambda: 0,
            "get_device_properties": lambda index: type("P", (), {"L2_cache_size": 16})(),
            "synchronize": lambda: None,
            "memory_allocated": lambda: gpu.allocated,
            "max_memory_allocated": lambda: gpu.peak,
            "reset_peak_memory_stats": lambda: setattr(gpu, "peak", gpu.allocated),
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", on_cpu)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with monkeypatch.context() as patch:
        yield Gpu(patch)


def test_the_gpu_clock_times_each_call_behind_a_cold_cache(gpu: Gpu) -> None:
    clock = gpu_clock.clock_for("cuda")
    calls: list[int] = []

    def call() -> None:
        clock._flush.fill_(1)  # type: ignore[attr-defined]
        calls.append(int(clock._flush.sum()))  # type: ignore[attr-defined]
        gpu.now += 30.0

    timing = clock.measure(call)
    assert (timing.ms, timing.rounds) == (30.0, gpu_clock.MIN_ROUNDS)
    assert len(calls) == gpu_clock.WARM_ROUNDS + timing.rounds
    assert int(clock._flush.numel()) == 4 * 16  # type: ignore[attr-defined]


def test_peak_memory_is_what_one_call_adds(gpu: Gpu) -> None:
    gpu.allocated, gpu.peak = 100, 5000

    def call() -> None:
        gpu.peak = max(gpu.peak, gpu.allocated + 70)

    assert gpu_clock.clock_for("cuda").peak_bytes(call) == 70


@pytest.mark.parametrize("replayed", [1.0, 2.0, None])
def test_a_graph_counts_only_if_its_replay_gives_the_same_bits(
    gpu: Gpu, replayed: float | None
) -> None:
    outputs: list[torch.Tensor] = []

    def call() -> list[torch.Tensor]:
        outputs.append(torch.ones(3))
        return [outputs[-1]]

    def replay() -> None:
        if replayed is not None:  # else nothing is written, and the poison stays
            outputs[-1].fill_(replayed)

    gpu.captured = replay
    if replayed == 1.0:
        gpu_clock.graphed(call)()
        assert len(outputs) == gpu_clock.WARM_ROUNDS + 1
    else:
        with pytest.raises(gpu_clock.GraphError, match="differs from eager in tensor 0"):
            gpu_clock.graphed(call)
