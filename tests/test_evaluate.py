"""Evaluation: figures against counting by hand, and classes that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
from torch import nn
from training_cases import CLASSES, NORMALISATION, SIZE, make_pictures, one_thread  # noqa: F401

from mobilesteelnet.checkpoint import Checkpoint, CheckpointError
from mobilesteelnet.data import DataError, PictureSet, scan, stratified_split
from mobilesteelnet.evaluate import evaluate, pick_split
from mobilesteelnet.run_folder import RunFolder, RunFolderError, write_json


class Brightness(nn.Module):
    """Three logits that follow the mean of the picture: dark pictures and bright ones."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(outputs))
        self.config = {"in_channels": 3}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean((1, 2, 3))
        logits = torch.zeros(len(images), len(self.scale))
        logits[:, 0] = -mean
        logits[:, -1] = mean
        return logits * self.scale


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> PictureSet:
    return scan(make_pictures(tmp_path_factory.mktemp("set") / "pictures"))


def checkpoint(classes: list[str], named: bool = True) -> Checkpoint:
    model = Brightness(len(classes)).eval()
    return Checkpoint(model, classes, SIZE, NORMALISATION, named_classes=named)


def test_figures_are_those_of_counting(pictures: PictureSet) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate(
        checkpoint(CLASSES),
        pictures,
        range(len(pictures)),
        batch_size=5,
        progress=lambda done, total: seen.append((done, total)),
    )
    pairs = [(item.true, item.predicted) for item in result.predictions]
    assert len(pairs) == 24
    assert seen == [(5, 24), (10, 24), (15, 24), (20, 24), (24, 24)]
    assert [item.name for item in result.predictions] == [item.name for item in pictures.items]
    recalls = []
    for row, true in enumerate(CLASSES):
        for column, chosen in enumerate(CLASSES):
            assert result.confusion[row][column] == pairs.count((true, chosen))
        right = pairs.count((true, true))
        of_class = sum(pair[0] == true for pair in pairs)
        called = sum(pair[1] == true for pair in pairs)
        figures = result.per_class[row]
        assert figures.pictures == of_class
        assert figures.accuracy == figures.recall == pytest.approx(right / of_class)
        assert figures.precision == pytest.approx(right / called if called else 0)
        assert figures.f1 == pytest.approx(2 * right / (of_class + called))
        recalls.append(right / of_class)
    assert result.average_accuracy == pytest.approx(sum(recalls) / 3)
    assert result.overall_accuracy == sum(a == b for a, b in pairs) / 24
    assert 0 < result.overall_accuracy < 1
    assert {item.predicted for item in result.wrong} <= set(CLASSES)
    chances = [max(item.probabilities) for item in result.wrong]
    assert chances == sorted(chances, reverse=True)
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["confusion"] == result.confusion


def test_classes_without_pictures_do_not_count(pictures: PictureSet) -> None:
    """A checkpoint may know more classes, in another order, than the pictures have."""
    known = ["noise", "rust", "lines", "dark"]
    result = evaluate(checkpoint(known), pictures, range(len(pictures)))
    rust = result.per_class[1]
    assert (rust.pictures, rust.accuracy, rust.f1) == (0, None, None)
    with_pictures = [item.accuracy for item in result.per_class if item.accuracy is not None]
    assert result.average_accuracy == pytest.approx(sum(with_pictures) / 3)
    assert [item.true for item in result.predictions[:8]] == ["dark"] * 8


def test_unnamed_classes_take_the_names_of_the_pictures(pictures: PictureSet) -> None:
    names = ["class_0", "class_1", "class_2"]
    result = evaluate(checkpoint(names, named=False), pictures, [0, 8, 16])
    assert result.classes == CLASSES
    with pytest.raises(DataError, match="4 unnamed classes, the pictures have 3"):
        evaluate(checkpoint([*names, "class_3"], named=False), pictures, [0])


def test_unknown_classes_are_named(pictures: PictureSet) -> None:
    with pytest.raises(DataError, match=r"does not know: lines \(it knows dark, noise, rust\)"):
        evaluate(checkpoint(["dark", "noise", "rust"]), pictures, [0])


def test_an_empty_part(pictures: PictureSet) -> None:
    with pytest.raises(DataError, match="split='val' holds no pictures"):
        evaluate(checkpoint(CLASSES), pictures, [], split="val")


def test_a_network_that_gives_nan_is_an_error(pictures: PictureSet) -> None:
    broken = checkpoint(CLASSES)
    with torch.no_grad():
        next(broken.model.parameters())[1] = torch.inf
    with pytest.raises(CheckpointError, match=r"output for 'dark/dark_0\.png' is not finite"):
        evaluate(broken, pictures, range(3))


def test_a_picture_that_vanishes_is_an_error(tmp_path: Path) -> None:
    found = scan(make_pictures(tmp_path / "set", per_class=2))
    (tmp_path / "set" / found.items[1].name).unlink()
    with pytest.raises(DataError, match="dark_1"):
        evaluate(checkpoint(CLASSES), found, range(6))


def test_the_parts_of_a_run(pictures: PictureSet, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    split = stratified_split(pictures, (0.5, 0.25, 0.25), 1)
    write_json(run.split, split.to_dict(pictures))
    assert pick_split(pictures, "train", run) == split.train
    assert pick_split(pictures, "val", run) == split.val
    assert pick_split(pictures, "test", run) == split.test
    assert pick_split(pictures, "all", None) == list(range(24))
    with pytest.raises(ValueError, match="split='best'"):
        pick_split(pictures, "best", run)
    with pytest.raises(ValueError, match="only a run folder"):
        pick_split(pictures, "test", None)
    run.split.write_text("not json")
    with pytest.raises(RunFolderError, match=r"split\.json"):
        pick_split(pictures, "test", run)
