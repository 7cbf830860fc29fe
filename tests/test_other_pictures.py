"""Pictures that are not those of a run, and results that would lie among pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="typer is not installed")
pytest.importorskip("lightning", reason="lightning is not installed")
from run_cases import CPU, pictures, run, small  # noqa: F401
from training_cases import error_line, make_pictures, one_thread  # noqa: F401

from mobilesteelnet.__main__ import main
from mobilesteelnet.data import DataError, scan
from mobilesteelnet.datacheck import contrast_box_plot
from mobilesteelnet.splits import Split, stratified_split
from mobilesteelnet.train import resume, train


@pytest.fixture
def finished(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to write into."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    return copy


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other pictures under the same names."""
    return make_pictures(tmp_path_factory.mktemp("other") / "others", seed=5)


def test_a_recorded_split_knows_its_pictures(pictures: Path, others: Path) -> None:
    here, there = scan(pictures), scan(others)
    record = json.loads(json.dumps(stratified_split(here, (0.5, 0.25, 0.25)).to_dict(here)))
    assert Split.from_dict(record, here).train
    with pytest.raises(DataError, match=r"24 pictures .* have other pixels in .*others"):
        Split.from_dict(record, there)
    del record["pixels"]  # as earlier versions wrote it
    assert Split.from_dict(record, there).train


def test_a_run_does_not_go_on_with_other_pictures(finished: Path, others: Path) -> None:
    before = (finished / "config.json").read_bytes()
    with pytest.raises(DataError, match="these are other pictures"):
        resume(finished, epochs=9, data=others, machine=CPU)
    assert (finished / "config.json").read_bytes() == before


def test_all_of_another_set_is_judged(
    finished: Path,
    pictures: Path,
    others: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rest = ["--device", "cpu", "--no-report"]
    assert main(["eval", str(finished), "--data", str(others), *rest]) == 0
    found = json.loads((finished / "eval-all" / "evaluation.json").read_text())
    assert (found["split"], len(found["predictions"])) == ("all", 24)
    assert main(["eval", str(finished), "--split", "val", "--data", str(others), *rest]) == 3
    assert "these are other pictures" in error_line(capsys)
    # The run's own pictures and new ones: its test part, and a word about the others.
    mixed = tmp_path / "mixed"
    shutil.copytree(pictures, mixed)
    for path in others.glob("*/*_1.png"):
        shutil.copy(path, mixed / path.parent.name / f"new_{path.name}")
    assert main(["eval", str(finished), "--data", str(mixed), *rest]) == 0
    assert "3 pictures that are in no part of the run are left out" in capsys.readouterr().err
    found = json.loads((finished / "eval-test" / "evaluation.json").read_text())
    assert len(found["predictions"]) == 6


def test_nothing_is_written_among_the_pictures(
    finished: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(others, mine)
    with pytest.raises(ValueError, match=r"out=.*lies in the pictures"):
        train(small(mine), mine / "run", machine=CPU)
    inside = str(mine / "report")
    commands = [
        ["eval", str(finished), "--data", str(mine), "--out", inside],
        ["demo", "--data", str(mine), "--budget", "tiny", "--out", inside],
        ["data", "check", str(mine), "--plot", str(mine / "lines" / "box.png")],
    ]
    for command in commands:
        assert main(command) == 2, command
        assert "lies in the pictures that are looked at" in error_line(capsys)
    assert sorted(path.name for path in mine.iterdir()) == ["dark", "lines", "noise"]


def test_reports_that_cannot_be_written_are_refused_first(
    finished: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for target in (file, file / "below"):
        assert main(["eval", str(finished), "--data", str(others), "--out", str(target)]) == 6
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "file is a file, not a folder" in captured.err
    assert file.read_text() == "mine"


def test_a_folder_with_settings_of_another_program_is_pictures(
    others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plates = tmp_path / "plates"
    shutil.copytree(others / "lines", plates)
    (plates / "config.json").write_text('{"camera": 1}')
    assert main(["predict", str(plates), "--csv", "-", "--batch-size", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9


def test_a_picture_of_two_classes_is_told_of(
    others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(others, mine)
    for number in (1, 2):
        shutil.copy(mine / "lines" / f"lines_{number}.png", mine / "noise" / f"x_{number}.png")
    options = ["--fractions", "0.5,0.25,0.25", "--epochs", "1", "--accelerator", "cpu"]
    options += ["--width", "0.125", "--size", "32", "--batch-size", "5"]
    assert main(["train", "--data", str(mine), "--out", str(tmp_path / "run"), *options]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "2 pictures are the same in lines, noise: data check tells which" in said


def test_an_unfinished_box_plot_leaves_the_earlier_one(
    others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    target = tmp_path / "box.png"
    target.write_bytes(b"earlier")

    def full(self: object, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left") as caught:
        contrast_box_plot(scan(others), target)
    assert caught.value.filename == str(target)
    assert target.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [target]
