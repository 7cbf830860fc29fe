"""The demonstration: from nothing, on one's own pictures, and over an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")
from training_cases import CLASSES, SIZE, WIDTH, error_line, make_pictures, one_thread  # noqa: F401

from mobilesteelnet.__main__ import main
from mobilesteelnet.data import DataError
from mobilesteelnet.demo import BUDGETS, run_demo
from mobilesteelnet.lightning_modules import Classifier, TrainingError
from mobilesteelnet.run_folder import RunFolderError


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on so small a budget that only its steps are tested."""
    import mobilesteelnet.demo

    small: dict[str, Any] = {**BUDGETS["tiny"], "width": WIDTH, "size": SIZE}
    monkeypatch.setitem(BUDGETS, "tiny", small)
    monkeypatch.setattr(mobilesteelnet.demo, "STEPS", {"tiny": 3})
    monkeypatch.setattr(mobilesteelnet.demo, "LEAST_EPOCHS", 1)
    monkeypatch.setattr(mobilesteelnet.demo, "SYNTHETIC", {"tiny": (8, 48)})


@pytest.mark.usefixtures("quick")
def test_demo_from_nothing_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    arguments = ["demo", "--budget", "tiny", "--out", str(out)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert str(out / "report" / "report.html") in said
    assert "average accuracy" in said
    assert len(json.loads((out / "predictions.json").read_text())["predictions"]) > 0
    weights = (out / "run" / "best.safetensors").read_bytes()
    page = (out / "report" / "report.html").read_text(encoding="utf-8")
    assert "synthetic" in page
    assert main(arguments) == 0
    assert (out / "run" / "best.safetensors").read_bytes() == weights
    assert main([*arguments, "--seed", "1"]) == 2
    assert "other settings" in error_line(capsys)
    assert main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert (out / "run" / "best.safetensors").read_bytes() != weights


@pytest.mark.usefixtures("quick")
def test_demo_on_own_pictures(tmp_path: Path) -> None:
    own = make_pictures(tmp_path / "own", per_class=10)
    result = run_demo(tmp_path / "demo", data=own, budget="tiny")
    assert result.evaluation.classes == CLASSES
    assert not (tmp_path / "demo" / "data").exists()
    assert result.report.is_file()


def test_demo_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(RunFolderError, match="holds no demo"):
            run_demo(tmp_path, budget="tiny", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.usefixtures("quick")
def test_a_demo_made_again_deletes_its_own_files_only(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    run_demo(out, budget="tiny")
    (out / "notes.txt").write_text("precious")
    for part in ("data", "run", next((out / "data").iterdir()).relative_to(out)):
        with pytest.raises(RunFolderError, match="lies in what --overwrite would delete"):
            run_demo(out, data=out / part, budget="tiny", overwrite=True)
    weights = (out / "run" / "best.safetensors").read_bytes()
    own = make_pictures(out / "own", per_class=10)
    result = run_demo(out, data=own, budget="tiny", overwrite=True)
    assert result.evaluation.classes == CLASSES
    assert (out / "run" / "best.safetensors").read_bytes() != weights
    assert (out / "notes.txt").read_text() == "precious"
    assert not (out / "data").exists()


@pytest.mark.usefixtures("quick")
def test_a_demo_that_failed_at_once_is_not_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, empty = tmp_path / "demo", tmp_path / "empty"
    empty.mkdir()
    assert main(["demo", "--data", str(empty), "--out", str(out)]) == 3
    error_line(capsys)
    assert not out.exists()
    few = make_pictures(tmp_path / "few", per_class=1)
    with pytest.raises(DataError, match="too few"):
        run_demo(out, data=few, budget="tiny")
    run_demo(out, data=make_pictures(tmp_path / "own", per_class=10), budget="tiny")
    page = (out / "report" / "report.html").read_bytes()
    with pytest.raises(DataError):  # with --overwrite too, what is there stays
        run_demo(out, data=empty, budget="tiny", overwrite=True)
    assert (out / "report" / "report.html").read_bytes() == page


@pytest.mark.usefixtures("quick")
def test_an_interrupted_demo_is_gone_on_with_as_a_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "training_step", interrupt)
    words = f"continue with: mobilesteelnet demo --out {out} --budget tiny --seed 42$"
    for _ in range(2):  # begun, and gone on with
        with pytest.raises(TrainingError, match=words):
            run_demo(out, budget="tiny")
    monkeypatch.undo()
    assert run_demo(out, budget="tiny").report.is_file()
