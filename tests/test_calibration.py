"""Confidence: calibration error and coverage by hand, rejection, changed pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
from PIL import Image
from training_cases import (
    CLASSES,
    NORMALISATION,
    SIZE,
    make_pictures,
    one_thread,  # noqa: F401
    save_small,
    small_network,
)

from mobilesteelnet.__main__ import main
from mobilesteelnet.calibration import Coverage, calibrate, least_threshold
from mobilesteelnet.checkpoint import Checkpoint
from mobilesteelnet.data import PictureSet, scan
from mobilesteelnet.evaluate import evaluate
from mobilesteelnet.predict import predict
from mobilesteelnet.robustness import LEVELS, change_picture, measure_robustness
from mobilesteelnet.run_folder import rows_to_csv


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("set") / "pictures", per_class=4)


@pytest.fixture(scope="module")
def pictures(folder: Path) -> PictureSet:
    return scan(folder)


def test_calibration_by_hand() -> None:
    # Two bins are filled: four pictures at 0.9, three of them right; two at 0.6, one right.
    rows = [[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2
    truth = torch.tensor([0, 0, 0, 1, 1, 0])
    found = calibrate(torch.tensor(rows), truth)
    assert found.expected_error == pytest.approx((4 * (0.9 - 0.75) + 2 * (0.6 - 0.5)) / 6, abs=1e-6)
    filled = [item for item in found.bins if item.pictures]
    assert [(item.pictures, item.accuracy) for item in filled] == [(2, 0.5), (4, 0.75)]
    assert [item.confidence for item in filled] == pytest.approx([0.6, 0.9])
    by_threshold = {item.threshold: item for item in found.coverage}
    assert by_threshold[0.0] == Coverage(0.0, 1.0, pytest.approx(4 / 6))
    assert by_threshold[0.8] == Coverage(0.8, pytest.approx(4 / 6), 0.75)
    assert by_threshold[0.95] == Coverage(0.95, 0.0, None)
    shares = [item.coverage for item in found.coverage]
    assert shares == sorted(shares, reverse=True)


def test_the_least_threshold_that_is_accurate_enough() -> None:
    curve = [Coverage(0.0, 1.0, 0.8), Coverage(0.5, 0.9, 0.95), Coverage(0.7, 0.7, 0.9)]
    curve += [Coverage(0.8, 0.6, 0.96), Coverage(0.9, 0.4, 0.99), Coverage(0.99, 0.0, None)]
    found = least_threshold(curve, 0.95)
    assert found is not None
    assert found.threshold == 0.8  # 0.5 is accurate enough too, but 0.7 above it is not
    assert least_threshold(curve, 0.999) is None
    assert least_threshold(curve, 0.5) == curve[0]


def test_an_evaluation_holds_its_calibration(pictures: PictureSet) -> None:
    checkpoint = Checkpoint(small_network(), CLASSES, SIZE, NORMALISATION)
    result = evaluate(checkpoint, pictures, range(len(pictures)))
    places = [CLASSES.index(item.true) for item in result.predictions]
    rows = torch.tensor([item.probabilities for item in result.predictions])
    assert result.calibration == calibrate(rows, torch.tensor(places))
    stored = json.loads(json.dumps(result.to_dict()))
    assert len(stored["calibration"]["bins"]) == 15


def test_uncertain_pictures_are_rejected(pictures: PictureSet) -> None:
    checkpoint = Checkpoint(small_network(), CLASSES, SIZE, NORMALISATION)
    free = predict(checkpoint, pictures)
    limit = sorted(item.probability for item in free.items)[5]
    found = predict(checkpoint, pictures, min_confidence=limit)
    assert [item.rejected for item in found.items] == [
        item.probability < limit for item in free.items
    ]
    assert 0 < sum(item.rejected for item in found.items) < len(found.items)
    assert [item.label for item in found.items] == [item.label for item in free.items]
    lines = rows_to_csv(found.to_rows()).splitlines()
    assert lines[0] == "name,class,probability,rejected,error"
    assert sum(",yes," in line for line in lines) == sum(item.rejected for item in found.items)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="min_confidence"):
            predict(checkpoint, pictures, min_confidence=wrong)


@pytest.mark.parametrize(("change", "level"), [(k, x) for k, (_, xs) in LEVELS.items() for x in xs])
def test_changes_do_what_they_say(change: str, level: float) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(40, 120, (64, 64)).astype(np.uint8)
    picture = Image.fromarray(grey).convert("RGB")
    before = np.asarray(picture, dtype=float)
    changed = change_picture(picture, "a/b.png", change=change, level=level)
    after = np.asarray(changed, dtype=float)
    assert changed.mode == "RGB"
    assert after.shape == before.shape
    again = change_picture(picture, "a/b.png", change=change, level=level)
    assert np.array_equal(np.asarray(again), np.asarray(changed))
    if change == "brightness":
        assert after.mean() == pytest.approx(level * before.mean(), rel=0.02)
    elif change == "contrast":
        assert after.std() == pytest.approx(level * before.std(), rel=0.05)
        assert after.mean() == pytest.approx(before.mean(), abs=1)
    elif change == "blur":
        assert after.std() < before.std()
    elif change == "noise":
        assert (after - before).std() == pytest.approx(level, rel=0.1)
        other = change_picture(picture, "a/c.png", change=change, level=level)
        assert not np.array_equal(np.asarray(other), np.asarray(changed))
    else:
        assert 0 < np.abs(after - before).mean() < 25


def test_an_unknown_change() -> None:
    with pytest.raises(ValueError, match="change='fog'"):
        change_picture(Image.new("RGB", (4, 4)), "a", change="fog", level=1.0)


def test_robustness_begins_with_the_pictures_as_they_are(pictures: PictureSet) -> None:
    checkpoint = Checkpoint(small_network(), CLASSES, SIZE, NORMALISATION)
    indexes = range(len(pictures))
    rows = measure_robustness(checkpoint, pictures, indexes)
    plain = evaluate(checkpoint, pictures, indexes)
    assert plain.calibration is not None
    assert (rows[0].change, rows[0].average_accuracy) == ("none", plain.average_accuracy)
    assert len(rows) == 1 + sum(len(levels) for _, levels in LEVELS.values())
    assert any(row.calibration_error != plain.calibration.expected_error for row in rows)


def test_robustness_from_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_small(tmp_path / "small.safetensors")
    arguments = ["robustness", str(tmp_path / "small.safetensors"), "--data", str(folder)]
    assert main([*arguments, "--split", "all", "--json", "-", "--device", "cpu"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pictures"] == 12
    assert {row["change"] for row in facts["rows"]} == {"none", *LEVELS}
    assert main(arguments) == 2  # a part of the pictures needs the run that divided them
