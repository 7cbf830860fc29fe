"""The published modules' numbers (shared/golden): outputs, gradients and buffers, both modes."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import SHARED, shared_path
from safetensors.torch import load_file
from stage_cases import DEVICES, error, tolerance

from fused import FusedCIEMA, FusedMSFF
from fused.backends.reference.published import PublishedCIEMA, PublishedMSFF
from mobilesteelnet.model import MobileSteelNet

CASES: list[dict[str, Any]] = []
if (SHARED / "golden" / "cases.json").exists():
    CASES = json.loads((SHARED / "golden" / "cases.json").read_text())
# The network holds fused layers; its published form is covered by its blocks.
FORMS = [
    (case["file"], form)
    for case in CASES
    for form in ("auto", "reference", "published")
    if form != "published" or case["kind"] != "net"
]


def golden_weights() -> ModuleType:
    path = shared_path("golden", "weights.py")
    spec = importlib.util.spec_from_file_location("golden_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(case: dict[str, Any], form: str) -> torch.nn.Module:
    backend = {"backend": "reference"} if form == "reference" else {}
    if case["kind"] == "net":
        return MobileSteelNet(case["num_classes"], case["in_channels"], **backend)
    if case["kind"] == "ciema":
        kind: Any = PublishedCIEMA if form == "published" else FusedCIEMA
        return kind(case["channels"], case["factor"], case["reduction"], **backend)
    kind = PublishedMSFF if form == "published" else FusedMSFF
    return kind(case["stage_channels"], case["out_channels"], **backend)


def run(
    case: dict[str, Any], form: str, mode: str, dtype: torch.dtype, device: str
) -> dict[str, torch.Tensor]:
    """All tensors that a golden file may hold, by their names there."""
    weights = golden_weights()
    module = build(case, form).to(device, dtype)
    module.load_state_dict(weights.fill(module.state_dict(), case["seed"]), strict=True)
    module.train(mode == "train")
    inputs = [weights.draw(s, case["seed"] + 1 + i) for i, s in enumerate(case["inputs"])]
    inputs = [x.to(device, dtype).requires_grad_() for x in inputs]
    out = module(inputs if case["kind"] == "msff" else inputs[0])
    out.backward(weights.draw(tuple(out.shape), case["grad_out_seed"]).to(out))
    got = {f"{mode}.out": out.detach()}
    got |= {f"{mode}.grad_in{i}": x.grad for i, x in enumerate(inputs)}
    got |= {f"{mode}.grad.{key}": p.grad for key, p in module.named_parameters()}
    if mode == "train":
        got |= {f"train.after.{key}": b for key, b in module.named_buffers()}
    return {key: value.cpu() for key, value in got.items()}


def errors(case: dict[str, Any], got: dict[str, torch.Tensor], mode: str) -> dict[str, float]:
    """Error of every tensor that the golden file holds for this mode; none may be missing."""
    want = load_file(shared_path("golden", case["file"]))
    found = {}
    for key in want:
        if not key.startswith(mode) or key.endswith("#norm"):
            continue
        name = key.removesuffix("#every97")
        value = got[name]
        if key == name:
            found[name] = error(value.reshape(want[key].shape), want[key])
        else:
            norm = want[f"{name}#norm"].item()
            sampled = error(value.flatten()[::97], want[key])
            found[name] = max(sampled, abs(value.norm().item() - norm) / norm)
    return found


def test_golden_numbers_are_there_where_they_are_promised() -> None:
    assert shared_path("golden", "cases.json").exists()
    assert len(CASES) >= 12


@pytest.mark.skipif(not CASES, reason="shared/golden is not beside the project")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("name", "form"), FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_float64_matches(device: str, name: str, form: str, mode: str) -> None:
    (case,) = (c for c in CASES if c["file"] == name)
    found = errors(case, run(case, form, mode, torch.float64, device), mode)
    assert found
    worst = max(found, key=found.__getitem__)
    assert found[worst] <= tolerance(torch.float64)[0], (worst, found[worst])


@pytest.mark.skipif(not CASES, reason="shared/golden is not beside the project")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c["kind"] != "net"], ids=lambda case: case["file"].split(".")[0]
)
@pytest.mark.parametrize("device", DEVICES)
def test_float32_blocks_match(device: str, case: dict[str, Any], mode: str) -> None:
    out_tolerance, grad_tolerance = tolerance(torch.float32)
    got = run(case, "auto", mode, torch.float32, device)
    for name, value in errors(case, got, mode).items():
        limit = out_tolerance if name.endswith(".out") else grad_tolerance
        assert value <= limit, (name, value)


@pytest.mark.skipif(not CASES, reason="shared/golden is not beside the project")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c["kind"] == "net"], ids=lambda case: case["file"].split(".")[0]
)
@pytest.mark.parametrize("device", DEVICES)
def test_float32_network_matches(
    device: str, case: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm over a few pixels amplifies rounding in the backbone, in eager PyTorch alike."""
    found = errors(case, run(case, "auto", mode, torch.float32, device), mode)
    out_tolerance, grad_tolerance = tolerance(torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(FusedCIEMA, "forward", PublishedCIEMA.forward)
        patch.setattr(FusedMSFF, "forward", PublishedMSFF.forward)
        patch.setattr(MobileSteelNet, "_statistics_can_pass", lambda self: False)
        eager = errors(case, run(case, "auto", mode, torch.float32, device), mode)
    for name, value in found.items():
        limit = out_tolerance if name.endswith(".out") else max(grad_tolerance, 2 * eager[name])
        assert value <= limit, (name, value, eager[name])
