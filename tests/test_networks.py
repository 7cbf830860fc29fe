"""The networks and attention blocks that MobileSteelNet is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_cases import NORMALISATION, one_thread  # noqa: F401

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

import fused
from mobilesteelnet.blocks import EMA, OTHER_ATTENTIONS
from mobilesteelnet.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from mobilesteelnet.initialisation import build_model
from mobilesteelnet.model import MobileSteelNet, describe
from mobilesteelnet.networks import BASELINES, build_network, describe_network
from mobilesteelnet.train import TrainConfig

# Of the 1000-class networks in millions, as their papers and torchvision's tables give them.
PUBLISHED_MILLIONS = {
    "resnet18": 11.69,
    "resnet34": 21.80,
    "resnet50": 25.56,
    "mobilenetv1": 4.23,
    "mobilenetv2": 3.50,
    "mobilenetv3": 5.48,
    "shufflenetv1": 1.87,
    "shufflenetv2": 2.28,
    "edgenext_small": 5.59,
}


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_trains_and_can_be_kept(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_network({"network": name, "num_classes": 5, "backend": "reference"})
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    path = tmp_path / "baseline.safetensors"
    classes = list("abcde")
    card = {"input_size": 64, "normalisation": NORMALISATION, "training": {}}
    save_checkpoint(path, model, classes=classes, **card)
    images = torch.randn(1, 3, 64, 64)
    again = load_checkpoint(path).model
    assert torch.equal(again(images), model.eval()(images))
    assert describe_network(again, 64)["flop"] > 1e6


@pytest.mark.parametrize(("name", "millions"), PUBLISHED_MILLIONS.items())
def test_baselines_have_the_size_of_their_papers(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = build_network({"network": name, "num_classes": 1000})
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_shufflenet_v1_costs_what_its_paper_says() -> None:
    model = build_network({"network": "shufflenetv1", "num_classes": 1000})
    # Table 1: 137 M multiply-adds with 3 groups; the count of the paper leaves nothing out.
    assert describe_network(model, 224)["flop"] / 2e6 == pytest.approx(137, abs=1)


@pytest.mark.parametrize("attention", OTHER_ATTENTIONS)
def test_attention_of_other_papers(attention: str) -> None:
    torch.manual_seed(0)
    model = MobileSteelNet(num_classes=3, width=0.125, attention=attention)
    images = torch.randn(2, 3, 40, 36)
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(key.startswith("ciema") for key in model.state_dict())
    assert model.spatial_gate(images) is None
    assert describe(model, 32)["other_flop"] > 0
    twin = MobileSteelNet.from_config(model.config)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin.eval()(images), model.eval()(images))


def test_ema_is_what_is_left_of_ciema_without_its_learning() -> None:
    """EMA is CIEMA's gate before channel interaction, cross-spatial learning and gated fusion."""
    torch.manual_seed(0)
    from mobilesteelnet.blocks import CIEMAWithoutCrossSpatial

    block = EMA(24, 4)
    ciema = CIEMAWithoutCrossSpatial(24, 4, backend="reference")
    ciema.conv1x1, ciema.conv3x3, ciema.gn = block.conv1x1, block.conv3x3, block.norm
    x = torch.randn(2, 24, 7, 5)
    gate = ciema._spatial_gate(x).repeat_interleave(6, 1)
    torch.testing.assert_close(block(x), x * gate)
    with pytest.raises(ValueError, match=r"groups=5 .* channels=24"):
        EMA(24, 5)


@pytest.mark.parametrize(
    ("attention", "missing"),
    [
        ("ciema-no-channel-interaction", "channel_interaction"),
        ("ciema-no-cross-spatial", "cross_spatial_learning"),
    ],
)
def test_ablations_of_ciema(attention: str, missing: str) -> None:
    torch.manual_seed(0)
    model = MobileSteelNet(num_classes=3, width=0.125, attention=attention)
    assert not any(missing in key for key in model.state_dict())
    images = torch.randn(2, 3, 40, 36)
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    gate = model.eval().spatial_gate(images)
    assert gate is not None
    assert "ciema.gated_fusion" in describe(model, 32)["backends"]
    # With the whole block's children put in, it is CIEMA with that child's identity.
    whole = fused.FusedCIEMA(model.ciema.channels, model.ciema.groups)
    fits = whole.load_state_dict(model.ciema.state_dict(), strict=False)
    assert fits.missing_keys
    assert all(key.startswith(missing) for key in fits.missing_keys)
    x = model.features(images)
    expected = whole.eval()
    if missing == "channel_interaction":
        expected._interact = lambda x, statistics: x  # type: ignore[method-assign]
        torch.testing.assert_close(model.ciema(x), expected(x))


def test_relu_output_keeps_the_published_keys() -> None:
    published = MobileSteelNet(width=0.125)
    model = MobileSteelNet(width=0.125, activation="relu-output").eval()
    model.load_state_dict(published.state_dict(), strict=True)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert all(float(stage.min()) >= 0 for stage in model.backbone(images))
        assert float(published.eval().backbone(images)[0].min()) < 0


def test_dropout_works_in_training_only() -> None:
    model = MobileSteelNet(width=0.125, dropout=0.5)
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_options_that_a_baseline_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"network='resnet18' .* attention"):
        build_model(TrainConfig(data="x", network="resnet18", attention="none"), ["a", "b"])
    with pytest.raises(ValueError, match=r"network='vgg16': must be one of mobilesteelnet, "):
        build_model(TrainConfig(data="x", network="vgg16"), ["a", "b"])


def test_a_checkpoint_of_an_unknown_network(tmp_path: Path) -> None:
    model = build_network({"network": "shufflenetv1", "num_classes": 2})
    model.config["network"] = "alexnet"
    path = tmp_path / "unknown.safetensors"
    card = {"input_size": 64, "normalisation": NORMALISATION, "training": {}}
    save_checkpoint(path, model, classes=["a", "b"], **card)
    with pytest.raises(CheckpointError, match="network='alexnet'"):
        load_checkpoint(path)
