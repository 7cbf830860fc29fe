"""`fuse` and `from_module`: a block with the published keys, but a forward of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fused
from fused import FusedCIEMA, FusedMSFF
from fused.backends.reference.published import PublishedCIEMA, PublishedMSFF


class WithShortcut(PublishedCIEMA):
    """The published children, and the input added to their result."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class WithoutCrossing(PublishedCIEMA):
    """Inherits `forward`, and changes what it calls."""

    def _learn(
        self, x1: torch.Tensor, x2: torch.Tensor, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y1, _ = super()._learn(x1, x2, batch)
        return y1, y1


class Pooling(nn.Module):
    """One child called fusion_conv, of the published form, in a block that is no MSFF."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion_conv = PublishedMSFF([2, 3]).fusion_conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fusion_conv(x.mean((2, 3), keepdim=True))


class NearestMSFF(PublishedMSFF):
    """MSFF that repeats pixels in place of weighing them."""

    def forward(self, features: Iterable[torch.Tensor]) -> torch.Tensor:
        maps = list(features)
        size = maps[0].shape[2:]
        resized = [F.interpolate(m, size, mode="nearest") for m in maps]
        return self.fusion_conv(torch.cat(resized, 1))


class OwnMSFF(nn.Module):
    """The published MSFF in other words: three maps, and nothing said of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion_conv = PublishedMSFF([2, 3, 4]).fusion_conv

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        one, *others = features
        if len(others) != 2:
            raise ValueError("three maps are fused")
        resized = [F.interpolate(m, one.shape[2:], mode="bilinear") for m in others]
        return self.fusion_conv(torch.cat([one, *resized], 1))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (lambda: WithShortcut(24, 4, 4), "WithShortcut computes something else"),
        (lambda: WithoutCrossing(24, 4, 4), "WithoutCrossing computes something else"),
        (lambda: WithShortcut(24, 4, 4, dtype=torch.bfloat16), "computes something else"),
        (lambda: NearestMSFF([2, 3]), "NearestMSFF computes something else"),
        (Pooling, "Pooling does not take what the published block takes"),
    ],
)
def test_a_block_that_computes_something_else_is_refused(
    block: Callable[[], nn.Module], message: str
) -> None:
    model = nn.Sequential(block(), nn.Sequential(PublishedCIEMA(8, 2, 4)))
    model[1].eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        fused.fuse(model)
    assert model[0].training
    assert not model[1].training
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_block_of_another_class_that_computes_the_same_is_fused(dtype: torch.dtype) -> None:
    class Renamed(PublishedCIEMA):
        """Of a class of its own."""

    model = nn.Sequential(OwnMSFF(), Renamed(64, 2)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.3, 0.5)
    fused.fuse(model)
    assert type(model[0]) is FusedMSFF
    assert type(model[1]) is FusedCIEMA
    assert model[0].training
    assert model[1].training
    assert all(not b.count_nonzero() for n, b in model.named_buffers() if "tracked" in n)


def test_hooks_are_not_called_by_the_comparison() -> None:
    block, calls = WithShortcut(24, 4, 4), []
    block.conv3x3.register_forward_hook(lambda *_: calls.append(1))
    assert isinstance(fused.fuse(block), FusedCIEMA)
    assert not calls
