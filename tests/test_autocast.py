"""FusedCIEMA and FusedMSFF under autocast: dtypes, and what must not be rounded first."""

from __future__ import annotations

import copy

import pytest
import torch
from stage_cases import DEVICES, error

from fused import FusedCIEMA, FusedMSFF
from fused.backends.reference.published import PublishedCIEMA


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_finds_the_maximum_of_the_map_as_it_is(
    backend: str | None, dtype: torch.dtype, device: str
) -> None:
    """Two pixels that tie when they are rounded: the gradient belongs to the larger one."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 14, 14)
    x[:, :, 9, 9] = x.amax((2, 3)) + 1
    x[:, :, 2, 3] = x[:, :, 9, 9] * (1 - 1e-5)
    published = PublishedCIEMA(64, 32, 4).eval()
    block = FusedCIEMA(64, 32, 4, backend=backend).eval()
    block.load_state_dict(published.state_dict())
    gradients = []
    for module, kind in ((block.to(device), x.dtype), (published.double(), torch.float64)):
        leaf = x.to(device if module is block else "cpu", kind, copy=True).requires_grad_()
        with torch.autocast(device, dtype, enabled=module is block):
            out = module(leaf)
        (out.double() * x.to(out.device)).sum().backward()
        gradients.append(leaf.grad.cpu())
    assert error(*gradients) < {torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains_with_float32_parameters(dtype: torch.dtype, device: str) -> None:
    block = FusedCIEMA(24, 4, 4).to(device)
    x = torch.randn(2, 24, 5, 6).to(device).requires_grad_()
    with torch.autocast(device, dtype):
        out = block(x)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())
    assert block.final_fusion[1].running_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_called_children_give_autocasts_dtype_as_the_ops_do(dtype: torch.dtype) -> None:
    ciema, msff = FusedCIEMA(24, 4, 4).eval(), FusedMSFF([3, 5], 4).eval()
    x, maps = torch.randn(2, 24, 5, 6), [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    for hooked in (False, True):
        if hooked:
            for layer in (ciema.conv3x3, msff.fusion_conv[0]):
                layer.register_forward_hook(lambda *_: None)
        with torch.autocast("cpu", dtype):
            results = (ciema(x), ciema.spatial_gate(x), msff(maps))
        assert [out.dtype for out in results] == [dtype] * 3
    twin = copy.deepcopy(ciema).double()
    with torch.autocast("cpu", dtype):
        assert twin(x.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_running_statistics_are_as_near_as_the_goals_ask(
    backend: str | None, dtype: torch.dtype
) -> None:
    """Means are small beside what is added up for them, and weights are rounded."""
    torch.manual_seed(2)
    published = PublishedCIEMA(64, 4)
    block = FusedCIEMA(64, 4, backend=backend)
    block.load_state_dict(published.state_dict())
    x = torch.randn(2, 64, 14, 14)
    published.double()(x.double())
    with torch.autocast("cpu", dtype):
        block(x)
    for name, wanted in published.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            limit = {torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]
            assert (block.get_buffer(name) - wanted).norm() <= limit * wanted.norm(), name
