"""A small training run, and what compares two of them, for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import SIZE, WIDTH, make_pictures

from mobilesteelnet.train import Machine, TrainConfig, train

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


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs in one go, by Python; the resumption tests compare with it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(small(pictures, epochs=4), out, machine=CPU)
    return out


def program_options(pictures: Path, out: Path, epochs: int) -> list[object]:
    options = ["--epochs", epochs, "--width", WIDTH, "--size", SIZE, "--batch-size", 5]
    options += ["--fractions", "0.5,0.25,0.25", "--warmup-epochs", 1, "--patience", 0]
    options += ["--accelerator", "cpu", "--devices", 1]
    return ["train", "--data", pictures, "--out", out, *options]
