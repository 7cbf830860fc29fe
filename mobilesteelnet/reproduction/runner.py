"""Running what a table needs, one run after the other, and keeping each result as JSON.

``RESULTS/<recipe>/<network>-seed<seed>.json`` holds a run's figures on the test pictures, which are
read once, when its training has ended. A run whose result is there is not done again; one that was
cut off is continued in ``RUNS/<recipe>/<network>-seed<seed>/``.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import load_checkpoint
from ..data import PictureSet, scan, stratified_split
from ..evaluate import Evaluation, evaluate, pick_split
from ..lightning_modules import NotFiniteError
from ..predict import choose_device
from ..progress import bar
from ..run_folder import RunFolder, RunFolderError, write_json
from ..runs import delete_runs, differing_option, finish_run
from ..train import Machine, TrainConfig, TrainingError, TrainResult
from .grid import PlannedRun

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = 1
DIGITS = 5
WAY_OUT = "choose another --results folder, or make it again with --overwrite"


@dataclass(frozen=True)
class Places:
    """Where a reproduction reads and writes.

    Attributes:
        data: Folder or zip of the pictures.
        runs: Folder of the run folders; large, not for the repository.
        results: Folder of the JSON files; small, made to be committed.
    """

    data: str
    runs: Path
    results: Path

    def run(self, planned: PlannedRun) -> Path:
        """The run folder of a planned run."""
        return self.runs / planned.recipe / planned.name

    def result(self, planned: PlannedRun) -> Path:
        """The result file of a planned run."""
        return self.results / planned.recipe / f"{planned.name}.json"


def read_result(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        RunFolderError: It cannot be read, or is of another form.
    """
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"result {str(path)!r} cannot be read: {error}") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise RunFolderError(f"result {str(path)!r} is not of format {FORMAT}")
    return result


def is_done(planned: PlannedRun, config: TrainConfig, places: Places, pictures: PictureSet) -> bool:
    """Whether the result is there.

    Raises:
        RunFolderError: It is one of other options, or of other pictures.
    """
    path = places.result(planned)
    if not path.is_file():
        return False
    result = read_result(path)
    stored = TrainConfig.from_dict({**result["config"], "data": config.data})
    changed = differing_option(stored, config)
    if changed:
        raise RunFolderError(
            f"result {str(path)!r} was made with other options ({changed}): {WAY_OUT}"
        )
    split = stratified_split(pictures, config.fractions, config.seed_of_split)
    had = _described(result["test"]["classes"], result["test"]["pictures"])
    has = _described(pictures.classes, len(split.test))
    if had != has:
        raise RunFolderError(
            f"result {str(path)!r} is of other pictures ({had}) than {places.data!r} ({has}): "
            f"{WAY_OUT}"
        )
    return True


def _described(classes: Iterable[str], tested: int) -> str:
    return f"{', '.join(classes)}; {tested} to test on"


def finish_runs(
    planned: Sequence[PlannedRun],
    places: Places,
    changes: dict[str, Any],
    *,
    machine: Machine | None = None,
    console: Console | None = None,
    overwrite: bool = False,
    again: str = "",
) -> list[Path]:
    """Do what is left to do of the runs; returns the result files of all of them.

    Args:
        planned: The runs, in this order.
        places: Where things lie.
        changes: Options that replace those of the recipe.
        machine: Where it is computed.
        console: Where progress is shown.
        overwrite: Do them again; what is there of any of them is deleted first.
        again: As in :func:`mobilesteelnet.train.train`.

    Raises:
        RunFolderError: A run or result of other options is in the way; nothing of it was changed.
        TrainingError: Runs failed because their loss was not finite; the others were done.
        DataError, ValueError, TrainingError: As training does; what is finished is kept.
    """
    machine = machine or Machine()
    configs = [run.config(places.data, changes) for run in planned]
    with bar("reading pictures", console) as progress:
        pictures = scan(places.data, progress=progress)
    if overwrite:
        delete_runs(places.run(run) for run in planned)
        for run in planned:
            places.result(run).unlink(missing_ok=True)
    left = [
        place
        for place, run in enumerate(planned)
        if not is_done(run, configs[place], places, pictures)
    ]
    failed: list[str] = []
    for number, place in enumerate(left):
        run = planned[place]
        if console is not None:
            text = f"run {number + 1} of {len(left)}: {run.recipe}, {run.name}"
            console.print(text, highlight=False, markup=False)
        try:
            done = finish_run(
                configs[place], places.run(run), machine=machine, console=console, again=again
            )
        except NotFiniteError as error:
            failed.append(f"{run.recipe} {run.name}: {error}")
            continue
        result = _judge(run, configs[place], done, pictures, machine, console)
        target = places.result(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, result)
        # Only a training that goes on needs its optimizer, three times the size of the weights.
        RunFolder(done.run).last.unlink(missing_ok=True)
    if failed:
        raise TrainingError(f"{len(failed)} of {len(left)} runs failed: {'; '.join(failed)}")
    return [places.result(run) for run in planned]


def _judge(
    run: PlannedRun,
    config: TrainConfig,
    done: TrainResult,
    pictures: PictureSet,
    machine: Machine,
    console: Console | None,
) -> dict[str, Any]:
    """The figures of a finished run on the test pictures."""
    device = choose_device(machine.device)
    checkpoint = load_checkpoint(done.checkpoint, device)
    indexes = pick_split(pictures, "test", RunFolder(done.run))
    with bar("testing", console) as progress:
        test = evaluate(checkpoint, pictures, indexes, split="test", progress=progress)
    columns = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
    return {
        "format": FORMAT,
        "network": run.network,
        "recipe": run.recipe,
        "seed": run.seed,
        "config": {**config.to_dict(), "data": Path(config.data).name},
        "parameters": sum(p.numel() for p in checkpoint.model.parameters()),
        "training": {
            "epochs": len(done.rows),
            "best_epoch": done.best_epoch,
            "reason": done.reason,
            "seconds": round(sum(row["seconds"] for row in done.rows), 1),
            "history": {name: [_rounded(row[name]) for row in done.rows] for name in columns},
        },
        "test": test_figures(test),
        "bad_files": len(pictures.bad),
        "machine": machine_facts(device, machine.precision),
    }


def machine_facts(device: torch.device, precision: str = "32-true") -> dict[str, str]:
    """Where, how and when a result came about."""
    return {
        "device": device_name(device),
        "precision": precision,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def test_figures(result: Evaluation) -> dict[str, Any]:
    """What is kept of an evaluation: no pictures, and of the right ones no names."""
    return {
        "pictures": len(result.predictions),
        "average_accuracy": result.average_accuracy,
        "overall_accuracy": result.overall_accuracy,
        "precision": result.precision,
        "f1": result.f1,
        "classes": {item.name: item.accuracy for item in result.per_class},
        "confusion": result.confusion,
        "calibration": None if result.calibration is None else asdict(result.calibration),
        "wrong": [
            [item.name, item.predicted, round(max(item.probabilities), DIGITS)]
            for item in result.wrong
        ],
    }


def device_name(device: torch.device) -> str:
    """What computes, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, threads: {torch.get_num_threads()}"


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
