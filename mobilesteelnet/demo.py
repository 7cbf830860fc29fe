"""The demonstration: pictures classified with the package's weights, and the report.

Or from no pictures at all: a synthetic set, a network trained on it, and the report. The output
folder holds ``demo.json`` (the settings), ``data/`` (the synthetic pictures), ``run/`` (the
training), ``report/`` and ``predictions.json``. Every part that is complete is kept when the demo
is run again with the same settings, so that it can be cut off at any time.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .checkpoint import Checkpoint, load_checkpoint
from .data import BadFile, DataError, PictureSet, scan
from .evaluate import Evaluation, evaluate, pick_split
from .predict import predict
from .progress import bar
from .report import write_report
from .run_folder import RunFolder, RunFolderError, refuse_inside, write_json
from .run_lock import LOCK
from .shipped import SHIPPED, WEIGHTS, load_shipped, shipped_folder, unseen_pictures
from .synthetic import make_synthetic
from .train import TrainConfig, is_first_process, resume, train

SETTINGS = "demo.json"
OWN = (SETTINGS, "data", "run", "report", "predictions.json")
"""What a demo writes into its folder, and ``overwrite`` deletes from it."""
# The paper's protocol, cut to a budget: a narrow network on small pictures, more of them to learn
# from, a cosine instead of an early stop, and ReLU in the blocks.
QUICK: dict[str, Any] = {
    "fractions": (0.5, 0.1, 0.4),
    "activation": "relu",
    "bn_statistics": "pooled",
    "learning_rate": 1e-2,
    "schedule": "cosine",
    "warmup_epochs": 1,
    "batch_size": 8,
    "patience": 0,
    "select": "last",
}
BUDGETS: dict[str, dict[str, Any]] = {
    "tiny": {**QUICK, "width": 0.125, "size": 48, "augmentation": "none"},
    "small": {**QUICK, "width": 0.25, "size": 64, "augmentation": "none"},
    "full": {},
}
# Steps of the optimizer, so that a large set does not take longer than a small one.
STEPS = {"tiny": 300, "small": 720}
MOST_EPOCHS, LEAST_EPOCHS = 40, 3
# Pictures of each class, and their height and width in pixels.
SYNTHETIC = {"tiny": (40, 96), "small": (80, 128), "full": (300, 200)}
PREDICTED_PICTURES = 12


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's results lie.

    Attributes:
        evaluation: The figures on the test part.
        report: The HTML page.
        checkpoint: The trained network.
        predictions: The predictions on some test pictures, JSON.
        bad: Files of the set that could not be used.
    """

    evaluation: Evaluation
    report: Path
    checkpoint: Path
    predictions: Path
    bad: list[BadFile]


def default_budget(data: str | os.PathLike[str] | None) -> str:
    """What the demo does if nothing is said: ``shipped`` where there are pictures and weights."""
    has_weights = (shipped_folder() / WEIGHTS).is_file()
    return SHIPPED if data is not None and has_weights else "small"


def run_demo(
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    budget: str = "small",
    seed: int = 42,
    overwrite: bool = False,
    console: Console | None = None,
    command: str = "",
) -> DemoResult:
    """Draw pictures (or take ``data``), train, evaluate, predict and write the report.

    Args:
        out: Output folder: empty, missing, or that of an earlier demo with the same settings,
            which is continued.
        data: Folder or zip of ``<class>/<picture>``; None draws a synthetic set.
        budget: ``tiny``, ``small`` or ``full`` (the paper's protocol), or ``shipped``: ``data`` is
            classified with the package's weights, and nothing is trained.
        seed: Of the pictures and the training.
        overwrite: Delete an earlier demo in ``out``; what else lies there stays.
        console: Where progress is shown.
        command: The command line, for the report.

    Raises:
        ValueError: ``budget`` is unknown, or ``shipped`` without ``data``.
        CheckpointError: There are no shipped weights.
        RunFolderError: ``out`` holds something else, a demo with other settings, or another process
            is in it.
        DataError, TrainingError: As :func:`mobilesteelnet.train.train`.
    """
    if budget not in (*BUDGETS, SHIPPED):
        raise ValueError(f"budget={budget!r}: must be one of {', '.join((*BUDGETS, SHIPPED))}")
    if budget == SHIPPED and data is None:
        raise ValueError("budget='shipped' needs data: drawn pictures tell nothing about steel")
    shipped = load_shipped().frozen() if budget == SHIPPED else None
    folder = Path(out).absolute()
    source = str(Path(data).absolute()) if data is not None else None
    if source is not None and not Path(source).exists():
        raise DataError(f"data={str(data)!r} does not exist")
    if source is not None:
        refuse_inside("out=", folder, source)
    settings = {"data": source, "budget": budget, "seed": seed}
    if is_first_process():
        for path in (folder, folder / "run"):
            RunFolder(path).check_unused()
    _check(folder, settings, overwrite)
    # Before anything is written or deleted: the pictures may be none.
    pictures = _read(source, console) if source is not None else None
    with contextlib.ExitStack() as stack:
        if is_first_process():
            stack.enter_context(RunFolder(folder).alone())
            _begin(folder, settings, overwrite)
        if pictures is None:
            _draw(folder / "data", budget, seed, console)
            pictures = _read(str(folder / "data"), console)
        if shipped is not None:
            split, indexes = unseen_pictures(shipped, pictures)
            return _report(folder, shipped, pictures, split, indexes, None, console, command)
        run = _train(folder, settings, pictures, console)
        indexes = pick_split(pictures, "test", run)
        checkpoint = load_checkpoint(run.best).frozen()
        return _report(folder, checkpoint, pictures, "test", indexes, run, console, command)


