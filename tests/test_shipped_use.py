"""What uses the weights that come with the package: prediction, training, the demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="safetensors is not installed")
pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
from test_shipped import checkpoint, folder, pictures  # noqa: F401
from training_cases import CLASSES, SIZE, WIDTH, one_thread  # noqa: F401

from mobilesteelnet import demo, shipped
from mobilesteelnet.__main__ import main
from mobilesteelnet.checkpoint import load_checkpoint
from mobilesteelnet.data import PictureSet, scan
from mobilesteelnet.initialisation import build_model
from mobilesteelnet.model import MobileSteelNet
from mobilesteelnet.shipped import WEIGHTS, package_weights
from mobilesteelnet.splits import Split, recognise
from mobilesteelnet.train_config import TrainConfig


@pytest.fixture
def shipping(pictures: PictureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that brings weights."""
    place = tmp_path / "weights"
    package_weights(checkpoint(), pictures, [0, 5], place, tolerance=100)
    monkeypatch.setattr(shipped, "shipped_folder", lambda: place)
    return place


def test_from_pretrained(shipping: Path) -> None:
    model = MobileSteelNet.from_pretrained(backend="reference")
    assert not model.training
    assert model.config["backend"] == "reference"
    images = torch.randn(1, 3, SIZE, SIZE)
    assert torch.equal(model(images), load_checkpoint(shipping / WEIGHTS).model(images))


def test_pictures_alone_are_predicted_with_the_packages_weights(
    shipping: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(folder / "dark" / "dark_0.png")
    assert main(["predict", picture, "--json", "-", "--min-confidence", "1"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["predictions"][0]["rejected"] is True
    assert main(["predict", "shipped", picture, "--json", "-"]) == 0
    named = json.loads(capsys.readouterr().out)
    assert named["predictions"][0]["probability"] == alone["predictions"][0]["probability"]
    assert main(["predict", str(shipping / WEIGHTS), picture, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == named
    assert (
        main(["eval", "shipped", "--data", str(folder), "--no-report", "--out", str(shipping)]) == 0
    )
    assert main(["predict", str(shipping / WEIGHTS)]) == 2
    assert "give the pictures" in capsys.readouterr().err


def test_a_training_starts_from_the_packages_weights(
    shipping: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_checkpoint(shipping / WEIGHTS).model.state_dict()
    config = TrainConfig(data=str(folder), width=WIDTH, init_from="shipped")
    own = build_model(config, CLASSES).state_dict()
    assert all(torch.equal(own[key], weights[key]) for key in weights)
    other = build_model(config, ["a", "b"]).state_dict()
    assert [key for key in weights if other[key].shape != weights[key].shape] == [
        "fc.weight",
        "fc.bias",
    ]
    out = tmp_path / "run"
    arguments = ["train", "--data", str(folder), "--init-from", "shipped", "--out", str(out)]
    arguments += ["--epochs", "1", "--size", str(SIZE), "--fractions", "0.5,0.25,0.25"]
    assert main([*arguments, "--accelerator", "cpu"]) == 4
    assert "which --recipe ours does" in capsys.readouterr().err  # of another width
    assert main([*arguments, "--width", str(WIDTH), "--accelerator", "cpu"]) == 0
    trained = load_checkpoint(out / "best.safetensors")
    assert trained.training["options"]["init_from"] == "shipped"
    assert "its training saw" not in capsys.readouterr().err


def test_pictures_that_the_first_weights_learnt_are_no_test_pictures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(folder), "--size", str(SIZE), "--width", str(WIDTH)]
    common += ["--fractions", "0.5,0.25,0.25", "--accelerator", "cpu", "--epochs"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", *common, "1", "--seed", "1", "--out", str(first)]) == 0
    start = ["--seed", "2", "--init-from", str(first / "best.safetensors")]
    capsys.readouterr()
    assert main(["train", *common, "2", *start, "--out", str(second)]) == 0
    pictures = scan(folder)
    before, split = (
        Split.from_dict(json.loads((run / "split.json").read_text()), pictures)
        for run in (first, second)
    )
    known = set(before.train) | set(before.val)
    learnt = len(set(before.train) & set(split.val))
    unknown = [i for i in split.test if i not in known]
    assert 0 < len(unknown) < len(split.test)
    said = " ".join(capsys.readouterr().err.split())
    assert f"saw {learnt} of the {len(split.val)} validation pictures" in said
    count = len(split.test) - len(unknown)
    assert f"and {count} of the {len(split.test)} test pictures" in said
    # Also the weights of a continued run know, whose first weights may be gone by then.
    (first / "best.safetensors").unlink()
    state = torch.load(second / "last.ckpt", weights_only=True)["callbacks"]["RunWriter"]
    trained = load_checkpoint(second / "best.safetensors")
    assert state["seen"] == trained.training["seen"]
    parts = recognise(trained.training["seen"], pictures)
    assert parts is not None
    assert parts["test"] == unknown
    assert set(parts["train"]) == set(before.train) | set(split.train)
    assert main(["eval", str(second), "--no-report", "--out", str(tmp_path / "eval")]) == 0
    measured = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert len(measured["predictions"]) == len(unknown)


def test_the_demo_with_the_packages_weights(
    shipping: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "demo"
    arguments = ["demo", "--budget", "shipped", "--out", str(out)]
    assert main(arguments) == 2
    assert "needs data" in capsys.readouterr().err
    assert main([*arguments, "--data", str(folder)]) == 0
    assert (out / "report" / "report.html").is_file()
    assert not (out / "run").exists()
    assert "on 12 " in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(demo, "shipped_folder", lambda: shipping)
    assert main(["demo", "--out", str(tmp_path / "plain"), "--data", str(folder)]) == 0
    assert not (tmp_path / "plain" / "run").exists()
    assert demo.default_budget(None) == "small"
    monkeypatch.setattr(demo, "shipped_folder", lambda: tmp_path)
    assert demo.default_budget(folder) == "small"
