"""Training: what goes wrong gets one clear error and loses nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

from run_cases import (
    CPU,
    pictures,  # noqa: F401
    program_options,
    run,  # noqa: F401
    small,
    states,
)
from training_cases import (
    one_thread,  # noqa: F401
    program_environment,
)

from mobilesteelnet import callbacks
from mobilesteelnet.checkpoint import load_checkpoint
from mobilesteelnet.data import DataError
from mobilesteelnet.lightning_modules import TrainingError
from mobilesteelnet.run_folder import RunFolder, RunFolderError
from mobilesteelnet.runs import delete_runs
from mobilesteelnet.train import resume, train


def test_a_folder_in_use_is_refused(run: Path, pictures: Path, tmp_path: Path) -> None:
    before = (run / "best.safetensors").read_bytes()
    with pytest.raises(RunFolderError, match="--resume"):
        train(small(pictures), run, machine=CPU)
    assert (run / "best.safetensors").read_bytes() == before
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RunFolderError, match="refusing to delete"):
        train(small(pictures), tmp_path, machine=CPU, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    # Other programs have a config.json too.
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RunFolderError, match="refusing to delete"):
        train(small(pictures), tmp_path, machine=CPU, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(RunFolderError, match="is a file"):
        train(small(pictures), tmp_path / "mine.txt", machine=CPU)


def test_overwrite_starts_again_only_when_the_data_are_sound(
    pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(small(pictures, epochs=1), out, machine=CPU)
    with pytest.raises(DataError):
        train(small(tmp_path / "none"), out, machine=CPU, overwrite=True)
    assert (out / "best.safetensors").exists()
    (out / "last.ckpt").write_bytes(b"damaged")
    (out / "eval-test").mkdir()
    (out / ".last.ckpt.x1.part").write_bytes(b"left by a kill")
    (out / "notes.txt").write_text("precious")
    result = train(small(pictures, epochs=1, seed=7), out, machine=CPU, overwrite=True)
    assert (out / "notes.txt").read_text() == "precious"
    assert not (out / "eval-test").exists()
    assert not (out / ".last.ckpt.x1.part").exists()
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "split.json").write_text("{}")
    delete_runs([begun])
    assert list(begun.iterdir()) == []
    with pytest.raises(RunFolderError, match=r"'notes\.txt' lies in it too"):
        delete_runs([out])
    assert (out / "best.safetensors").exists()
    assert json.loads((out / "config.json").read_text())["seed"] == 7
    assert len(result.rows) == 1


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilesteelnet.model import MobileSteelNet

    forward = MobileSteelNet.forward
    calls = {"training": 0}

    def poisoned(self: MobileSteelNet, images: torch.Tensor) -> torch.Tensor:
        calls["training"] += self.training
        logits = forward(self, images)
        return logits * math.nan if calls["training"] == 5 else logits

    monkeypatch.setattr(MobileSteelNet, "forward", poisoned)
    with pytest.raises(TrainingError, match=r"not finite at epoch 2, step 2 \(global step 5\)"):
        train(small(pictures), tmp_path / "run", machine=CPU)
    assert load_checkpoint(tmp_path / "run" / "best.safetensors").training["epoch"] == 1
    monkeypatch.undo()
    assert len(resume(tmp_path / "run", machine=CPU).rows) == 2


def test_a_run_folder_that_cannot_be_written(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the second epoch: one clear error, and the first epoch is still there."""
    out = tmp_path / "run"
    real = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "last.ckpt" and Path(target).exists():
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        TrainingError, match=r"disk is full.*No space left.*epoch is kept.*--resume"
    ):
        train(small(pictures), out, machine=CPU)
    monkeypatch.undo()
    assert states(out)["global_step"] == 3
    assert not list(out.glob("*.part"))
    assert len(resume(out, machine=CPU).rows) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_disk_that_is_full_from_the_beginning(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch says of it is "unexpected pos", and there is no epoch to keep."""
    out = tmp_path / "run"
    monkeypatch.setattr(callbacks, "write_atomically", lambda _, write: write(Path("/dev/full")))
    words = (
        rf"disk is full: the run folder '{out}' .*No space left.*no epoch was finished.*--resume"
    )
    with pytest.raises(TrainingError, match=words):
        train(small(pictures), out, machine=CPU)
    state = json.loads((out / "run.json").read_text())
    assert (state["state"], state["epochs"]) == ("failed", 0)
    monkeypatch.undo()
    assert len(resume(out, machine=CPU).rows) == 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_how_to_go_on(pictures: Path, tmp_path: Path, how: int) -> None:
    out = tmp_path / "run"
    options = [*map(str, program_options(pictures, out, 500)), "--precision", "bf16-mixed"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mobilesteelnet", *options],
        env=program_environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C and hands that down to what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "error: interrupted after" in errors
    assert f"mobilesteelnet train --resume {out} --precision bf16-mixed" in errors
    assert "Traceback" not in errors
    state, rows = json.loads((out / "run.json").read_text()), RunFolder(out).read_rows()
    assert state["state"] == "interrupted"
    # A row is written before last.ckpt, and the epoch counts after it: see RunWriter.
    assert 1 <= state["epochs"] <= len(rows) <= state["epochs"] + 1


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"data": 3}', "null"])
def test_a_damaged_config_is_a_run_folder_error(tmp_path: Path, damage: str) -> None:
    (tmp_path / "split.json").write_text("{}")
    (tmp_path / "config.json").write_text(damage)
    with pytest.raises(RunFolderError, match=r"config\.json"):
        resume(tmp_path, machine=CPU)


def test_a_damaged_training_state_is_a_training_error(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(small(pictures, epochs=1), out, machine=CPU)
    (out / "last.ckpt").write_bytes(b"\x00" * 50)
    with pytest.raises(TrainingError, match="no training state"):
        resume(out, epochs=2, machine=CPU)


def test_resuming_nothing(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "not a folder"), (tmp_path, "holds no run")):
        with pytest.raises(RunFolderError, match=message):
            resume(path, machine=CPU)


@pytest.mark.parametrize(
    "options", [{"precision": "12-bit"}, {"strategy": "magic"}, {"accelerator": "abacus"}]
)
def test_impossible_machines(pictures: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="are not possible: "):
        train(small(pictures), tmp_path / "run", machine=replace(CPU, **options))
    assert not (tmp_path / "run").exists()


def test_too_few_pictures_for_the_split(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fractions"):
        train(small(pictures, fractions=(0.05, 0.05, 0.90)), tmp_path / "run", machine=CPU)
    assert not (tmp_path / "run").exists()
