"""Running buffers after n calls at once against n calls of nn.BatchNorm2d one after another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused import FusedCIEMA, FusedMSFF
from fused.batchnorm import update_running_statistics


def test_an_average_of_uncounted_calls_stays_as_pytorchs_does() -> None:
    norm = nn.BatchNorm2d(3, momentum=None)
    norm.num_batches_tracked = None
    norm(torch.randn(2, 3, 4, 4))
    assert torch.equal(norm.running_mean, torch.zeros(3))
    update_running_statistics(norm, torch.ones(3), torch.ones(3), 8)
    assert torch.equal(norm.running_mean, torch.zeros(3))


@pytest.mark.parametrize("momentum", [0.1, 0.37, 1.0, 0.0, None])
@pytest.mark.parametrize("history", [0, 3])
@pytest.mark.parametrize("calls", [1, 2, 7])
def test_equals_the_sequence_of_calls(momentum: float | None, history: int, calls: int) -> None:
    eager = nn.BatchNorm2d(5, momentum=momentum).double()
    ours = nn.BatchNorm2d(5, momentum=momentum).double()
    for _ in range(history):
        eager(torch.randn(2, 5, 3, 3).double())
    ours.load_state_dict(eager.state_dict())
    batches = torch.randn(calls, 4, 5, 3, 2).double() * 2 + 1
    for batch in batches:
        eager(batch)
    mean = batches.mean((1, 3, 4))
    var = batches.var((1, 3, 4), correction=0)
    update_running_statistics(ours, mean, var, 4 * 3 * 2)
    for key, want in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], want, msg=key)


def test_without_running_statistics_nothing_happens() -> None:
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    update_running_statistics(norm, torch.ones(1, 3), torch.ones(1, 3), 8)
    assert norm.running_mean is None


def test_half_precision_buffers_are_computed_in_float32() -> None:
    norm = nn.BatchNorm2d(3).bfloat16()
    update_running_statistics(norm, torch.full((40, 3), 1.5), torch.ones(40, 3), 8)
    want = 1.5 * (1 - 0.9**40)
    assert norm.running_mean.dtype == torch.bfloat16
    assert norm.running_mean[0].item() == pytest.approx(want, rel=1 / 256)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_training_step_between_leaves_an_evaluations_gradients(backend: str | None) -> None:
    """As in distillation: a forward in evaluation, one in training, then both backward."""
    torch.manual_seed(0)
    model = nn.Sequential(FusedCIEMA(16, 4, backend=backend), FusedCIEMA(16, 2, backend=backend))
    msff = FusedMSFF([6, 10], 16, backend=backend)
    maps = [torch.randn(2, c, 6, 6, requires_grad=True) for c in (6, 10)]
    both = nn.ModuleList([model, msff]).eval()
    buffers = {name: buffer.clone() for name, buffer in both.named_buffers()}
    want = torch.autograd.grad(msff_then(model, msff, maps).square().sum(), maps)
    evaluated = msff_then(model, msff, maps)
    both.train()
    msff_then(model, msff, maps)
    assert not all(torch.equal(buffers[name], buffer) for name, buffer in both.named_buffers())
    got = torch.autograd.grad(evaluated.square().sum(), maps)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def msff_then(model: nn.Module, msff: FusedMSFF, maps: list[torch.Tensor]) -> torch.Tensor:
    """The network's middle: fused maps, then two attention blocks."""
    return model(msff(maps))
