"""torch's FLOP counter sees the products of the ops, as many as it counts of the published form."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fused
from fused import FusedCIEMA, FusedMSFF
from fused.backends.reference.published import PublishedCIEMA, PublishedMSFF
from fused.contract import Problem, cost
from mobilesteelnet.model import MobileSteelNet


def counted(module: nn.Module, x: torch.Tensor | list[torch.Tensor], *, train: bool = False) -> int:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        out = module.train(train)(x)
        if train:
            out.sum().backward()
    total: int = counter.get_total_flops()
    return total


def test_ciema_counts_as_the_published_form() -> None:
    x = torch.randn(2, 32, 9, 7)
    published, block = PublishedCIEMA(32, 4, 4), FusedCIEMA(32, 4, 4)
    assert counted(block, x) == counted(published, x)
    # Everything needs a gradient, and some is computed again instead of being kept.
    whole = counted(block, x.clone().requires_grad_(), train=True)
    problem, ways = Problem(2, 32, 9, 7, 4, 4), ("forward", "backward")
    told = [
        cost(stage, problem, direction=way).flop for stage in block.fused_stages for way in ways
    ]
    assert whole == sum(told) > 3 * counted(block, x)


def test_fusion_counts_the_products_at_the_sizes_of_the_maps() -> None:
    maps = [torch.randn(2, 6, 8, 8), torch.randn(2, 10, 4, 4)]
    assert counted(FusedMSFF([6, 10]), maps) == 2 * 2 * 10 * (6 * 64 + 10 * 16)
    assert counted(PublishedMSFF([6, 10]), maps) == 2 * 2 * 10 * 16 * 64


def test_parts_of_the_network_are_counted_by_name() -> None:
    network, x = MobileSteelNet(width=0.125).eval(), torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
        network.spatial_gate(x)
    ops = counter.get_flop_counts()["Global"]
    for name in ("msff", "channel_interaction", "spatial_gate", "gated_fusion_mean"):
        assert ops[getattr(torch.ops.ciema, name)] > 0, name
    assert fused.flops.problem_of("coordinate_attention", {"e": x, "groups": 3}).groups == 3
