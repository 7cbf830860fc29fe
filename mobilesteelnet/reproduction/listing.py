"""What a reproduction would do, and how long it would take: the dry run of ``--list``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data import PictureSet
from ..run_folder import RunFolder
from ..train import TrainConfig
from .cost import step_estimate
from .grid import PlannedRun
from .runner import Places, device_name, is_done, read_result


@dataclass(frozen=True)
class ListedRun:
    """One planned run as it stands.

    Attributes:
        run: Which one.
        state: ``done``, ``begun (n of m epochs)`` or ``to do``.
        seconds: What is left of it at most, on this machine.
        measured: Whether that follows from epochs of this network; else from two training steps.
    """

    run: PlannedRun
    state: str
    seconds: float
    measured: bool


def list_runs(
    planned: Sequence[PlannedRun],
    places: Places,
    changes: dict[str, Any],
    *,
    pictures: PictureSet,
    device: torch.device,
    precision: str = "32-true",
) -> list[ListedRun]:
    """The state of each run, and an estimate of what is left.

    Args:
        planned: The runs.
        places: Where things lie.
        changes: Options that replace those of the recipe.
        pictures: The set.
        device: Where the runs would be computed.
        precision: In what.

    Raises:
        RunFolderError: A result of other options or pictures is in the way.
    """
    seconds_an_image: dict[tuple[str, int], tuple[float, bool]] = {}
    listed = []
    for run in planned:
        config = run.config(places.data, changes)
        if is_done(run, config, places, pictures):
            listed.append(ListedRun(run, "done", 0.0, True))
            continue
        key = (run.network, config.size)
        images = len(pictures) * config.fractions[0]
        if key not in seconds_an_image:
            known = _known_epoch(run.network, config, places, (device_name(device), precision))
            measured = known is not None
            cost = known / images if known is not None else _guess(config, device)
            seconds_an_image[key] = (cost, measured)
        cost, measured = seconds_an_image[key]
        rows = RunFolder(places.run(run)).read_rows()
        state = f"begun ({len(rows)} of {config.epochs} epochs)" if rows else "to do"
        left = (config.epochs - len(rows)) * images * cost
        listed.append(ListedRun(run, state, left, measured))
    return listed


def _known_epoch(
    network: str, config: TrainConfig, places: Places, computed: tuple[str, str]
) -> float | None:
    """Seconds of an epoch in a result of the same network, size, shares, device and precision."""
    for path in sorted(places.results.glob(f"*/{network}-seed*.json")):
        result = read_result(path)
        machine = result["machine"]
        same = (machine["device"], machine["precision"]) == computed and all(
            result["config"][name] == getattr(config, name) for name in ("size", "batch_size")
        )
        if same and result["config"]["fractions"] == list(config.fractions):
            training = result["training"]
            return float(training["seconds"]) / int(training["epochs"])
    return None


def _guess(config: TrainConfig, device: torch.device) -> float:
    """Seconds of an epoch for each training picture; a forward takes a third of a step."""
    forwards = config.fractions[1] / config.fractions[0] + config.recalibrate_bn
    return step_estimate(config, device) * (1 + forwards / 3 / config.validate_every)


def in_words(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
