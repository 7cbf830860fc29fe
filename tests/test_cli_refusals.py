"""What the commands refuse before they work, and how they answer where nobody can read."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="typer is not installed")
pytest.importorskip("lightning", reason="lightning is not installed")

from run_cases import (
    CPU,
    pictures,  # noqa: F401
    program_options,
    run,  # noqa: F401
    small,
)
from training_cases import (
    CLASSES,
    ROOT,
    error_line,
    make_pictures,
    one_thread,  # noqa: F401
    save_small,
)

from fused import BackendError
from mobilesteelnet.__main__ import main
from mobilesteelnet.crossval import cross_validate
from mobilesteelnet.run_folder import RunFolder
from mobilesteelnet.train import train


def test_a_run_in_use_is_not_calibrated(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    before = (own / "best.safetensors").read_bytes()
    command = ["calibrate", str(own), "--device", "cpu"]
    with RunFolder(own).alone():
        for arguments in (command, [*command, "--out", str(own / "best.safetensors")]):
            assert main(arguments) == 2
            assert "is in use by another process" in error_line(capsys)
    assert (own / "best.safetensors").read_bytes() == before
    assert main([*command, "--split", "all"]) == 0


@pytest.mark.parametrize("damage", ["[]", "{}", '{"data": 1}', '{"data": ""}'])
def test_a_config_without_pictures_does_not_mean_this_folder(
    damage: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    (own / "config.json").write_text(damage)
    assert main(["eval", str(own), "--device", "cpu"]) == 2
    assert "config.json names no pictures" in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", ""], "an argument is empty"),
        (["train", "--data", ""], "--data is empty"),
        (["eval", "shipped", "--out="], "--out is empty"),
    ],
)
def test_an_empty_argument_is_not_this_folder(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in error_line(capsys)


def test_weights_are_not_put_among_the_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, source = make_pictures(tmp_path / "set"), tmp_path / "small.safetensors"
    save_small(source)
    shared = [str(source), "--data", str(pictures), "--device", "cpu", "--out"]
    for command, target in (("calibrate", "own.safetensors"), ("package-weights", "own")):
        assert main([command, *shared, str(pictures / target)]) == 2
        assert "lies in the pictures that are looked at" in error_line(capsys)
        assert not (pictures / target).exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--light 0.9", "light=0.9 changes nothing without augmentation=texture"),
        ("--crop-scale 0.3", "crop_scale=0.3 changes nothing"),
        ("--no-quarter-turns", "quarter_turns=False changes nothing"),
        ("--mix-alpha 0.3", "mix_alpha=0.3 changes nothing without mix=mixup or cutmix"),
        ("--momentum 0.8", "momentum=0.8 changes nothing without optimizer=sgd"),
        ("--averaging swa --average-decay 0.9", "average_decay=0.9 changes nothing without"),
        ("--average-from 0.5", "average_from=0.5 changes nothing without averaging=swa"),
        ("--small-share 0.5", "small_share=0.5 changes nothing without small_size"),
        ("--attention none --bn-statistics foo", "bn_statistics='foo', expected one of"),
        ("--activation foo", "expected one of none (None), relu"),
        ("--network foo --width 0.5", "network='foo': must be one of mobilesteelnet, resnet18"),
        ("--devices 2.5", "devices='2.5'"),
    ],
)
def test_train_refuses_what_would_change_nothing(
    options: str, words: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = [str(part) for part in program_options(pictures, out, 1)]
    assert main([*command, *options.split()]) == 2
    assert words in error_line(capsys)
    assert not out.exists()


def test_crossval_refuses_its_options_before_it_trains(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="folds=1, repeats=2"):
        cross_validate(small(pictures), tmp_path / "cv", folds=1, machine=CPU)
    command = ["crossval", "--data", str(pictures), "--out", str(tmp_path / "cv")]
    assert main([*command, "--set", "light=0.2"]) == 2
    assert "light=0.2 changes nothing" in error_line(capsys)
    assert not (tmp_path / "cv").exists()


def test_reproduce_looks_at_its_folders_before_it_trains(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    command = ["reproduce", "table4", "--data", str(pictures), "--runs", str(tmp_path / "runs")]
    assert main([*command, "--results", str(taken)]) == 6
    assert "is a file, not a folder" in error_line(capsys)
    assert not (tmp_path / "runs").exists()


def test_a_backend_that_cannot_run_leaves_a_failed_run(pictures: Path, tmp_path: Path) -> None:
    machine = dataclasses.replace(CPU, backend="triton")
    with pytest.raises(BackendError, match="backend='triton' cannot run"):
        train(small(pictures), tmp_path / "run", machine=machine)
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert state["state"] == "failed"
    assert "backend='triton' cannot run" in state["reason"]


@pytest.mark.parametrize("options", ["--network shufflenetv2", "--attention se --fusion none"])
def test_a_network_without_a_frozen_form_is_judged_as_it_is(
    options: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(part) for part in program_options(pictures, tmp_path / "run", 1)]
    if "network" in options:
        place = command.index("--width")
        del command[place : place + 2]
    assert main([*command, *options.split()]) == 0
    told = capsys.readouterr()
    assert f"pictures of 3 classes ({', '.join(CLASSES)}): class directories" in told.err
    assert main(["eval", str(tmp_path / "run"), "--no-report", "--device", "cpu"]) == 0


def test_names_that_the_outputs_encoding_lacks(tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "set", per_class=1)
    source = tmp_path / "small.safetensors"
    save_small(source)
    picture = next(folder.rglob("*.png"))
    strange = picture.rename(tmp_path / "錆.png")

    def told(*options: str) -> str:
        command = [sys.executable, "-m", "mobilesteelnet", "predict", str(source), str(strange)]
        done = subprocess.run(
            [*command, "--device", "cpu", *options],
            capture_output=True,
            timeout=120,
            check=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        )
        return done.stdout.decode("latin-1")

    assert "\\u9306.png" in told()
    assert strange.name in json.dumps(json.loads(told("--json", "-")), ensure_ascii=False)


def test_an_output_that_is_closed_is_told_of() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m mobilesteelnet info --json - >&-"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 6
    assert "error: the output: Bad file descriptor" in done.stderr
