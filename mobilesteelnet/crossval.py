"""Judging a recipe without the test pictures: cross-validation inside training and validation."""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import load_checkpoint
from .data import PictureSet, scan, stratified_split
from .evaluate import evaluate
from .predict import choose_device
from .progress import bar
from .run_folder import RunFolder, RunFolderError, write_json
from .runs import delete_runs, finish_run
from .splits import Split, fold_splits
from .train import Machine, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

FOLDS, REPEATS = 2, 2
RESULT = "crossval.json"


@dataclass(frozen=True)
class Fold:
    """One training and what it came to on the pictures it did not learn from.

    Attributes:
        run: Name of its folder.
        pictures: How many it was judged on.
        average_accuracy, loss, calibration_error: On them.
        epochs: How many it took.
        seconds: Its training time.
    """

    run: str
    pictures: int
    average_accuracy: float
    loss: float
    calibration_error: float
    epochs: int
    seconds: float


@dataclass(frozen=True)
class CrossValidation:
    """What a recipe came to.

    Attributes:
        config: The options, without the place of the data.
        folds: One entry a training.
        average_accuracy: Mean over the folds.
        deviation: Its standard deviation; None of one fold.
        loss, calibration_error: Means over the folds.
        bad_files: How many files of the set could not be used.
    """

    config: dict[str, Any]
    folds: list[Fold]
    average_accuracy: float
    deviation: float | None
    loss: float
    calibration_error: float
    bad_files: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def fold_folder(folder: Path, number: int) -> Path:
    """The run folder of a fold, counted from 0."""
    return folder / f"fold{number + 1}"


def forget(folder: Path, count: int = FOLDS * REPEATS) -> None:
    """Delete what a cross-validation of so many trainings left in its folder.

    Raises:
        RunFolderError: A fold's folder holds something else than a run; nothing was deleted.
    """
    delete_runs(fold_folder(folder, number) for number in range(count))
    (folder / RESULT).unlink(missing_ok=True)


def judged_on(config: TrainConfig, pictures: PictureSet) -> list[int]:
    """How many pictures each training of a cross-validation is judged on."""
    return [len(part.val) for part in _parts(config, pictures, FOLDS, REPEATS)[1]]


def _require_same_part(run: RunFolder, wanted: dict[str, Any]) -> None:
    """A run of other ``folds``, ``repeats`` or pictures may have learnt what it is judged on."""
    if run.config.is_file() and run.split.is_file() and run.read_json(run.split) != wanted:
        raise RunFolderError(
            f"run={str(run.path)!r} was trained on other pictures than this fold's: choose another "
            "folder, or start it again with --overwrite"
        )


def _parts(
    config: TrainConfig, pictures: PictureSet, folds: int, repeats: int
) -> tuple[int, list[Split]]:
    """The seed of the split, and the splits inside its training and validation pictures."""
    seed = config.seed_of_split
    split = stratified_split(pictures, config.fractions, seed)
    return seed, fold_splits(pictures, split, folds, repeats, seed)


def cross_validate(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    folds: int = FOLDS,
    repeats: int = REPEATS,
    fits: int | None = None,
    machine: Machine | None = None,
    console: Console | None = None,
    overwrite: bool = False,
    again: str = "",
) -> CrossValidation:
    """Train on parts of the training and validation pictures and judge on the others.

    A training that chooses its epoch by its validation (`select` other than "last", `patience`)
    chooses by the pictures that it is judged on: its figures are then some points too high.

    The split of ``config`` says which pictures those are; its test pictures are never read. Run
    again after an interruption, it goes on; what is finished stays.

    Args:
        config: The recipe.
        out: Folder of the runs and of ``crossval.json``.
        folds: Parts of each repetition, at least 2.
        repeats: How often the pictures are divided anew.
        fits: Only the first so many of the ``folds``·``repeats`` trainings; None does all.
        machine: Where it is computed.
        console: Where progress is shown.
        overwrite: Start the runs again.
        again: As in :func:`mobilesteelnet.train.train`.

    Raises:
        DataError, RunFolderError, ValueError, TrainingError: As training does.
    """
    if fits is not None and not 1 <= fits <= folds * repeats:
        raise ValueError(f"fits={fits}: must be from 1 to folds·repeats = {folds * repeats}")
    machine = machine or Machine()
    folder = Path(out)
    with bar("reading pictures", console) as progress:
        rule: Any = config.on_bad_file
        pictures = scan(config.data, on_bad_file=rule, progress=progress)
    seed, parts = _parts(config, pictures, folds, repeats)
    if overwrite:
        forget(folder, folds * repeats)
    parts = parts[:fits]
    found = []
    for number, part in enumerate(parts):
        if console is not None:
            console.print(f"fold {number + 1} of {len(parts)}", highlight=False)
        path = fold_folder(folder, number)
        # A seed of its own for each fold: their spread is that of a training, weights included.
        own = replace(config, seed=config.seed + number, split_seed=seed)
        _require_same_part(RunFolder(path), part.to_dict(pictures))
        done = finish_run(own, path, machine=machine, console=console, split=part, again=again)
        checkpoint = load_checkpoint(done.checkpoint, choose_device(machine.device))
        # The temperature was fitted to these very pictures.
        checkpoint = replace(checkpoint, temperature=1.0)
        result = evaluate(checkpoint, pictures, part.val, split="val")
        assert result.calibration is not None
        found.append(
            Fold(
                path.name,
                len(part.val),
                result.average_accuracy,
                done.rows[done.best_epoch - 1]["val_loss"],
                result.calibration.expected_error,
                len(done.rows),
                round(sum(row["seconds"] for row in done.rows), 1),
            )
        )
    accuracies = [fold.average_accuracy for fold in found]
    summary = CrossValidation(
        {key: value for key, value in config.to_dict().items() if key != "data"},
        found,
        statistics.fmean(accuracies),
        statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        statistics.fmean(fold.loss for fold in found),
        statistics.fmean(fold.calibration_error for fold in found),
        len(pictures.bad),
    )
    write_json(folder / RESULT, summary.to_dict())
    return summary
