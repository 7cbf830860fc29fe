"""Small reproductions, for their tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_cases import SMALL

from mobilesteelnet.recipes import PUBLISHED
from mobilesteelnet.reproduction.grid import PlannedRun
from mobilesteelnet.reproduction.runner import Places

CHANGES = {key: value for key, value in SMALL.items() if key != "patience"}
RUNS = [PlannedRun("backbone", PUBLISHED, seed) for seed in (42, 43)]


def set_options(**changes: Any) -> list[str]:
    options: list[str] = []
    for name, value in {**CHANGES, **changes}.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        options += ["--set", f"{name}={text}"]
    return [*options, "--accelerator", "cpu"]


@pytest.fixture
def places(pictures: Path, tmp_path: Path) -> Places:
    return Places(str(pictures), tmp_path / "runs", tmp_path / "results")