def _read(path: str, console: Console | None) -> PictureSet:
    with bar("reading pictures", console) as progress:
        return scan(path, progress=progress)


def _draw(path: Path, budget: str, seed: int, console: Console | None) -> None:
    """Draw the synthetic pictures where they are not there yet."""
    if path.is_dir():
        return
    per_class, size = SYNTHETIC[budget]
    with bar("drawing synthetic pictures", console) as progress:
        make_synthetic(path, per_class, size, seed, progress=progress)
    if console is not None:
        console.print(f"drew {6 * per_class} synthetic pictures: no photographs of steel")


def _config(data: str, budget: str, seed: int, pictures: int) -> TrainConfig:
    options = BUDGETS[budget]
    if budget in STEPS:
        steps_per_epoch = max(1, round(pictures * QUICK["fractions"][0] / QUICK["batch_size"]))
        epochs = round(STEPS[budget] / steps_per_epoch)
        options = {**options, "epochs": min(max(epochs, LEAST_EPOCHS), MOST_EPOCHS)}
    return TrainConfig(data=data, seed=seed, **options)


def _check(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Check that the demo can be put into the folder, or gone on with there; changes nothing."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"out={str(folder)!r} is a file, not a folder")
    record = folder / SETTINGS
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names - {LOCK} and not record.is_file():
        raise RunFolderError(f"out={str(folder)!r} is not empty and holds no demo")
    if overwrite:
        _check_deletable(folder, settings["data"])
    elif _is_begun(folder) and RunFolder(folder).read_json(record) != settings:
        raise RunFolderError(
            f"out={str(folder)!r} holds a demo with other settings: choose another folder, or "
            "start it again with --overwrite"
        )


def _check_deletable(folder: Path, data: str | None) -> None:
    """Check that an earlier demo does not hold the pictures that are to be read."""
    for name in OWN:
        path = folder / name
        if data is not None and Path(data).resolve().is_relative_to(path.resolve()):
            raise RunFolderError(
                f"data={data!r} lies in what --overwrite would delete: choose another output folder"
            )


def _is_begun(folder: Path) -> bool:
    """Whether there is more than the settings, which one that failed at once leaves."""
    parts = ("data", "run/config.json", "report", "predictions.json")
    return any((folder / part).exists() for part in parts)


def _begin(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    _check(folder, settings, overwrite)  # again: now nobody else is in it
    if overwrite:
        _delete(folder)
    write_json(folder / SETTINGS, settings)


def _delete(folder: Path) -> None:
    """Delete an earlier demo."""
    for name in OWN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _train(
    folder: Path, settings: dict[str, Any], pictures: PictureSet, console: Console | None
) -> RunFolder:
    run = RunFolder(folder / "run")
    again = _command(folder, settings)
    if run.config.is_file():
        trained = resume(run.path, console=console, again=again)
    else:
        # Without config.json the training had not begun; what lies there is not worth anything.
        shutil.rmtree(run.path, ignore_errors=True)
        path = settings["data"] or str(folder / "data")
        config = _config(path, settings["budget"], settings["seed"], len(pictures))
        trained = train(config, run.path, console=console, again=again)
    if console is not None:
        console.print(f"trained: {trained.reason}")
    return run


def _command(folder: Path, settings: dict[str, Any]) -> str:
    """What goes on with the demo: the training alone would leave no report."""
    words = ["mobilesteelnet", "demo", "--out", str(folder)]
    for name, value in settings.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)


def _report(
    folder: Path,
    checkpoint: Checkpoint,
    pictures: PictureSet,
    split: str,
    indexes: list[int],
    run: RunFolder | None,
    console: Console | None,
    command: str,
) -> DemoResult:
    with bar("evaluating", console) as progress:
        evaluation = evaluate(checkpoint, pictures, indexes, split=split, progress=progress)
    sample = indexes[:: max(1, len(indexes) // PREDICTED_PICTURES)][:PREDICTED_PICTURES]
    predictions = predict(checkpoint, pictures, indexes=sample, top_k=3)
    write_json(folder / "predictions.json", predictions.to_dict())
    synthetic = "synthetic pictures" if (folder / "data").is_dir() else pictures.path.name
    files = write_report(
        folder / "report",
        evaluation,
        checkpoint,
        pictures,
        run=run,
        command=command,
        title=f"MobileSteelNet demo: {synthetic}",
    )
    return DemoResult(
        evaluation,
        files.page,
        run.best if run is not None else shipped_folder() / WEIGHTS,
        folder / "predictions.json",
        pictures.bad,
    )
