"""The options of a recipe: averages of weights, recalibration, mixing, textures, named sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")
from PIL import Image
from run_cases import (
    CPU,
    SMALL,
    assert_same,
    assert_same_run,
    pictures,  # noqa: F401
    program_options,
    small,
    states,
)
from torch.optim.swa_utils import update_bn
from training_cases import (
    CLASSES,
    SIZE,
    one_thread,  # noqa: F401
    run_program,
)

import fused
from fused.backends.reference.published import PublishedCIEMA
from mobilesteelnet import figures
from mobilesteelnet.averaging import KeptNetwork
from mobilesteelnet.checkpoint import load_checkpoint
from mobilesteelnet.data import PictureDataset, eval_transform, scan, texture_transform
from mobilesteelnet.initialisation import build_model
from mobilesteelnet.lightning_modules import Classifier
from mobilesteelnet.recipes import CANDIDATES, RECIPES, parse_settings, recipe_options
from mobilesteelnet.run_folder import RunFolder
from mobilesteelnet.train import TrainConfig, TrainingError, resume, train

Weights = dict[str, torch.Tensor]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """The weights after each step of the runs of a test."""
    seen: list[Weights] = []
    original = KeptNetwork.on_train_batch_end

    def spy(self: KeptNetwork, trainer: Any, pl_module: Any, *rest: Any) -> None:
        seen.append({key: t.clone() for key, t in pl_module.model.state_dict().items()})
        original(self, trainer, pl_module, *rest)

    monkeypatch.setattr(KeptNetwork, "on_train_batch_end", spy)
    return seen


def kept(run: Path) -> Weights:
    return dict(load_checkpoint(run / "best.safetensors").model.state_dict())


def parameters(weights: Weights) -> Weights:
    return {k: t for k, t in weights.items() if "running" not in k and "tracked" not in k}


def test_the_moving_average_is_one(pictures: Path, tmp_path: Path, steps: list[Weights]) -> None:
    config = small(pictures, averaging="ema", average_decay=0.7, select="last", epochs=2)
    train(config, tmp_path / "run", machine=CPU)
    average = dict(steps[0])
    for weights in steps[1:]:
        average = {
            key: 0.7 * average[key] + 0.3 * tensor if tensor.is_floating_point() else tensor
            for key, tensor in weights.items()
        }
    found = kept(tmp_path / "run")
    for key, tensor in average.items():
        if "tracked" not in key:
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)
    assert_same(
        dict(states(tmp_path / "run")["state_dict"]),
        {f"model.{k}": t for k, t in steps[-1].items()},
    )


def test_swa_is_the_mean_of_the_last_epochs(
    pictures: Path, tmp_path: Path, steps: list[Weights]
) -> None:
    config = small(pictures, averaging="swa", average_from=0.5, select="last", epochs=4)
    train(config, tmp_path / "run", machine=CPU)
    last_two = [parameters(weights) for weights in (steps[len(steps) * 3 // 4 - 1], steps[-1])]
    found = parameters(kept(tmp_path / "run"))
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, (last_two[0][key] + last_two[1][key]) / 2)


def test_recalibrated_norms_fit_the_training_pictures(
    pictures: Path, tmp_path: Path, steps: list[Weights]
) -> None:
    config = small(pictures, recalibrate_bn=True, select="last", epochs=2)
    result = train(config, tmp_path / "run", machine=CPU)
    found = kept(tmp_path / "run")
    assert_same(parameters(found), parameters(steps[-1]))
    pictures_ = scan(pictures)
    split = RunFolder(result.run).read_json(result.run / "split.json")
    names = [item.name for item in pictures_.items]
    data = PictureDataset(
        pictures_, sorted(names.index(name) for name in split["train"]), eval_transform(SIZE)
    )
    stem = build_model(config, CLASSES).initial_conv  # type: ignore[union-attr]
    stem.load_state_dict({k[13:]: t for k, t in found.items() if k.startswith("initial_conv.")})
    images = torch.stack([data[i][0] for i in range(len(data))])
    maps = [stem[0](batch).mean((0, 2, 3)) for batch in images.split(config.batch_size)]
    torch.testing.assert_close(found["initial_conv.1.running_mean"], torch.stack(maps).mean(0))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_norms_of_a_network_in_another_precision_are_recalibrated(
    precision: str, pictures: Path, tmp_path: Path
) -> None:
    config = small(pictures, recalibrate_bn=True, select="last", epochs=1)
    result = train(config, tmp_path / "run", machine=replace(CPU, precision=precision))
    assert len(result.rows) == 1


@pytest.mark.parametrize("statistics", ["sequential", "pooled"])
def test_recalibrated_ciema_is_that_of_the_published_form(statistics: str) -> None:
    """The fused layer's buffers follow torch's `update_bn` as child modules would."""
    torch.manual_seed(0)
    block = fused.FusedCIEMA(16, 4, bn_statistics=statistics)
    published = PublishedCIEMA(16, 4, bn_statistics=statistics)
    published.load_state_dict(block.state_dict())
    batches = [torch.randn(count, 16, 6, 5) for count in (3, 2)]
    update_bn(batches, block)
    update_bn(batches, published)
    found = block.state_dict()
    for key, tensor in published.state_dict().items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    assert not torch.equal(found["final_fusion.1.running_mean"], torch.zeros(16))


@pytest.mark.parametrize(
    "options",
    [
        {"averaging": "ema", "average_decay": 0.8},
        {"averaging": "swa", "average_from": 0.3},
        {"recalibrate_bn": True, "mix": "cutmix", "augmentation": "texture", "dropout": 0.3},
        {"mix": "mixup", "schedule": "cosine"},
        {"small_size": 24, "small_share": 0.5, "recalibrate_bn": True},
        {"validate_every": 3, "averaging": "swa", "average_from": 0.0, "select": "last"},
    ],
)
def test_a_run_cut_off_gives_the_same(
    pictures: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(pictures, epochs=4, **options)
    train(config, tmp_path / "whole", machine=CPU)
    original = Classifier.on_train_batch_start

    def stop(self: Classifier, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_train_batch_start", stop)
        with pytest.raises(TrainingError, match="interrupted"):
            train(config, tmp_path / "cut", machine=CPU)
    resume(tmp_path / "cut", machine=CPU)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_the_first_epochs_see_smaller_pictures(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []
    original = Classifier.training_step

    def step(self: Classifier, batch: Any, batch_index: int) -> torch.Tensor:
        seen.append((self.current_epoch, tuple(batch[0].shape[2:])))
        return original(self, batch, batch_index)

    monkeypatch.setattr(Classifier, "training_step", step)
    for augmentation in ("published", "texture", "none"):
        config = small(
            pictures, epochs=3, small_size=24, small_share=0.7, augmentation=augmentation
        )
        result = train(config, tmp_path / augmentation, machine=CPU)
        assert load_checkpoint(result.checkpoint).input_size == config.size
    own = (config.size, config.size)
    assert set(seen) == {(0, (24, 24)), (1, (24, 24)), (2, own)}


def test_validation_of_some_epochs_only(pictures: Path, tmp_path: Path) -> None:
    options = {"epochs": 5, "validate_every": 2, "averaging": "swa", "average_from": 0.2}
    result = train(small(pictures, **options), tmp_path / "run", machine=CPU)
    assert [row["val_loss"] is not None for row in result.rows] == [False, True, False, True, True]
    assert all(row["train_loss"] > 0 for row in result.rows)
    assert result.best_epoch in (2, 4, 5)
    card = load_checkpoint(result.checkpoint).training
    assert card["val_loss"] == result.rows[result.best_epoch - 1]["val_loss"]
    every = train(
        small(pictures, **{**options, "validate_every": 1}), tmp_path / "all", machine=CPU
    )
    for sparse, dense in zip(result.rows, every.rows, strict=True):
        assert sparse["train_loss"] == dense["train_loss"]
        assert sparse["val_loss"] in (None, dense["val_loss"])
    figures.training_curves(result.rows, result.best_epoch)
    table = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert table[1].split(",")[3] == ""


def test_mixing_blends_pictures_and_labels() -> None:
    config = TrainConfig(data="x", mix="mixup", mix_alpha=1.0, width=0.0625)
    module = Classifier(build_model(config, CLASSES), config)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(1)
    blended, shares = module._mix(images, labels)
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    share = float(shares[1, 1])
    assert 0 < share < 1
    torch.testing.assert_close(blended[1], share * images[1] + (1 - share) * images[0])


def test_textures_are_turned_but_keep_their_grey() -> None:
    grey = np.tile(np.linspace(0, 250, 64).astype(np.uint8), (64, 1))
    picture = Image.fromarray(grey).convert("RGB")
    transform = texture_transform(32, mean=(0, 0, 0), std=(1, 1, 1), crop_scale=0.6)
    torch.manual_seed(0)
    drawn = [transform(picture) for _ in range(60)]
    assert {tuple(image.shape) for image in drawn} == {(3, 32, 32)}
    assert {image.dtype for image in drawn} == {torch.float32}
    noisy = [image for image in drawn if not torch.equal(image[0], image[1])]
    assert 0 < len(noisy) < 30
    across = [float((image[0, :, 1:] - image[0, :, :-1]).mean()) for image in drawn]
    down = [float((image[0, 1:] - image[0, :-1]).mean()) for image in drawn]
    for slopes in (across, down):  # each of the four directions comes
        assert min(slopes) < -0.003
        assert max(slopes) > 0.003
    upright = texture_transform(32, mean=(0, 0, 0), std=(1, 1, 1), quarter_turns=False)
    slopes = [
        float((image[0, 1:] - image[0, :-1]).mean()) for image in map(upright, [picture] * 30)
    ]
    assert max(map(abs, slopes)) < 0.003
    with pytest.raises(ValueError, match=r"crop_scale=0"):
        texture_transform(32, crop_scale=0)


def test_light_says_how_far_textures_are_lit() -> None:
    picture = Image.fromarray(np.full((64, 64), 100, np.uint8)).convert("RGB")
    for light in (0.0, 0.3, 0.6):
        transform = texture_transform(16, mean=(0, 0, 0), std=(1, 1, 1), light=light)
        torch.manual_seed(0)
        # The median: noise comes upon some.
        levels = [255 * float(transform(picture).median()) for _ in range(80)]
        assert 100 * (1 - light) - 3 < min(levels) < 100 * (1 - 0.8 * light) + 3
        assert 100 * (1 + 0.8 * light) - 3 < max(levels) < 100 * (1 + light) + 3
    for light in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"light={light}"):
            texture_transform(32, light=light)


def test_the_split_may_have_a_seed_of_its_own(pictures: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        train(small(pictures, seed=seed, split_seed=7, epochs=1), tmp_path / str(seed), machine=CPU)
    one, other = (RunFolder(tmp_path / str(seed)) for seed in (1, 2))
    assert one.read_json(one.split) == other.read_json(other.split)
    assert one.read_rows()[0]["train_loss"] != other.read_rows()[0]["train_loss"]


def test_every_named_recipe_is_legal() -> None:
    for options in (*RECIPES.values(), *CANDIDATES.values()):
        TrainConfig(data="x", **options)
    assert TrainConfig(data="x", **recipe_options("published")) == TrainConfig(data="x")
    assert recipe_options("ours")["schedule"] == "cosine"
    with pytest.raises(ValueError, match="recipe='theirs'"):
        recipe_options("theirs")


def test_settings_have_the_types_of_the_options() -> None:
    texts = ["epochs=3", "label-smoothing=0.2", "recalibrate_bn=true", "activation=none"]
    texts += ["fractions=0.5,0.2,0.3", "split_seed=4", "mix=mixup"]
    assert parse_settings(texts) == {
        "epochs": 3,
        "label_smoothing": 0.2,
        "recalibrate_bn": True,
        "activation": None,
        "fractions": (0.5, 0.2, 0.3),
        "split_seed": 4,
        "mix": "mixup",
    }
    for text in ("epochs", "colour=1", "epochs=many", "recalibrate_bn=yes", "=3"):
        with pytest.raises(ValueError, match="setting"):
            parse_settings([text])


def test_a_recipe_from_the_command_line(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = program_options(pictures, out, 1)
    done = run_program(*options, "--recipe", "ours", "--label-smoothing", 0.3)
    assert done.returncode == 0, done.stderr
    config = RunFolder(out).read_json(out / "config.json")
    assert config["label_smoothing"] == 0.3
    assert config["epochs"] == 1
    ours = {k: v for k, v in recipe_options("ours").items() if k not in ("epochs", *SMALL)}
    assert {key: config[key] for key in ours if key != "label_smoothing"} == {
        key: value for key, value in ours.items() if key != "label_smoothing"
    }
