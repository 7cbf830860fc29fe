"""Resumption to the bit after a kill, longer runs, and two processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

from run_cases import (
    CPU,
    assert_same,
    assert_same_run,
    pictures,  # noqa: F401
    program_options,
    run,  # noqa: F401
    small,
    states,
)
from training_cases import (
    SIZE,
    one_thread,  # noqa: F401
    program_environment,
    run_program,
)

from mobilesteelnet.checkpoint import load_checkpoint
from mobilesteelnet.data import DataError, scan
from mobilesteelnet.evaluate import find_temperature, pick_split
from mobilesteelnet.lightning_modules import Classifier
from mobilesteelnet.run_folder import RunFolder
from mobilesteelnet.train import TrainConfig, TrainingError, resume, train

KILL_IN_EPOCH_3 = """
import os, signal, sys
from mobilesteelnet import lightning_modules
from mobilesteelnet.__main__ import main
step = lightning_modules.Classifier.training_step
def dying_step(self, batch, batch_index):
    if self.current_epoch == 2 and batch_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_index)
lightning_modules.Classifier.training_step = dying_step
sys.exit(main(sys.argv[1:]))
"""


def test_killed_in_the_third_epoch_and_resumed_is_the_same_run(
    pictures: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run_program(*program_options(pictures, whole, 4))
    assert done.returncode == 0, done.stderr
    arguments = [str(part) for part in program_options(pictures, cut, 4)]
    killed = subprocess.run(
        [sys.executable, "-c", KILL_IN_EPOCH_3, *arguments],
        env=program_environment(),
        check=False,
        capture_output=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(json.loads((cut / "history.json").read_text())) == 2
    state = json.loads((cut / "run.json").read_text())
    assert (state["state"], state["epochs"]) == ("running", 2)
    # Reading processes run ahead: they must begin with the third epoch's order too.
    done = run_program("train", "--resume", cut, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, cut)
    rows = [json.loads((path / "history.json").read_text()) for path in (whole, cut)]
    assert_same(*rows)
    again = run_program("train", "--resume", cut)
    assert again.returncode == 0
    assert "already finished" in again.stdout


def test_a_run_killed_before_its_first_epoch_starts_again(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(small(pictures, epochs=4), out, machine=CPU)
    for name in ("last.ckpt", "best.safetensors", "history.json", "run.json"):
        (out / name).unlink()
    assert not resume(out, machine=CPU).already_finished
    assert_same_run(run, out)


def test_early_stopping_survives_resumption(pictures: Path, tmp_path: Path) -> None:
    # So small a rate that the validation loss, once risen, can hardly fall again.
    config = small(pictures, epochs=40, patience=2, learning_rate=0.3, warmup_epochs=0)
    whole = train(config, tmp_path / "whole", machine=CPU)
    assert 3 <= len(whole.rows) < 40
    assert "not lower for 2 epochs" in whole.reason
    assert whole.best_epoch == len(whole.rows) - 2
    # A finished run whose run.json was lost by a kill is finished all the same.
    (tmp_path / "whole" / "run.json").unlink()
    again = resume(tmp_path / "whole", machine=CPU)
    assert again.already_finished
    assert again.reason == whole.reason


def test_a_finished_run_can_be_made_longer(run: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(small(pictures, epochs=2), out, machine=CPU)
    result = resume(out, epochs=4, machine=CPU)
    assert len(result.rows) == 4
    left, right = states(run)["state_dict"], states(out)["state_dict"]
    assert_same(left, right)


def test_a_cosine_keeps_its_length(pictures: Path, tmp_path: Path) -> None:
    train(small(pictures, epochs=1, schedule="cosine"), tmp_path / "run", machine=CPU)
    with pytest.raises(ValueError, match="epochs=3"):
        resume(tmp_path / "run", epochs=3, machine=CPU)


@pytest.mark.parametrize(
    ("options", "epochs", "words"),
    [
        ({"averaging": "swa"}, 3, "averaging='swa' keeps its length"),
        ({"small_size": SIZE // 2}, 3, "small_size=.* keeps its length"),
        ({}, 1, "epochs=1: 2 are done already"),
        ({"epochs": 3, "validate_every": 3}, 2, "none of the 2 that are done was validated"),
    ],
)
def test_what_length_a_run_cannot_have(
    pictures: Path, tmp_path: Path, options: dict[str, Any], epochs: int, words: str
) -> None:
    out, config = tmp_path / "run", small(pictures, **options)
    if config.epochs == 3:
        stop_after(2, config, out)
    else:
        train(config, out, machine=CPU)
    before = (out / "config.json").read_bytes()
    with pytest.raises(ValueError, match=words):
        resume(out, epochs=epochs, machine=CPU)
    assert (out / "config.json").read_bytes() == before


def stop_after(epochs: int, config: TrainConfig, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        step = Classifier.training_step

        def stop(self: Classifier, batch: Any, batch_index: int) -> Any:
            if self.current_epoch == epochs:
                raise KeyboardInterrupt
            return step(self, batch, batch_index)

        patch.setattr(Classifier, "training_step", stop)
        with pytest.raises(TrainingError, match=f"interrupted after {epochs} epochs"):
            train(config, out, machine=replace(CPU, precision="bf16-mixed"))


@pytest.mark.parametrize("older", [False, True])
def test_run_json_counts_the_epochs_of_a_resumed_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    out, step, seen = tmp_path / "run", Classifier.training_step, set()
    stop_after(1, small(pictures, epochs=3), out)
    state = json.loads((out / "run.json").read_text())
    assert (state["state"], state["epochs"], state["best_epoch"]) == ("interrupted", 1, 1)
    if older:  # than this record
        (out / "run.json").write_text('{"state": "running", "reason": "", "epochs": 0}')

    def watched(self: Classifier, batch: Any, batch_index: int) -> Any:
        facts = json.loads((out / "run.json").read_text())
        seen.add((facts["state"], facts["epochs"]))
        return step(self, batch, batch_index)

    monkeypatch.setattr(Classifier, "training_step", watched)
    resume(out, machine=CPU)
    assert seen == {("running", 1), ("running", 2)}
    assert json.loads((out / "run.json").read_text())["state"] == "finished"


def test_a_run_goes_on_where_its_pictures_and_first_weights_are_gone(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, weights = tmp_path / "here" / "set", tmp_path / "first.safetensors"
    shutil.copytree(pictures, here)
    shutil.copy(run / "best.safetensors", weights)
    monkeypatch.chdir(tmp_path)
    stop_after(1, small(here, init_from=weights.name), tmp_path / "run")
    weights.unlink()
    here.parent.rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(DataError, match="does not exist"):
        resume(tmp_path / "run", machine=CPU)
    result = resume(tmp_path / "run", data="set", machine=CPU)
    assert len(result.rows) == 2
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"] == str(tmp_path / "there" / "set")
    assert stored["init_from"] == str(weights)


def test_two_processes_train_one_network(pictures: Path, tmp_path: Path) -> None:
    options = program_options(pictures, tmp_path / "run", 2)
    done = run_program(*options[:-1], 2, "--strategy", "ddp")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run" / "history.json").read_text())
    assert len(rows) == 2
    # 4 pictures a class in training, so 2 a class and process: 6 in 2 steps of at most 5.
    assert states(tmp_path / "run")["global_step"] == 4
    assert done.stdout.count("finished after") == 1
    # Each process validates half of the pictures: the temperature is that of all of them.
    checkpoint = load_checkpoint(tmp_path / "run" / "best.safetensors")
    found = scan(pictures)
    indexes = pick_split(found, "val", RunFolder(tmp_path / "run"))
    assert checkpoint.temperature == pytest.approx(
        find_temperature(replace(checkpoint, temperature=1.0), found, indexes, least=1)[0],
        rel=1e-4,
    )
    resumed = run_program(
        *("train", "--resume", tmp_path / "run", "--epochs", 3, "--accelerator", "cpu"),
        *("--devices", 2, "--strategy", "ddp"),
    )
    assert resumed.returncode == 0, resumed.stderr
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())) == 3
