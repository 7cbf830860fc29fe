"""Training: the protocol's arithmetic, run folders, resumption to the bit, and what goes wrong."""

from __future__ import annotations

import csv
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
import itertools

from torch.utils.data import Dataset
from training_cases import (
    CLASSES,
    SIZE,
    WIDTH,
    make_pictures,
    one_thread,  # noqa: F401
    program_environment,
    run_program,
)

from mobilesteelnet.checkpoint import CheckpointError, load_checkpoint
from mobilesteelnet.data import DataError, scan, stratified_split
from mobilesteelnet.lightning_modules import EpochSampler, SeededDataset, TrainingError
from mobilesteelnet.run_folder import RunFolder, RunFolderError
from mobilesteelnet.train import Machine, TrainConfig, build_model, resume, train

SMALL: dict[str, Any] = {
    "width": WIDTH,
    "size": SIZE,
    "fractions": (0.5, 0.25, 0.25),
    "batch_size": 5,
    "epochs": 2,
    "warmup_epochs": 1,
    "patience": 0,
}
CPU = Machine(accelerator="cpu", devices="1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("set") / "pictures")


def small(pictures: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"data": str(pictures), **SMALL, **changes})


def states(run: Path) -> dict[str, Any]:
    return torch.load(run / "last.ckpt", weights_only=True)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal to the bit, through lists and dicts; times may differ."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"seconds"}:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}[{place}]")
    else:
        assert one == other, where


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()
    left, right = states(one), states(other)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step"):
        assert_same(left[part], right[part], part)


# ------------------------------------------------------------------------------------- protocol


def test_the_defaults_are_the_papers_protocol() -> None:
    config = TrainConfig(data="x")
    assert config.fractions == (0.05, 0.05, 0.90)
    assert (config.seed, config.size, config.epochs, config.batch_size) == (42, 224, 200, 32)
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adam", 1e-3, 1e-4)
    assert (config.patience, config.select, config.schedule) == (10, "val_loss", "none")
    assert (config.attention, config.fusion, config.activation) == ("ciema", "msff", None)
    assert (config.bn_statistics, config.width, config.label_smoothing) == ("sequential", 1.0, 0.0)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_learning_rate_warms_up_linearly_then_stays_or_falls() -> None:
    constant = TrainConfig(data="x", epochs=10, warmup_epochs=2)
    factors = [constant.learning_rate_factor(step, 3) for step in range(30)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert set(factors[6:]) == {1.0}
    cosine = replace(constant, schedule="cosine")
    factors = [cosine.learning_rate_factor(step, 3) for step in range(31)]
    assert factors[6] == 1
    assert factors[18] == pytest.approx(0.5)
    assert factors[30] == pytest.approx(0)
    assert all(a > b for a, b in itertools.pairwise(factors[6:]))
    assert replace(constant, warmup_epochs=0).learning_rate_factor(0, 3) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", -1),
        ("seed", -1),
        ("size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -1.0),
        ("label_smoothing", 1.0),
        ("optimizer", "lion"),
        ("schedule", "step"),
        ("select", "best"),
        ("on_bad_file", "ignore"),
        ("fractions", (0.5, 0.5)),
        ("fractions", (0.5, 0.0, 0.5)),
        ("fractions", (0.5, 0.6, 0.1)),
        ("fractions", (math.nan, 0.5, 0.5)),
        ("patience", True),
    ],
)
def test_each_bad_option_is_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        TrainConfig(data="x", **{option: value})


def test_unknown_options_of_a_stored_config() -> None:
    with pytest.raises(ValueError, match="colour"):
        TrainConfig.from_dict({"data": "x", "colour": 1})


# ----------------------------------------------------------------------------------- randomness


