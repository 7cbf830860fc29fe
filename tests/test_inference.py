"""optimize_for_inference: the frozen form gives the unfrozen one's results."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import shared_path
from frozen_cases import HALVES, NARROW, agrees, calibrated, ciema, in_float64, network
from stage_cases import DEVICES, error, tolerance
from test_golden import CASES, build, golden_weights
from torch import nn

import fused
from fused import FrozenError, FusedCIEMA, FusedMSFF, optimize_for_inference
from fused.backends.reference.published import PublishedCIEMA, PublishedMSFF
from fused.frozen import FrozenCIEMA, FrozenMSFF
from mobilesteelnet.frozen import FrozenMobileSteelNet

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------------------------- same results


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 64, 64), (3, 57, 63), (1, 7, 30), (2, 1, 1)])
@pytest.mark.parametrize("activation", [None, "relu", "relu-output"])
def test_network(activation: str | None, size: tuple[int, ...], layout: Any) -> None:
    batch, height, width = size
    images = torch.randn(batch, 3, height, width).contiguous(memory_format=layout)
    frozen = agrees(network(activation=activation), images)
    assert type(frozen) is FrozenMobileSteelNet
    assert frozen.config["activation"] == activation


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("width", [NARROW, 0.3])
def test_network_dtypes(width: float, dtype: torch.dtype | None) -> None:
    agrees(network(width=width), torch.randn(2, 3, 45, 64), dtype)


@pytest.mark.parametrize("options", [{"attention": "none"}, {"fusion": "none"}, {"in_channels": 1}])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_network_forms(dtype: torch.dtype | None, options: dict[str, Any]) -> None:
    images = torch.randn(2, options.get("in_channels", 3), 40, 48)
    agrees(network(**options), images, dtype)
    both = {"attention": "none", "fusion": "none", **options}
    agrees(network(**both), images, dtype)


def test_a_strided_and_half_input_comes_back_in_its_dtype() -> None:
    model = network()
    images = torch.randn(2, 3, 64, 96)[:, :, ::2, 3:60:2]
    frozen = agrees(model, images)
    for dtype in (*HALVES, torch.float64):
        cast = images.to(dtype)
        got = frozen(cast)
        assert got.dtype == dtype
        want = in_float64(model, cast)
        assert error(got, want) <= tolerance(torch.float32 if dtype == torch.float64 else dtype)[0]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_model_is_kept_or_converted(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    images = torch.randn(2, 3, 32, 32)
    want = in_float64(model, images)
    assert error(optimize_for_inference(model)(images), want) <= tolerance(dtype)[0]
    other = HALVES[HALVES[0] == dtype]
    for asked, allowed in ((torch.float32, 1e-5), (torch.float64, 1e-6), (other, 2e-2)):
        assert error(optimize_for_inference(model, asked)(images), want) <= allowed


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [None, torch.float64, *HALVES])
@pytest.mark.parametrize("device", DEVICES)
def test_ciema(device: str, dtype: torch.dtype | None, layout: Any) -> None:
    x = torch.randn(2, 24, 9, 7, device=device).contiguous(memory_format=layout)
    block = ciema().to(device)
    frozen = agrees(block, x, dtype)
    assert type(frozen) is FrozenCIEMA
    assert frozen(x).is_contiguous(memory_format=layout)
    with torch.no_grad():
        gate = copy.deepcopy(block).double().spatial_gate(x.double())
        allowed = tolerance(dtype or torch.float32)[0]
        assert error(frozen.spatial_gate(x), gate) <= allowed
        assert (
            error(frozen.mean_after(frozen.interact(x)), in_float64(block, x).mean((2, 3)))
            <= allowed
        )


@pytest.mark.parametrize("dtype", [None, torch.float64, *HALVES])
@pytest.mark.parametrize("device", DEVICES)
def test_msff(device: str, dtype: torch.dtype | None) -> None:
    sizes = ((4, 9, 7), (6, 5, 7), (8, 2, 2))
    maps = [torch.randn(2, *size, device=device) for size in sizes]
    frozen = agrees(calibrated(FusedMSFF([4, 6, 8], 5)).to(device), maps, dtype)
    assert type(frozen) is FrozenMSFF


def test_plain_torch_where_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fused.backends.cpu.LIBRARY.__class__("cpu", None, "not there")
    monkeypatch.setattr(fused.backends.cpu, "LIBRARY", broken)
    model, images = network(activation="relu"), torch.randn(2, 3, 45, 64)
    for dtype in (None, torch.bfloat16):
        frozen = agrees(model, images, dtype)
    assert "not there" in str(fused.explain(frozen))


def test_the_reference_is_used_when_it_is_asked_for() -> None:
    frozen = agrees(network(backend="reference"), torch.randn(2, 3, 45, 64))
    assert set(fused.explain(frozen).chosen().values()) == {"reference"}
    assert type(frozen._plan().stem).__name__ == "Stem"


@pytest.mark.skipif(not CASES, reason="shared/golden is not beside the project")
@pytest.mark.parametrize("name", [case["file"] for case in CASES])
def test_golden(name: str) -> None:
    """The published modules' numbers, for inputs and weights that anyone can rebuild."""
    (case,) = (c for c in CASES if c["file"] == name)
    weights = golden_weights()
    module = build(case, "auto").eval()
    module.load_state_dict(weights.fill(module.state_dict(), case["seed"]), strict=True)
    inputs = [weights.draw(s, case["seed"] + 1 + i) for i, s in enumerate(case["inputs"])]
    inputs = [x.float() for x in inputs]
    from safetensors.torch import load_file

    want = load_file(shared_path("golden", case["file"]))
    key = "eval.out" if "eval.out" in want else "eval.out#every97"
    for dtype in (torch.float32, torch.bfloat16):
        out = optimize_for_inference(module, dtype)(inputs if case["kind"] == "msff" else inputs[0])
        got = out.flatten()[::97] if key.endswith("97") else out
        assert error(got.reshape(want[key].shape), want[key]) <= tolerance(dtype)[0]


