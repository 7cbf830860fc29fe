"""Training a network on a folder or zip of pictures, and continuing a training that was cut off.

result = train(TrainConfig(data="NEU-DET.zip"), "runs/first")
result = resume("runs/first")
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataError,
    PictureDataset,
    PictureSet,
    Split,
    eval_transform,
    scan,
    stratified_split,
    texture_transform,
    train_transform,
)
from .initialisation import build_model
from .lightning_modules import Classifier, PictureDataModule, TrainingError
from .run_folder import RunFolder, RunFolderError, write_json
from .splits import seen_pictures
from .train_config import Machine, TrainConfig
from .transforms import Transform

try:
    import lightning as L
    from lightning.fabric.utilities.rank_zero import _get_rank
    from rich.console import Console

    from .averaging import KeptNetwork
    from .callbacks import AtomicCheckpointIO, RunWriter
    from .trainer import make_trainer, quiet
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'training needs {error.name}: pip install "mobilesteelnet[train]"', name=error.name
    ) from None

__all__ = [
    "Machine",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "is_first_process",
    "resume",
    "train",
]


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    Attributes:
        run: The run's folder.
        checkpoint: Its ``best.safetensors``.
        rows: One dict an epoch, as in ``history.json``.
        best_epoch: The epoch of ``checkpoint``, from 1.
        reason: Why the training ended, in words.
        already_finished: Nothing was left to do when it was resumed.
        bad_files: How many files of the set could not be used.
    """

    run: Path
    checkpoint: Path
    rows: list[dict[str, Any]]
    best_epoch: int
    reason: str
    already_finished: bool = False
    bad_files: int = 0


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    machine: Machine | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    split: Split | None = None,
) -> TrainResult:
    """Train a network and leave a run folder (see :mod:`mobilesteelnet.run_folder`).

    Args:
        config: What is learnt, and how.
        out: The run's folder; must be empty or missing.
        machine: Where it is computed; None takes what the machine has.
        overwrite: Delete an earlier run in ``out``.
        console: Where progress is shown; None is quiet.
        split: Of the pictures of ``config.data``; None draws it as the options say.

    Returns:
        The files and figures of the run.

    Raises:
        RunFolderError: ``out`` cannot be used; nothing in it was changed.
        DataError: The pictures cannot be used.
        CheckpointError: ``init_from`` cannot be used.
        ValueError: An option does not fit the network or the machine.
        TrainingError: The training broke off; the message says how to go on.
    """
    machine = machine or Machine()
    config = replace(config, data=str(Path(config.data).absolute()))
    if config.init_from is not None:
        config = replace(config, init_from=str(Path(config.init_from).absolute()))
    folder = RunFolder(out)
    if is_first_process():
        folder.check_free(overwrite=overwrite)
    pictures = _scan(config, console)
    if split is None:
        seed = config.seed_of_split
        split = stratified_split(pictures, config.fractions, seed)
    session = _Session(config, machine, folder, pictures, split, console)
    if is_first_process():
        try:
            folder.create(overwrite=overwrite)
            write_json(folder.split, split.to_dict(pictures))
            write_json(folder.config, config.to_dict())
        except OSError as error:
            raise TrainingError(f"out={str(folder.path)!r} cannot be written: {error}") from error
    return session.fit()


