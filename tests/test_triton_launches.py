"""How many kernels a GPU would launch for a whole CIEMA: ours, and those of torch's operations.

The launchers run on the CPU with launches counted and not made, so the numbers in between are
garbage and only their count is looked at.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused.modules
from fused import FusedCIEMA, backends
from fused.backends import triton as backend

pytest.importorskip("triton")
if backend.INTERPRETER:
    pytest.skip("the interpreter is on: these launches are not made", allow_module_level=True)

from fused.backends.triton import launch

EVALUATION_BUDGET, TRAINING_BUDGET = 7, 40
# Autograd adds the three gradients of e; these two come on top of the kernels' budget.
SUMS_OF_GRADIENTS = 2
# Allocations, and operations that give another view; neither launches anything.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "detach", "lift_fresh", "is_same_size"),
}
SIZES = [(1, 64, 8, 7), (8, 128, 32, 9)]  # B, C, G, H = W: few slabs and many


class Tally(TorchDispatchMode):
    """Counts the operations that would launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None
    ) -> Any:
        # Inside an op composite operations arrive whole: `contiguous` would look like a view.
        with self:
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        name = func.overloadpacket.__name__
        if func.namespace != "ciema" and not func.is_view and name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Launches:
    """What one pass launched: our kernels, torch's operations, and the buffers' bookkeeping."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.operations = Tally()
        self.bookkeeping = Tally()

    def total(self) -> int:
        return self.kernels.total() + self.operations.counts.total()

    def __str__(self) -> str:
        return "\n".join(
            f"{what}: {counts.total()} {dict(counts)}"
            for what, counts in (
                ("kernels", self.kernels),
                ("operations of torch", self.operations.counts),
                ("bookkeeping of buffers", self.bookkeeping.counts),
            )
        )


def counted(kernel: Callable[..., Any], operations: Tally) -> Callable[..., Any]:
    """A launcher whose operations count: an op hides from the mode around it what it calls."""

    def run(*args: Any) -> Any:
        with operations:
            return kernel(*args)

    return run


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Launches from here on; backend="triton" accepts the CPU's tensors."""
    found = Launches()
    kernels = {op: counted(run, found.operations) for op, run in backend.KERNELS.items()}
    willing = dataclasses.replace(
        backend.BACKEND, kernels=kernels, can_run=lambda op, x: None, passed_over=lambda op, x: None
    )
    monkeypatch.setitem(backends.BACKENDS, "triton", willing)
    update = fused.modules.update_running_statistics

    def bookkeeping(*args: Any) -> None:
        before = found.operations.counts.copy()
        with found.bookkeeping:
            update(*args)
        found.operations.counts = before

    monkeypatch.setattr(fused.modules, "update_running_statistics", bookkeeping)
    with launch.intercept(lambda one: found.kernels.update([one.name])):
        yield found


def block(size: tuple[int, int, int, int], **options: Any) -> tuple[FusedCIEMA, torch.Tensor]:
    batch, channels, groups, side = size
    module = FusedCIEMA(channels, groups, backend="triton", **options)
    return module, torch.randn(batch, channels, side, side)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_evaluation_stays_within_its_launches(
    launches: Launches, size: tuple[int, int, int, int], layout: torch.memory_format
) -> None:
    module, x = block(size)
    module.half().eval()
    x = x.half().contiguous(memory_format=layout)
    with torch.no_grad(), launches.operations:
        module(x)
    print(launches)
    assert launches.kernels.total() > 0
    assert launches.total() <= EVALUATION_BUDGET, str(launches)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_means_of_evaluation_take_one_launch_more_and_spare_the_heads_own(
    launches: Launches, size: tuple[int, int, int, int]
) -> None:
    module, x = block(size)
    module.half().eval()
    x = x.half()
    known = (x[:, :, 0, 0].float(), x[:, :, 0, 0].float(), torch.zeros(x.shape[:2]).long())
    with torch.no_grad(), launches.operations:
        module.mean_after(module.interact(x, known))
    print(launches)
    assert launches.kernels["gated_fusion_mean_kernel"] == 1
    assert launches.total() <= EVALUATION_BUDGET + 1, str(launches)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bn_statistics", ["sequential", "pooled"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_training_step_stays_within_its_launches(
    launches: Launches,
    size: tuple[int, int, int, int],
    bn_statistics: str,
    layout: torch.memory_format,
) -> None:
    module, x = block(size, bn_statistics=bn_statistics)
    x = x.half().contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn_like(x)
    with launches.operations:
        module(x).backward(grad)
    print(launches)
    assert 0 < launches.kernels.total() <= TRAINING_BUDGET, str(launches)
    assert launches.operations.counts == {"add": SUMS_OF_GRADIENTS}, str(launches)


def test_frozen_statistics_stay_within_the_launches_of_training(launches: Launches) -> None:
    module, x = block(SIZES[0])
    module.eval()
    x = x.half().requires_grad_()
    grad = torch.randn_like(x)
    with launches.operations:
        module(x).backward(grad)
    print(launches)
    assert launches.total() <= TRAINING_BUDGET, str(launches)


def test_the_paper_size_needs_no_more_on_any_gpu() -> None:
    from benchmarks.triton_capture import Call, capture
    from benchmarks.triton_compile import TARGETS

    def kernels(training: bool, backward: bool, batch: int) -> int:
        ops = [f"{op}_backward" if backward else op for op in FusedCIEMA.fused_stages]
        calls = [Call(op, training, batch=batch) for op in ops]
        return sum(len(capture(call, torch.float16, target)) for call in calls)

    for target in TARGETS.values():
        for batch in (1, 8):
            assert kernels(False, False, batch) <= EVALUATION_BUDGET, target
            step = kernels(True, False, batch) + kernels(True, True, batch)
            assert step <= TRAINING_BUDGET, target


def test_what_a_launcher_calls_of_torch_is_counted(launches: Launches) -> None:
    def wasteful(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value = torch.zeros(x.shape[:2])
        transposed = value.t().contiguous().t()
        return value, transposed, value.contiguous().long()

    kernels: Any = backends.BACKENDS["triton"].kernels
    kernels["channel_statistics"] = counted(wasteful, launches.operations)
    x = torch.ones(2, 4, 2, 2)
    with launches.operations:
        fused.ops.channel_statistics(x, backend="triton")
    assert launches.operations.counts == {"zeros": 1, "clone": 1, "_to_copy": 1}


def test_the_tally_sees_what_launches_and_nothing_else() -> None:
    x = torch.ones(4, 6)
    with Tally() as tally:
        y = x.t()[1:].reshape(-1)  # a view of a view, and a copy
        torch.empty(3).copy_(y[:3])
        y.sum()
    assert tally.counts == {"clone": 1, "copy_": 1, "sum": 1}
