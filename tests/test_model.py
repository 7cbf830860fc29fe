"""MobileSteelNet: the published shape and size, the ablation's switches, description, errors."""

from __future__ import annotations

import pytest
import torch

import fused
from mobilesteelnet.model import MobileSteelNet, attention_groups, describe, parameter_count


def test_published_size_and_cost() -> None:
    model = MobileSteelNet()
    assert parameter_count(model) == 8_438_535
    text = describe(model)
    assert text["parameters"] == 8_438_535
    assert text["published_flop"] / 1e9 == pytest.approx(58.3, abs=0.05)
    assert text["backbone_flop"] / 1e9 == pytest.approx(3.0, abs=0.05)
    assert [row["stage"] for row in text["stages"]] == list(fused.contract.STAGES)
    assert "ciema.cross_spatial" in text["backends"]


def test_stage_outputs_of_a_224_picture() -> None:
    model = MobileSteelNet().to("meta")
    images = torch.empty(2, 3, 224, 224, device="meta")
    shapes = [tuple(m.shape) for m in model.backbone(images)]
    assert shapes == [(2, 128, 56, 56), (2, 512, 28, 28), (2, 1024, 14, 14)]
    assert model.features(images).shape == (2, 1024, 56, 56)
    assert model(images).shape == (2, 6)


@pytest.mark.parametrize("attention", ["ciema", "none"])
@pytest.mark.parametrize("fusion", ["msff", "none"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_switches_of_the_ablation(attention: str, fusion: str, activation: str | None) -> None:
    model = MobileSteelNet(
        *(5, 1), attention=attention, fusion=fusion, activation=activation, width=0.125
    )
    images = torch.randn(2, 1, 40, 36)
    logits = model(images)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    twin = MobileSteelNet.from_config(model.config)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin.eval()(images), model.eval()(images))
    keys = {key.split(".")[0] for key in model.state_dict()}
    assert ("ciema" in keys) == (attention == "ciema")
    assert ("msff" in keys) == (fusion == "msff")
    assert any("depthwise_bn" in key for key in model.state_dict()) == (activation == "relu")
    gate = model.spatial_gate(images)
    assert (gate is None) == (attention == "none")
    assert describe(model, 32)["parameters"] == parameter_count(model)


@pytest.mark.parametrize("width", [0.1, 0.25, 0.5, 2.0])
def test_every_width_has_legal_groups(width: float) -> None:
    model = MobileSteelNet(width=width, num_classes=2)
    channels = model.fc.in_features
    assert channels % attention_groups(channels) == 0
    assert channels // attention_groups(channels) >= 4


def test_the_cost_does_not_depend_on_the_backend() -> None:
    found = [describe(MobileSteelNet(width=0.125, backend=b), 64) for b in (None, "reference")]
    told = [one.pop("backends") for one in found]
    assert told[0] != told[1]
    assert found[0] == found[1]
    assert found[0]["other_flop"] == 2 * 128 * 6  # the head alone


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"in_channels": -1}, "in_channels=-1"),
        ({"attention": "senet"}, "attention='senet'"),
        ({"fusion": "fpn"}, "fusion='fpn'"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"width": 0}, "width=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"width": float("nan")}, "width=nan"),
        ({"bn_statistics": "none"}, "bn_statistics='none'"),
    ],
)
def test_bad_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MobileSteelNet(**arguments)


def test_bad_images() -> None:
    model = MobileSteelNet(width=0.125).eval()
    with pytest.raises(ValueError, match=r"images have shape \(3, 32, 32\)"):
        model(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 32\), expected \(B, 3, H, W\)"):
        model(torch.zeros(1, 1, 32, 32))


def test_batch_and_single_agree_in_evaluation() -> None:
    model = MobileSteelNet(width=0.125).eval()
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["msff", "ciema"])
def test_a_blocks_own_call_is_made_in_every_mode(name: str) -> None:
    model, images = MobileSteelNet(width=0.1), torch.randn(2, 3, 32, 32)
    block, calls = model.get_submodule(name), []

    def forward(maps):
        calls.append(1)
        return type(block).forward(block, maps)

    block.forward = forward
    model(images)
    want = model.eval()(images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), want)
    assert calls == [1, 1, 1]


def test_a_hook_on_ciema_sees_the_published_call() -> None:
    model, images = MobileSteelNet(width=0.1).eval(), torch.randn(2, 3, 32, 32)
    want = model(images)
    seen: list[int] = []
    model.ciema.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    torch.testing.assert_close(model(images), want)
    assert seen == [1]
