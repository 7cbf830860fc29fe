"""Small picture sets, networks and runs that several test files share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mobilesteelnet.checkpoint import save_checkpoint
from mobilesteelnet.model import MobileSteelNet

ROOT = Path(__file__).resolve().parent.parent
NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CLASSES = ["dark", "lines", "noise"]
WIDTH = 0.0625
SIZE = 32


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These networks are too small to share; a second thread would mostly wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_pictures(folder: Path, per_class: int = 8, seed: int = 0) -> Path:
    """Three classes that any network can tell apart."""
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            grey = rng.integers(0, 40, (40, 40))
            if name == "lines":
                grey[:: rng.integers(3, 6)] += 180
            if name == "noise":
                grey = rng.integers(60, 256, (40, 40))
            Image.fromarray(grey.astype(np.uint8)).save(folder / name / f"{name}_{number}.png")
    return folder


def small_network(**changes: Any) -> MobileSteelNet:
    torch.manual_seed(1)
    return MobileSteelNet(**{"num_classes": len(CLASSES), "width": WIDTH, **changes}).eval()


def save_small(path: Path, **changes: Any) -> MobileSteelNet:
    """A checkpoint of an untrained network; `changes` go to `save_checkpoint`."""
    model = small_network()
    card: dict[str, Any] = {
        "classes": CLASSES,
        "input_size": SIZE,
        "normalisation": NORMALISATION,
        "training": {"epoch": 3},
    }
    save_checkpoint(path, model, **{**card, **changes})
    return model


def run_program(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, from another folder."""
    return subprocess.run(
        [sys.executable, "-m", "mobilesteelnet", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=program_environment(),
        timeout=300,
        check=False,
        **options,
    )


def program_environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def error_line(capture: pytest.CaptureFixture[str]) -> str:
    """The one line of an error: nothing before that looks like a traceback."""
    errors = capture.readouterr().err
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    return lines[0]