def resume(
    run: str | os.PathLike[str],
    *,
    epochs: int | None = None,
    data: str | os.PathLike[str] | None = None,
    machine: Machine | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Continue a run where its last whole epoch ended.

    On the same machine the result is that of a run that was never cut off, to the bit. A finished
    run is left as it is, unless ``epochs`` is more than it had.

    Args:
        run: The run's folder.
        epochs: A new limit, not below what is done; only where nothing is planned from the run's
            end: not with a cosine, ``averaging="swa"`` or ``small_size``.
        data: Where the same pictures lie now; None takes the place where they lay.
        machine: Where it is computed; need not be as before.
        console: Where progress is shown; None is quiet.

    Raises:
        RunFolderError: There is no run, or its files are damaged.
        DataError, ValueError, TrainingError: As :func:`train`.
    """
    folder = RunFolder(run)
    folder.require()
    try:
        config = TrainConfig.from_dict(folder.read_json(folder.config))
    except (ValueError, TypeError, AttributeError) as error:
        raise RunFolderError(f"run={str(folder.path)!r}: config.json: {error}") from None
    longer = epochs is not None and epochs != config.epochs
    state = _saved_state(folder)
    if epochs is not None and longer:
        _check_new_length(config, epochs, state)
        config = replace(config, epochs=epochs)
    moved = data is not None and str(Path(data).absolute()) != config.data
    if data is not None:
        config = replace(config, data=str(Path(data).absolute()))
    if state is not None:
        reason = _end_reason(state["rows"], state["stopped"], config)
        if reason:
            if is_first_process():
                _write_finished(folder, state, reason)
            return _result(folder, state["rows"], state["best_epoch"], reason, already=True)
    elif (rows := _finished_rows(folder)) and not longer:
        facts = folder.read_json(folder.state)
        return _result(folder, rows, facts["best_epoch"], facts["reason"], already=True)
    elif rows:
        raise ValueError(f"epochs={epochs}: this run's last.ckpt is gone, it cannot go on")
    pictures = _scan(config, console)
    split = Split.from_dict(folder.read_json(folder.split), pictures)
    rows = [] if state is None else state["rows"]
    session = _Session(config, machine or Machine(), folder, pictures, split, console, len(rows))
    if (longer or moved) and is_first_process():
        write_json(folder.config, config.to_dict())
    return session.fit()


def _check_new_length(config: TrainConfig, epochs: int, state: dict[str, Any] | None) -> None:
    """Raise ValueError if a run cannot be of so many epochs instead."""
    planned = {
        "schedule": config.schedule != "none",
        "averaging": config.averaging == "swa",
        "small_size": config.small_size is not None,
    }
    for name in (name for name, has_end in planned.items() if has_end):
        raise ValueError(
            f"epochs={epochs}: a run with {name}={getattr(config, name)!r} keeps its length"
        )
    done = 0 if state is None else len(state["rows"])
    if epochs < done:
        raise ValueError(f"epochs={epochs}: {done} are done already")
    if epochs == done and state is not None and not state["best_epoch"]:
        raise ValueError(f"epochs={epochs}: none of the {done} that are done was validated yet")


class _Session:
    """The parts of one training, put together; :meth:`fit` runs it.

    The first `done` epochs are in the folder's ``last.ckpt``.
    """

    def __init__(
        self,
        config: TrainConfig,
        machine: Machine,
        folder: RunFolder,
        pictures: PictureSet,
        split: Split,
        console: Console | None,
        done: int = 0,
    ) -> None:
        self.config = config
        self.machine = machine
        self.folder = folder
        self.pictures = pictures
        self.continued = done > 0
        # A continued run has its weights: those that it began with may be gone.
        start = replace(config, init_from=None) if self.continued else config
        model = build_model(start, pictures.classes, machine.backend)
        self.module = Classifier(model, config, compile=machine.compile)
        small = _training_transform(config, config.small_size or config.size)
        self.data = PictureDataModule(
            PictureDataset(pictures, split.train, _training_transform(config, config.size)),
            PictureDataset(pictures, split.val, eval_transform(config.size)),
            batch_size=config.batch_size,
            seed=config.seed,
            workers=machine.workers,
            small=PictureDataset(pictures, split.train, small),
            small_epochs=config.small_epochs,
            first_epoch=done,
        )
        card = {
            "classes": pictures.classes,
            "input_size": config.size,
            "normalisation": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
            "training": _training_card(config, split, pictures),
        }
        self.writer = RunWriter(folder, config.select, card)
        others: list[L.Callback] = []
        if KeptNetwork.is_needed(config):
            plain = PictureDataset(pictures, split.train, eval_transform(config.size))
            others.append(KeptNetwork(config, plain))
        self.trainer = make_trainer(
            config, machine, folder, self.writer, console, others, continued=self.continued
        )

    def fit(self) -> TrainResult:
        """Run the training to its end, and say why it ended."""
        path = str(self.folder.last) if self.continued else None
        if is_first_process():
            self.writer.write_state("running", "")
        how = f"continue with: {self._command()}"
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            with quiet():
                self.trainer.fit(self.module, datamodule=self.data, ckpt_path=path)
        except (KeyboardInterrupt, SystemExit):
            # Lightning turns Ctrl-C and SIGTERM into an exit of the process.
            raise TrainingError(
                f"interrupted after {len(self.writer.rows)} epochs; {how}"
            ) from None
        except OSError as error:
            raise TrainingError(
                f"the run folder {str(self.folder.path)!r} cannot be written: {error}; the last "
                f"whole epoch is kept; {how}"
            ) from error
        finally:
            with contextlib.suppress(ValueError):  # not in the main thread: nothing was changed
                signal.signal(signal.SIGINT, interrupt)
        state = self.writer.state_dict()
        reason = _end_reason(state["rows"], state["stopped"], self.config)
        if not reason:
            raise TrainingError(f"the training ended early for an unknown reason; {how}")
        if self.trainer.is_global_zero:
            _write_finished(self.folder, state, reason)
        return _result(
            self.folder, state["rows"], state["best_epoch"], reason, bad=len(self.pictures.bad)
        )

    def _command(self) -> str:
        """How to go on, with those of the machine's options that change results."""
        options = f" --precision {self.machine.precision}" * (self.machine.precision != "32-true")
        options += " --sync-batchnorm" * self.machine.sync_batchnorm
        return f"mobilesteelnet train --resume {shlex.quote(str(self.folder.path))}{options}"


def _training_transform(config: TrainConfig, size: int) -> Transform:
    if config.augmentation == "none":
        return eval_transform(size)
    if config.augmentation == "texture":
        options = {name: getattr(config, name) for name in ("crop_scale", "light", "quarter_turns")}
        return texture_transform(size, **options)
    return train_transform(size)


def _saved_state(folder: RunFolder) -> dict[str, Any] | None:
    """The writer's part of ``last.ckpt``; None before the first epoch has ended."""
    if not folder.last.is_file():
        return None
    saved = AtomicCheckpointIO().load_checkpoint(folder.last)
    state = saved.get("callbacks", {}).get(RunWriter.__qualname__)
    if not isinstance(state, dict):
        raise TrainingError(f"{str(folder.last)!r} is the state of another program's training")
    return state


def _finished_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows of a finished run whose ``last.ckpt`` was deleted to save room; else nothing."""
    if not folder.state.is_file() or not folder.best.is_file():
        return []
    facts = folder.read_json(folder.state)
    finished = isinstance(facts, dict) and facts.get("state") == "finished"
    return folder.read_rows() if finished else []


def _end_reason(rows: list[dict[str, Any]], stopped: bool, config: TrainConfig) -> str:
    if stopped:
        return f"validation loss not lower for {config.patience} epochs"
    if len(rows) >= config.epochs:
        return f"all {config.epochs} epochs done"
    return ""


def _write_finished(folder: RunFolder, state: dict[str, Any], reason: str) -> None:
    write_json(
        folder.state,
        {
            "state": "finished",
            "reason": reason,
            "epochs": len(state["rows"]),
            "best_epoch": state["best_epoch"],
        },
    )


def _result(
    folder: RunFolder,
    rows: list[dict[str, Any]],
    best_epoch: int,
    reason: str,
    *,
    already: bool = False,
    bad: int = 0,
) -> TrainResult:
    return TrainResult(folder.path, folder.best, rows, best_epoch, reason, already, bad)


def _training_card(config: TrainConfig, split: Split, pictures: PictureSet) -> dict[str, Any]:
    """What the checkpoint says about its training; no paths, since checkpoints travel."""
    options = config.to_dict()
    options["data"] = Path(config.data).name
    options["init_from"] = Path(config.init_from).name if config.init_from else None
    return {
        "options": options,
        "pictures": {"train": len(split.train), "val": len(split.val), "test": len(split.test)},
        "seen": seen_pictures(split, pictures),
        "versions": {"torch": torch.__version__, "lightning": L.__version__},
    }


def _scan(config: TrainConfig, console: Console | None) -> PictureSet:
    from .progress import bar

    shown = console if is_first_process() else None
    with bar("reading pictures", shown) as progress:
        rule: Any = config.on_bad_file
        pictures = scan(config.data, on_bad_file=rule, progress=progress)
    if shown is not None:
        for file in pictures.bad:
            shown.print(f"skipped: {file.name}: {file.reason}", markup=False, highlight=False)
    if len(pictures.classes) < 2:
        raise DataError(f"data={config.data!r}: two classes at least are needed")
    return pictures


def is_first_process() -> bool:
    """Whether this is the process that writes and talks; the others only compute."""
    return not _get_rank()
