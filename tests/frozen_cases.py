"""What the tests of frozen models share: small calibrated models, and the comparison."""

from __future__ import annotations

import copy
from typing import Any

import torch
from stage_cases import error, tolerance
from torch import nn

from fused import FusedCIEMA, FusedMSFF, optimize_for_inference
from mobilesteelnet.model import MobileSteelNet

NARROW = 0.125
HALVES = (torch.bfloat16, torch.float16)


def calibrated(module: nn.Module) -> nn.Module:
    """In evaluation mode, with batch norms that are far from the identity."""
    for child in module.modules():
        if isinstance(child, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.bias, 0, 0.3)
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_(0, 0.3)
            child.running_var.uniform_(0.5, 2)
    return module.eval()


def network(**options: Any) -> MobileSteelNet:
    return calibrated(MobileSteelNet(**{"width": NARROW, **options}))


def ciema() -> FusedCIEMA:
    return calibrated(FusedCIEMA(24, 4, 4))


def in_float64(module: nn.Module, x: Any) -> torch.Tensor:
    twin = copy.deepcopy(module).double()
    for block in twin.modules():
        if isinstance(block, (FusedCIEMA, FusedMSFF)):
            block.backend = "reference"
    with torch.no_grad():
        return twin([m.double() for m in x] if isinstance(x, list) else x.double())


def agrees(module: nn.Module, x: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """The frozen form of `module`, after its result for x was compared with float64."""
    frozen = optimize_for_inference(module, dtype)
    got = frozen(x)
    first = x[0] if isinstance(x, list) else x
    assert got.dtype == first.dtype
    allowed = tolerance(dtype or first.dtype)[0]
    assert error(got, in_float64(module, x)) <= allowed
    return frozen