class Draw(Dataset[tuple[torch.Tensor, int]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.rand(4), index


def test_random_numbers_depend_on_seed_epoch_and_index_only() -> None:
    data = SeededDataset(Draw(), seed=1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = data[0, 5, True][0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(100)
    assert torch.equal(data[0, 5, True][0], first)
    others = [data[1, 5, True][0], data[0, 6, True][0], SeededDataset(Draw(), 2)[0, 5, True][0]]
    assert not any(torch.equal(other, first) for other in others)


@pytest.mark.parametrize(("length", "world"), [(10, 1), (10, 2), (10, 3), (1, 4), (7, 7)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_an_epoch_and_count_each_picture_once(
    length: int, world: int, shuffle: bool
) -> None:
    samplers = [
        EpochSampler(length, seed=1, shuffle=shuffle, rank=rank, world_size=world)
        for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(4)
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])}
    counted = sorted(index for share in shares for epoch, index, counts in share if counts)
    assert counted == list(range(length))
    assert {epoch for share in shares for epoch, _, _ in share} == {4}


def test_each_epoch_has_its_own_order() -> None:
    sampler = EpochSampler(50, seed=1, shuffle=True)
    first = [index for _, index, _ in sampler]
    assert [index for _, index, _ in sampler] == first
    sampler.set_epoch(1)
    assert [index for _, index, _ in sampler] != first


# ------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs in one go, by Python; the resumption tests compare with it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(small(pictures, epochs=4), out, machine=CPU)
    return out


def test_a_run_leaves_its_files(run: Path, pictures: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.json", "split.json", "run.json", "metrics.csv", "history.json"),
        *("best.safetensors", "last.ckpt", "tensorboard"),
    }
    rows = json.loads((run / "history.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    with (run / "metrics.csv").open() as handle:
        table = list(csv.DictReader(handle))
    assert [float(row["val_loss"]) for row in table] == [row["val_loss"] for row in rows]
    state = json.loads((run / "run.json").read_text())
    assert (state["state"], state["epochs"]) == ("finished", 4)
    assert next((run / "tensorboard").glob("events.*")).stat().st_size > 0
    checkpoint = load_checkpoint(run / "best.safetensors")
    best = min(rows, key=lambda row: row["val_loss"])
    assert checkpoint.training["epoch"] == best["epoch"] == state["best_epoch"]
    assert checkpoint.classes == CLASSES
    assert checkpoint.input_size == SIZE
    assert str(pictures.parent) not in json.dumps(checkpoint.training)
    found = scan(pictures)
    split = stratified_split(found, (0.5, 0.25, 0.25), 42)
    assert json.loads((run / "split.json").read_text()) == split.to_dict(found)


def test_validation_figures_are_those_of_the_saved_network(run: Path, pictures: Path) -> None:
    from mobilesteelnet.evaluate import evaluate, pick_split

    found = scan(pictures)
    checkpoint = load_checkpoint(run / "best.safetensors")
    result = evaluate(checkpoint, found, pick_split(found, "val", RunFolder(run)))
    assert checkpoint.training["val_accuracy"] == pytest.approx(result.overall_accuracy)
    chances = [item.probabilities[CLASSES.index(item.true)] for item in result.predictions]
    loss = -sum(map(math.log, chances)) / len(chances)
    assert checkpoint.training["val_loss"] == pytest.approx(loss, rel=1e-4)


def test_the_same_seed_gives_the_same_run_with_any_workers(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    train(small(pictures, epochs=4), tmp_path / "again", machine=replace(CPU, workers=2))
    assert_same_run(run, tmp_path / "again")


def test_another_seed_gives_another_run(run: Path, pictures: Path, tmp_path: Path) -> None:
    train(small(pictures, epochs=1, seed=43), tmp_path / "other", machine=CPU)
    rows = json.loads((run / "history.json").read_text())
    other = json.loads((tmp_path / "other" / "history.json").read_text())
    assert other[0]["train_loss"] != rows[0]["train_loss"]


def test_it_learns(pictures: Path, tmp_path: Path) -> None:
    options = {"epochs": 40, "learning_rate": 1e-2, "batch_size": 4, "augment": False}
    recipe = {"activation": "relu", "bn_statistics": "pooled", "schedule": "cosine"}
    config = small(pictures, **options, **recipe, select="last")
    result = train(config, tmp_path / "run", machine=CPU)
    assert result.best_epoch == 40
    assert result.rows[-1]["train_loss"] < 0.6 * result.rows[0]["train_loss"]
    assert result.rows[-1]["val_accuracy"] > 0.6


def program_options(pictures: Path, out: Path, epochs: int) -> list[object]:
    options = ["--epochs", epochs, "--width", WIDTH, "--size", SIZE, "--batch-size", 5]
    options += ["--fractions", "0.5,0.25,0.25", "--warmup-epochs", 1, "--patience", 0]
    options += ["--accelerator", "cpu", "--devices", 1]
    return ["train", "--data", pictures, "--out", out, *options]


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
    assert json.loads((cut / "run.json").read_text())["state"] == "running"
    done = run_program("train", "--resume", cut)
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


def test_two_processes_train_one_network(pictures: Path, tmp_path: Path) -> None:
    options = program_options(pictures, tmp_path / "run", 2)
    done = run_program(*options[:-1], 2, "--strategy", "ddp")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run" / "history.json").read_text())
    assert len(rows) == 2
    # 4 pictures a class in training, so 2 a class and process: 6 in 2 steps of at most 5.
    assert states(tmp_path / "run")["global_step"] == 4
    assert done.stdout.count("finished after") == 1
    resumed = run_program(
        *("train", "--resume", tmp_path / "run", "--epochs", 3, "--accelerator", "cpu"),
        *("--devices", 2, "--strategy", "ddp"),
    )
    assert resumed.returncode == 0, resumed.stderr
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())) == 3


# ------------------------------------------------------------------------------------ init_from


def test_fine_tuning_starts_from_the_weights(run: Path, pictures: Path) -> None:
    weights = load_checkpoint(run / "best.safetensors").model.state_dict()
    config = small(pictures, init_from=str(run / "best.safetensors"))
    assert_same(dict(build_model(config, CLASSES).state_dict()), dict(weights))
    other = build_model(config, ["a", "b"]).state_dict()
    assert other["fc.weight"].shape[0] == 2
    assert_same(other["stage1.0.pointwise.weight"], weights["stage1.0.pointwise.weight"])


def test_fine_tuning_needs_the_same_network(run: Path, pictures: Path, tmp_path: Path) -> None:
    config = small(pictures, init_from=str(run / "best.safetensors"), attention="none")
    with pytest.raises(CheckpointError, match="another network"):
        train(config, tmp_path / "run", machine=CPU)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------- what goes wrong


def test_a_folder_in_use_is_refused(run: Path, pictures: Path, tmp_path: Path) -> None:
    before = (run / "best.safetensors").read_bytes()
    with pytest.raises(RunFolderError, match="--resume"):
        train(small(pictures), run, machine=CPU)
    assert (run / "best.safetensors").read_bytes() == before
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RunFolderError, match="refusing to delete"):
        train(small(pictures), tmp_path, machine=CPU, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "precious"
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
    result = train(small(pictures, epochs=1, seed=7), out, machine=CPU, overwrite=True)
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
    with pytest.raises(TrainingError, match=r"No space left.*--resume"):
        train(small(pictures), out, machine=CPU)
    monkeypatch.undo()
    assert states(out)["global_step"] == 3
    assert not list(out.glob("*.part"))
    assert len(resume(out, machine=CPU).rows) == 2


def test_ctrl_c_says_how_to_go_on(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "mobilesteelnet", *map(str, program_options(pictures, out, 500))],
        env=program_environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C and hands that down to what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "error: interrupted after" in errors
    assert f"mobilesteelnet train --resume {out}" in errors
    assert "Traceback" not in errors
    assert len(RunFolder(out).read_rows()) >= 1


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"data": 3, "epochs": "x"}', "null"])
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
    with pytest.raises(ValueError, match="machine's options are not possible"):
        train(small(pictures), tmp_path / "run", machine=replace(CPU, **options))
    assert not (tmp_path / "run").exists()


def test_too_few_pictures_for_the_split(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fractions"):
        train(small(pictures, fractions=(0.05, 0.05, 0.90)), tmp_path / "run", machine=CPU)
    assert not (tmp_path / "run").exists()
