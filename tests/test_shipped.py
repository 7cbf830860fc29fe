"""Weights in few bits, and weights that come with the package."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors", reason="safetensors is not installed")
pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
from conftest import shared_path
from training_cases import (
    CLASSES,
    NORMALISATION,
    SIZE,
    make_pictures,
    one_thread,  # noqa: F401
    save_small,
    small_network,
)

from mobilesteelnet import shipped
from mobilesteelnet.__main__ import main
from mobilesteelnet.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from mobilesteelnet.data import PictureSet, scan, stratified_split
from mobilesteelnet.evaluate import evaluate
from mobilesteelnet.model import MobileSteelNet
from mobilesteelnet.quantisation import choose_bits, quantise, restore, stored_bytes
from mobilesteelnet.shipped import (
    CARD,
    WEIGHTS,
    load_shipped,
    package_weights,
    shipped_folder,
    unlearnt_pictures,
    unseen_pictures,
)
from mobilesteelnet.splits import seen_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("set") / "pictures", per_class=4)


@pytest.fixture(scope="module")
def pictures(folder: Path) -> PictureSet:
    return scan(folder)


def checkpoint() -> Checkpoint:
    training = {"epoch": 3, "options": {"seed": 42}}
    return Checkpoint(small_network(), CLASSES, SIZE, NORMALISATION, training)


# --------------------------------------------------------------------------------- quantisation


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.integers(0, 2**31),
    st.floats(1e-30, 1e30),
)
def test_weights_come_back_within_half_a_step(
    bits: int, shape: list[int], seed: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(shape, generator=generator)
    weight[0] = 0  # a dead channel
    stored, record = quantise({"w": weight, "b": torch.ones(3)}, {"w": bits})
    assert stored["w"].numel() == math.ceil(weight.numel() * bits / 8)
    found = restore(stored, json.loads(json.dumps(record)))
    assert found["w"].shape == weight.shape
    assert torch.equal(found["b"], torch.ones(3))
    largest = weight.flatten(1).abs().amax(1)
    half_step = largest / (2 ** (bits - 1) - 1) / 2
    error = (found["w"] - weight).flatten(1).abs().amax(1)
    assert bool((error <= 1.001 * half_step + 1e-37).all())
    twice = restore(*quantise(found, {"w": bits}))
    torch.testing.assert_close(twice["w"], found["w"], rtol=1e-5, atol=0)


def test_the_largest_weights_give_way() -> None:
    tensors = dict(MobileSteelNet(width=0.5).state_dict())
    full = choose_bits(tensors)
    assert set(full.values()) == {8}
    assert all(tensors[key].dim() > 1 for key in full)
    limit = stored_bytes(tensors, full) - 50_000
    fitted = choose_bits(tensors, limit)
    assert stored_bytes(tensors, fitted) <= limit
    reduced = {key for key, bits in fitted.items() if bits == 7}
    kept = {key for key, bits in fitted.items() if bits == 8}
    assert 0 < len(reduced) < len(kept)
    assert min(tensors[k].numel() for k in reduced) >= max(tensors[k].numel() for k in kept)
    stored, _ = quantise(tensors, fitted)
    assert sum(t.numel() * t.element_size() for t in stored.values()) == stored_bytes(
        tensors, fitted
    )
    with pytest.raises(ValueError, match="max_bytes=1000"):
        choose_bits(tensors, 1000)


def test_the_published_network_fits_into_the_papers_size(tmp_path: Path) -> None:
    model = MobileSteelNet()
    tensors = dict(model.state_dict())
    path = tmp_path / "whole.safetensors"
    whole = Checkpoint(model, list("abcdef"), 224, NORMALISATION)
    size = shipped._write_draft(path, whole, "int8", 8_200_000)
    assert 7_900_000 < size == path.stat().st_size <= 8_200_000
    found = load_checkpoint(path).model.state_dict()
    for key, tensor in tensors.items():
        error = float((found[key].double() - tensor.double()).norm())
        assert error <= 0.02 * float(tensor.double().norm()), key


@pytest.mark.parametrize(
    "damage",
    [
        {"bits": {"w": 9}},
        {"bits": {"w": True}},
        {"bits": {"w": 4}},
        {"bits": {"other": 8}},
        {"bits": None},
        {"shapes": {"w": [3, 7]}},
        {"shapes": {"w": [21]}},
        {"shapes": {"w": [3, -6]}},
        {"shapes": {"w": [6, 3]}},
        {"shapes": {"w": [2**31 - 1, 2**31 - 1]}},
        {"shapes": {"w": [2**31 - 1] * 40}},
    ],
)
def test_a_damaged_record_is_refused(damage: dict[str, Any]) -> None:
    stored, record = quantise({"w": torch.randn(3, 6)}, {"w": 8})
    with pytest.raises(ValueError, match=r"damaged|does not have the size|missing"):
        restore(stored, {**record, **damage})


# --------------------------------------------------------------------------------------- release


def test_packaged_weights_are_read_back(pictures: PictureSet, tmp_path: Path) -> None:
    indexes = list(range(len(pictures)))
    made = package_weights(
        checkpoint(), pictures, indexes, tmp_path, tolerance=100, note="Drawn for the tests."
    )
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CARD, "CARD.md"}
    found = load_shipped(folder=tmp_path)
    assert found.classes == CLASSES
    assert found.training == checkpoint().training
    again = evaluate(found, pictures, indexes)
    assert again.average_accuracy == made.after.average_accuracy
    card = json.loads((tmp_path / CARD).read_text())
    assert card["stored"]["average_accuracy"] == again.average_accuracy
    assert card["bytes"] == (tmp_path / WEIGHTS).stat().st_size
    text = (tmp_path / "CARD.md").read_text()
    assert card["sha256"] in text
    assert card["stored"]["coverage"][0] == {
        "threshold": 0.0,
        "coverage": 1.0,
        "accuracy": again.overall_accuracy,
    }
    assert f"| 0 | 100.00 | {100 * again.overall_accuracy:.2f} |" in text
    assert "Drawn for the tests." in text
    assert f"{100 * again.average_accuracy:.2f} %" in text
    size = 4 * sum(t.numel() for t in checkpoint().model.state_dict().values())
    assert card["bytes"] < 0.5 * size  # the header weighs on a network this small


@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_other_storages(pictures: PictureSet, tmp_path: Path, storage: str) -> None:
    package_weights(checkpoint(), pictures, [0, 5, 9], tmp_path, storage=storage, tolerance=100)
    found = load_shipped(folder=tmp_path).model.state_dict()
    bound = 1e-3 if storage == "float16" else 0
    for key, tensor in checkpoint().model.state_dict().items():
        assert found[key].dtype == tensor.dtype
        torch.testing.assert_close(found[key], tensor, rtol=bound, atol=bound)


def test_weights_that_lose_too_much_are_not_written(
    pictures: PictureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = checkpoint()
    original = shipped.quantise

    def ruin(tensors: Any, bits: Any) -> Any:
        stored, record = original(tensors, bits)
        stored["fc.weight.scale"] = torch.zeros_like(stored["fc.weight.scale"])
        stored["fc.bias"] = torch.tensor([0.0, 0.0, 9.0])
        return stored, record

    monkeypatch.setattr(shipped, "quantise", ruin)
    result = evaluate(broken, pictures, range(len(pictures)))
    right = [i for i, item in enumerate(result.predictions) if item.true == item.predicted]
    others = [i for i in right if result.predictions[i].true != CLASSES[2]]
    assert others, "an untrained network that is right somewhere is needed"
    with pytest.raises(ValueError, match="points of accuracy"):
        package_weights(broken, pictures, others, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_large_and_unknown_storages(pictures: PictureSet, tmp_path: Path) -> None:
    options: dict[str, Any] = {"storage": "float32", "max_bytes": 1000}
    with pytest.raises(ValueError, match="max_bytes=1000"):
        package_weights(checkpoint(), pictures, [0], tmp_path, **options)
    with pytest.raises(ValueError, match="storage='int3'"):
        package_weights(checkpoint(), pictures, [0], tmp_path, storage="int3")
    with pytest.raises(ValueError, match="tolerance=nan"):
        package_weights(checkpoint(), pictures, [0], tmp_path, tolerance=math.nan)
    with pytest.raises(ValueError, match="max_bytes=1000"):
        package_weights(checkpoint(), pictures, [0], tmp_path / "new", **options)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_replaced_on_request_only(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_small(tmp_path / "small.safetensors")
    arguments = ["package-weights", "small.safetensors", "--data", str(folder), "--device", "cpu"]
    arguments += ["--tolerance", "100"]
    assert main(arguments) == 0
    # No folder that Python would take for the package.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.safetensors", "weights"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()}
    capsys.readouterr()
    assert main([*arguments, "--storage", "float16"]) == 2
    assert "exists: replace it with --overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()} == before
    assert main([*arguments, "--storage", "float16", "--overwrite"]) == 0
    assert json.loads((tmp_path / "weights" / CARD).read_text())["storage"] == "float16"
    assert load_shipped(folder=tmp_path / "weights").classes == CLASSES


def test_a_card_that_cannot_be_written_leaves_the_earlier_weights(
    pictures: PictureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_weights(checkpoint(), pictures, [0, 5], tmp_path, tolerance=100)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(shipped, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        package_weights(checkpoint(), pictures, [0, 5], tmp_path, tolerance=100, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_damaged_weights_are_noticed(pictures: PictureSet, tmp_path: Path) -> None:
    package_weights(checkpoint(), pictures, [0, 5], tmp_path, tolerance=100)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged: sha256"):
        load_shipped(folder=tmp_path)
    (tmp_path / CARD).write_text("{}")
    with pytest.raises(CheckpointError, match="card"):
        load_shipped(folder=tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no trained weights"):
        load_shipped(folder=tmp_path)


def test_pictures_that_a_training_never_saw(pictures: PictureSet, tmp_path: Path) -> None:
    split = stratified_split(pictures, (0.5, 0.25, 0.25), 7)
    seen = seen_pictures(split, pictures)
    trained = checkpoint()
    trained.training = {"seen": seen}
    assert unseen_pictures(trained, pictures) == ("test", split.test)
    unlearnt = sorted([*split.val, *split.test])
    assert unlearnt_pictures(trained, pictures) == ("val+test", unlearnt)
    renamed = tmp_path / "renamed"
    for number, item in enumerate(pictures.items[1:]):  # one is missing, and all have other names
        path = renamed / Path(item.name).parent.name / f"plate{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.open(number + 1).save(path)
    found = scan(renamed)
    name, indexes = unseen_pictures(trained, found)
    unseen = {pictures.items[i].digest for i in split.test if i > 0}
    assert (name, {found.items[i].digest for i in indexes}) == ("test", unseen)
    others = scan(make_pictures(tmp_path / "others", seed=5))
    everything = ("all", list(range(len(others))))
    assert unseen_pictures(trained, others) == unlearnt_pictures(trained, others) == everything
    trained.training = {"seen": {**seen, "val": ""}}
    assert unlearnt_pictures(trained, pictures)[0] == "test"
    everything_learnt = {"train": "".join(item.digest[:16] for item in pictures.items), "val": ""}
    trained.training = {"seen": everything_learnt}
    assert unlearnt_pictures(trained, pictures) == ("val+test", [])
    for wrong in (None, {}, "x", {"train": 3, "val": ""}, {"train": "0" * 16, "val": "zz"}):
        trained.training = {"seen": wrong}
        assert unseen_pictures(trained, pictures)[0] == "all"


@pytest.mark.parametrize(
    ("split", "words"), [("test", "never saw"), ("train", "learnt"), ("all", "with any that")]
)
def test_the_card_says_what_the_pictures_are(
    pictures: PictureSet, tmp_path: Path, split: str, words: str
) -> None:
    package_weights(checkpoint(), pictures, [0, 5], tmp_path, split=split, tolerance=100)
    text = (tmp_path / "CARD.md").read_text()
    assert words in text
    assert ("never saw" in text) == (split == "test")
    with pytest.raises(ValueError, match="split='mine'"):
        package_weights(checkpoint(), pictures, [0], tmp_path, split="mine")


def test_unnamed_classes_get_the_pictures_names(pictures: PictureSet, tmp_path: Path) -> None:
    unnamed = replace(checkpoint(), classes=["class_0", "class_1", "class_2"], named_classes=False)
    package_weights(unnamed, pictures, [0, 5, 9], tmp_path, tolerance=100)
    assert load_shipped(folder=tmp_path).classes == CLASSES


def test_without_weights_the_error_says_what_to_do(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shipped, "shipped_folder", lambda: tmp_path)
    assert main(["predict", str(folder)]) == 4
    assert "no trained weights come with this version" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="mobilesteelnet train"):
        MobileSteelNet.from_pretrained()


@pytest.mark.slow
@pytest.mark.skipif(not (shipped_folder() / WEIGHTS).is_file(), reason="no weights are shipped yet")
def test_the_shipped_weights_are_as_good_as_their_card() -> None:
    card = json.loads((shipped_folder() / CARD).read_text())
    pictures = scan(shared_path("data", "neu-det.zip"))
    options = card["training"]["options"]
    seed = options["seed"] if options["split_seed"] is None else options["split_seed"]
    split = stratified_split(pictures, options["fractions"], seed)
    assert unseen_pictures(load_shipped(), pictures) == (card["split"], split.test)
    unlearnt = sorted([*split.val, *split.test])
    assert unlearnt_pictures(load_shipped(), pictures) == ("val+test", unlearnt)
    result = evaluate(load_shipped().frozen(), pictures, split.test)
    assert len(result.predictions) == card["pictures"]
    wanted = card["stored"]["average_accuracy"]
    assert result.average_accuracy == pytest.approx(wanted, abs=0.002)
    assert result.calibration is not None
    error = card["stored"]["calibration_error"]
    assert result.calibration.expected_error == pytest.approx(error, abs=0.005)
    at = {item.threshold: item for item in result.calibration.coverage}[0.9]  # README's figures
    assert at.coverage == pytest.approx(0.7475, abs=0.01)
    assert at.accuracy == pytest.approx(0.9992, abs=0.002)
    assert card["bytes"] <= 8_200_000
    assert card["float32"]["average_accuracy"] - wanted <= 0.003