# ------------------------------------------------------------------------------ models around it


class Wrapped(nn.Module):
    """Somebody's model: own layers, a block twice, a list input."""

    def __init__(self, kinds: tuple[type, type]) -> None:
        super().__init__()
        ciema, msff = kinds
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fusion = msff([8, 3], 8)
        self.attention = nn.ModuleList([ciema(8, 2, 4)])
        self.again = self.attention[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention[0](self.fusion([self.stem(x), x[:, :, ::2, ::2]]))
        return self.again(y).mean((2, 3))


@pytest.mark.parametrize("kinds", [(FusedCIEMA, FusedMSFF), (PublishedCIEMA, PublishedMSFF)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_blocks_inside_any_model(dtype: torch.dtype | None, kinds: tuple[type, type]) -> None:
    model = calibrated(Wrapped(kinds))
    frozen = agrees(model, torch.randn(2, 3, 12, 10), dtype)
    assert type(frozen.again) is FrozenCIEMA
    assert frozen.again is frozen.attention[0]
    assert type(frozen.fusion) is FrozenMSFF
    assert list(frozen.state_dict()) == list(model.state_dict())
    for module in (frozen, frozen.stem, frozen.attention):
        with pytest.raises(FrozenError, match="cannot be trained"):
            module.train()
        with pytest.raises(FrozenError, match="cannot be trained"):
            module.requires_grad_()
    assert not any(module.training for module in frozen.modules())
    assert frozen.eval() is frozen
    assert type(model.again) is kinds[0]


def test_a_network_inside_a_model() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).softmax(1)

    frozen = agrees(Holder().eval(), torch.randn(1, 3, 32, 32))
    assert type(frozen.net) is FrozenMobileSteelNet


def _hook_inside(model: Any) -> None:
    model.ciema.conv3x3.register_forward_hook(lambda module, args, out: 2 * out)


def _hook_on_the_block(model: Any) -> None:
    model.ciema.register_forward_hook(lambda module, args, out: out + 1)


def _hook_in_the_backbone(model: Any) -> None:
    model.stage1[0].pointwise.register_forward_hook(lambda module, args, out: 2 * out)


def _sync_batch_norm(model: Any) -> None:
    model.initial_conv[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model.initial_conv[1])


def _biased(model: Any) -> None:
    layer = model.stage1[0].depthwise
    layer.bias = nn.Parameter(torch.randn(layer.out_channels))


def _group_norm(model: Any) -> None:
    model.stage2[1].bn = nn.GroupNorm(2, model.stage2[1].bn.num_features).eval()


def _overridden(model: Any) -> None:
    class Doubled(FusedCIEMA):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.ciema.__class__ = Doubled


EXOTIC: dict[str, tuple[Callable[[Any], None], str, tuple[type, type]]] = {
    "hook inside": (_hook_inside, "conv3x3 has hooks", (FusedCIEMA, FrozenMSFF)),
    "hook on the block": (_hook_on_the_block, "ciema has hooks", (FusedCIEMA, FrozenMSFF)),
    "hook in the backbone": (_hook_in_the_backbone, "has hooks", (FrozenCIEMA, FrozenMSFF)),
    "SyncBatchNorm": (_sync_batch_norm, "SyncBatchNorm", (FrozenCIEMA, FrozenMSFF)),
    "bias": (_biased, "stage1.0.depthwise has a bias", (FrozenCIEMA, FrozenMSFF)),
    "GroupNorm": (_group_norm, "stage2.1.bn is a GroupNorm", (FrozenCIEMA, FrozenMSFF)),
    "subclass": (_overridden, "is a Doubled", (FusedCIEMA, FrozenMSFF)),
}


@pytest.mark.parametrize("name", EXOTIC)
def test_what_has_to_be_called_stays_and_is_said(name: str, caplog: Any) -> None:
    change, reason, kinds = EXOTIC[name]
    model = network()
    change(model)
    with caplog.at_level(logging.WARNING, "fused"):
        frozen = agrees(model, torch.randn(1, 3, 32, 32))
    assert reason in caplog.text
    assert isinstance(frozen.ciema, kinds[0])
    assert isinstance(frozen.msff, kinds[1])
    with pytest.raises(FrozenError):
        frozen.train()


def test_explain_tells_of_the_frozen_form() -> None:
    frozen = optimize_for_inference(network())
    lines = [line for line in fused.explain(frozen).lines if line.chosen]
    assert len(lines) == 5
    assert all("frozen" in line.reason for line in lines)
