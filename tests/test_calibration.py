"""Confidence: calibration error and coverage by hand, rejection, changed pictures."""

from __future__ import annotations

import json
from dataclasses import replace
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
from mobilesteelnet.calibration import (
    LEAST_PICTURES,
    Calibration,
    Coverage,
    calibrate,
    fit_temperature,
    least_threshold,
)
from mobilesteelnet.checkpoint import Checkpoint, load_checkpoint
from mobilesteelnet.data import PictureSet, scan
from mobilesteelnet.evaluate import evaluate, find_temperature
from mobilesteelnet.predict import predict
from mobilesteelnet.report_confidence import confidence_section
from mobilesteelnet.robustness import LEVELS, change_picture, measure_robustness
from mobilesteelnet.run_folder import rows_to_csv
from mobilesteelnet.shipped import load_shipped
from mobilesteelnet.splits import Split, seen_pictures


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


def test_the_error_is_that_of_the_bins_where_a_network_is_certain() -> None:
    rows = [[1.0, 0.0]] * 2 + [[0.96, 0.04]] * 2
    found = calibrate(torch.tensor(rows), torch.tensor([0, 1, 0, 0]))
    filled = [item for item in found.bins if item.pictures]
    assert [item.pictures for item in filled] == [4]
    assert found.expected_error == pytest.approx(0.98 - 0.75, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_temperature_that_made_the_truth_is_found(temperature: float) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(20000, 5)
    truth = (logits / temperature).softmax(1).multinomial(1).squeeze(1)
    found = fit_temperature(logits, truth)
    assert found == pytest.approx(temperature, rel=0.03)
    assert fit_temperature(logits + torch.randn(20000, 1), truth) == pytest.approx(found, rel=1e-3)
    before, after = (calibrate((logits / t).softmax(1), truth) for t in (1.0, found))
    assert after.expected_error < (0.02 if temperature == 1 else before.expected_error / 3)


def test_a_few_right_pictures_do_not_make_certain() -> None:
    for count in (3, 30, 300):
        logits = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
        truth = logits.argmax(1)
        found = fit_temperature(logits, truth)
        assert 0.05 < found < 1
        chance = (logits / found).softmax(1).amax(1).mean()
        assert chance < (count + 1) / (count + 2) + 1e-6
    assert fit_temperature(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)) == 1.0
    wrong = torch.eye(4)[[1, 2, 3, 0]] * 50
    assert fit_temperature(wrong, torch.arange(4)) == 20.0


def test_probabilities_are_those_at_the_temperature(pictures: PictureSet) -> None:
    cold = Checkpoint(small_network(), CLASSES, SIZE, NORMALISATION)
    warm = replace(cold, temperature=2.5)
    indexes = range(len(pictures))
    one, other = (evaluate(item, pictures, indexes) for item in (cold, warm))
    for left, right in zip(one.predictions, other.predictions, strict=True):
        expected = (torch.tensor(left.probabilities).double().log() / 2.5).softmax(0)
        torch.testing.assert_close(
            torch.tensor(right.probabilities).double(), expected, rtol=1e-5, atol=1e-6
        )
        assert left.predicted == right.predicted
    assert warm.frozen().temperature == 2.5


