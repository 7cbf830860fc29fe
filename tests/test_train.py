"""Training: the protocol's arithmetic, randomness, run folders, and starting from weights."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")
import itertools

from run_cases import (
    CPU,
    assert_same,
    assert_same_run,
    pictures,  # noqa: F401
    run,  # noqa: F401
    small,
)
from torch.utils.data import Dataset
from training_cases import (
    CLASSES,
    SIZE,
    one_thread,  # noqa: F401
)

from mobilesteelnet.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from mobilesteelnet.data import scan, stratified_split
from mobilesteelnet.initialisation import build_model
from mobilesteelnet.lightning_modules import Classifier, EpochSampler, SeededDataset
from mobilesteelnet.run_folder import RunFolder
from mobilesteelnet.train import TrainConfig, train

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
        ("small_size", 225),  # above size
        ("small_size", 0),
        ("small_share", 1.0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -1.0),
        ("label_smoothing", 1.0),
        ("optimizer", "lion"),
        ("schedule", "step"),
        ("select", "best"),
        ("on_bad_file", "ignore"),
        ("augmentation", "auto"),
        ("crop_scale", 0.0),
        ("light", 1.0),
        ("mix", "both"),
        ("averaging", "mean"),
        ("average_decay", 1.0),
        ("dropout", 1.0),
        ("split_seed", -1),
        ("recalibrate_bn", 1),
        ("quarter_turns", 1),
        ("validate_every", 0),
        ("validate_every", 2),  # with patience
        ("averaging", "swa"),  # with patience
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
    from mobilesteelnet.evaluate import evaluate, find_temperature, pick_split

    found = scan(pictures)
    checkpoint = load_checkpoint(run / "best.safetensors")
    indexes = pick_split(found, "val", RunFolder(run))
    result = evaluate(replace(checkpoint, temperature=1.0), found, indexes)
    assert checkpoint.training["val_accuracy"] == pytest.approx(result.overall_accuracy)
    chances = [item.probabilities[CLASSES.index(item.true)] for item in result.predictions]
    loss = -sum(map(math.log, chances)) / len(chances)
    assert checkpoint.training["val_loss"] == pytest.approx(loss, rel=1e-4)
    assert result.loss == pytest.approx(loss)
    plain = replace(checkpoint, temperature=1.0)
    temperature, before, after = find_temperature(plain, found, indexes, least=1)
    assert checkpoint.temperature == pytest.approx(temperature, rel=2e-3)
    assert before.loss == pytest.approx(result.loss)
    assert before.average_accuracy == after.average_accuracy
    assert evaluate(checkpoint, found, indexes).loss == pytest.approx(after.loss, rel=1e-4)


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
    options = {"epochs": 40, "learning_rate": 1e-2, "batch_size": 4, "augmentation": "none"}
    recipe = {"activation": "relu", "bn_statistics": "pooled", "schedule": "cosine"}
    config = small(pictures, **options, **recipe, select="last")
    result = train(config, tmp_path / "run", machine=CPU)
    assert result.best_epoch == 40
    assert result.rows[-1]["train_loss"] < 0.6 * result.rows[0]["train_loss"]
    assert result.rows[-1]["val_accuracy"] > 0.6


# ------------------------------------------------------------------------------------ init_from


def test_fine_tuning_starts_from_the_weights(run: Path, pictures: Path) -> None:
    weights = load_checkpoint(run / "best.safetensors").model.state_dict()
    config = small(pictures, init_from=str(run / "best.safetensors"))
    assert_same(dict(build_model(config, CLASSES).state_dict()), dict(weights))
    other = build_model(config, ["a", "b"]).state_dict()
    assert other["fc.weight"].shape[0] == 2
    assert_same(other["stage1.0.pointwise.weight"], weights["stage1.0.pointwise.weight"])


def test_fine_tuning_gives_any_network_a_new_head(pictures: Path, tmp_path: Path) -> None:
    for network in ("resnet18", "mobilenetv2", "shufflenetv1"):
        plain = {"data": str(pictures), "network": network}
        source = build_model(TrainConfig(**plain), CLASSES)
        path = tmp_path / f"{network}.safetensors"
        facts: dict[str, Any] = {"classes": CLASSES, "input_size": 32, "training": {}}
        facts["normalisation"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
        save_checkpoint(path, source, **facts)
        config = TrainConfig(**plain, init_from=str(path), seed=5)
        weights = source.state_dict()
        for classes in (["a", "b"], ["a", "b", "c"]):
            found = build_model(config, classes).state_dict()
            unlike = {key for key in weights if not torch.equal(found[key], weights[key])}
            assert len({key.rpartition(".")[0] for key in unlike}) == 1, unlike  # one layer
            assert all(len(found[key]) == len(classes) for key in unlike)


def test_fine_tuning_needs_the_same_network(run: Path, pictures: Path, tmp_path: Path) -> None:
    config = small(pictures, init_from=str(run / "best.safetensors"), attention="none")
    with pytest.raises(CheckpointError, match="another network"):
        train(config, tmp_path / "run", machine=CPU)
    assert not (tmp_path / "run").exists()


def test_a_picture_taken_twice_weighs_nothing_and_a_short_batch_less() -> None:
    classifier = Classifier(torch.nn.Identity(), TrainConfig(data="none"))
    classifier.val_loss.update(torch.tensor([1.0, 0.0, 1.0, 9.0]), torch.tensor([1.0, 1, 1, 0]))
    classifier.val_accuracy.update(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    for loss, count in ((2.0, 71), (1.0, 1)):
        classifier.train_loss.update(torch.tensor(loss), count)
    assert float(classifier.val_loss.compute()) == pytest.approx(2 / 3)
    assert float(classifier.val_accuracy.compute()) == 1.0
    assert float(classifier.train_loss.compute()) == pytest.approx(143 / 72)