def test_calibration_from_the_command_line(
    folder: Path, pictures: PictureSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "small.safetensors", tmp_path / "own.safetensors"
    save_small(source)
    arguments = ["calibrate", str(source), "--data", str(folder), "--device", "cpu"]
    assert main(arguments) == 2
    assert "--out is needed" in capsys.readouterr().err
    assert main([*arguments, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    before, after = load_checkpoint(source), load_checkpoint(out)
    assert before.temperature == 1.0
    indexes = range(len(pictures))
    assert after.temperature == find_temperature(before, pictures, indexes)[0]
    assert f"temperature 1 -> {after.temperature:g} from 12 pictures (all): loss" in told
    losses = [evaluate(item, pictures, indexes).loss for item in (before, after)]
    assert losses[1] < losses[0]
    assert f"{losses[0]:.4f} -> {losses[1]:.4f}" in told
    for key, value in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[key], value)
    packaged = tmp_path / "weights"
    command = ["package-weights", str(out), "--data", str(folder), "--out", str(packaged)]
    assert main([*command, "--tolerance", "100", "--device", "cpu"]) == 0
    assert load_shipped(folder=packaged).temperature == after.temperature
    card = json.loads((packaged / "card.json").read_text())
    assert (card["split"], card["temperature"]) == ("all", after.temperature)


def test_the_figures_before_are_those_of_the_checkpoint(pictures: PictureSet) -> None:
    warm = Checkpoint(small_network(), CLASSES, SIZE, NORMALISATION, temperature=3.0)
    indexes = range(len(pictures))
    temperature, before, after = find_temperature(warm, pictures, indexes)
    assert before.loss == pytest.approx(evaluate(warm, pictures, indexes).loss, rel=1e-5)
    assert before.about["temperature"] == 3.0
    assert after.loss < before.loss
    assert temperature == find_temperature(replace(warm, temperature=1.0), pictures, indexes)[0]


def test_a_temperature_that_is_not_better_is_not_taken(
    folder: Path, pictures: PictureSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bold = Checkpoint(small_network(), CLASSES, SIZE, NORMALISATION, temperature=0.01)
    found = evaluate(bold, pictures, range(len(pictures))).predictions
    # All of them right: the fit holds back, and the loss is least at the bold temperature.
    right = [place for place, item in enumerate(found) if item.predicted == item.true]
    temperature, before, after = find_temperature(bold, pictures, right, least=1)
    assert (temperature, before) == (0.01, after)
    save_small(tmp_path / "small.safetensors")
    own, again = tmp_path / "own.safetensors", tmp_path / "again.safetensors"
    arguments = ["--data", str(folder), "--device", "cpu", "--out"]
    assert main(["calibrate", str(tmp_path / "small.safetensors"), *arguments, str(own)]) == 0
    capsys.readouterr()
    assert main(["calibrate", str(own), *arguments, str(again)]) == 0
    kept = load_checkpoint(own).temperature
    assert f"temperature {kept:g} kept: none fits the 12 pictures (all)" in capsys.readouterr().out
    assert load_checkpoint(again).temperature == kept


def test_all_pictures_that_were_not_learnt_from_are_fitted(
    folder: Path, pictures: PictureSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "small.safetensors", tmp_path / "own.safetensors"
    arguments = ["calibrate", str(source), "--data", str(folder), "--out", str(out)]
    seen = Split([0], [5], [])
    save_small(source, training={"seen": seen_pictures(seen, pictures)})
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "from 11 pictures (val+test): loss" in capsys.readouterr().out
    out.unlink()
    seen = Split([0, 1, 2, 3], [5, 6], [])
    save_small(source, training={"seen": seen_pictures(seen, pictures)})
    assert main([*arguments, "--device", "cpu"]) == 3
    told = capsys.readouterr().err
    assert f"holds 8 pictures: a temperature is fitted to {LEAST_PICTURES} or more" in told
    assert not out.exists()


def test_the_least_threshold_that_is_accurate_enough() -> None:
    curve = [Coverage(0.0, 1.0, 0.8), Coverage(0.5, 0.9, 0.95), Coverage(0.7, 0.7, 0.9)]
    curve += [Coverage(0.8, 0.6, 0.96), Coverage(0.9, 0.4, 0.99), Coverage(0.99, 0.0, None)]
    found = least_threshold(curve, 0.95)
    assert found is not None
    assert found.threshold == 0.8  # 0.5 is accurate enough too, but 0.7 above it is not
    assert least_threshold(curve, 0.999) is None
    assert least_threshold(curve, 0.5) == curve[0]


def test_the_report_says_which_threshold_can_be_trusted() -> None:
    curve = [Coverage(0.0, 1.0, 0.9), Coverage(0.9, 0.6, 0.995), Coverage(0.995, 0.1, 0.96)]
    found = Calibration(0.1, [], curve)
    assert "nearest comes 0.9, with 99.50 % right of the 60.00 %" in confidence_section(found, "")
    better = replace(found, coverage=curve[:2])
    assert "From 0.9 on at least 99 %" in confidence_section(better, "")
    nothing = replace(found, coverage=[Coverage(0.9, 0.0, None)])
    assert "There is no threshold from which on 99 %" in confidence_section(nothing, "")


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
    capsys.readouterr()
    assert main([*arguments, "--json", "-", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == facts  # it does not say what it saw
    assert main([*arguments, "--split", "test"]) == 2  # needs the run that divided them
