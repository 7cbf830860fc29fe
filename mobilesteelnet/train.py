"""Training a network on a folder or zip of pictures, and continuing a training that was cut off.

result = train(TrainConfig(data="NEU-DET.zip"), "runs/first")
result = resume("runs/first")
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
)
from .initialisation import build_model, first_weights
from .lightning_modules import Classifier, PictureDataModule, TrainingError
from .run_folder import RunFolder, RunFolderError, refuse_inside, write_json
from .shipped import is_shipped
from .train_config import Machine, TrainConfig
from .training_card import tell_of_contradictions, tell_of_known_pictures, training_card
from .transforms import training_transform

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
    again: str = "",
) -> TrainResult:
    """Train a network and leave a run folder (see :mod:`mobilesteelnet.run_folder`).

    Args:
        config: What is learnt, and how.
        out: The run's folder; must be empty or missing.
        machine: Where it is computed; None takes what the machine has.
        overwrite: Delete an earlier run in ``out``.
        console: Where progress is shown; None is quiet.
        split: Of the pictures of ``config.data``; None draws it as the options say.
        again: The command that goes on after an interruption; left out: ``train --resume``.

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
    if config.init_from is not None and not is_shipped(config.init_from):
        config = replace(config, init_from=str(Path(config.init_from).absolute()))
    folder = RunFolder(out)
    refuse_inside("out=", folder.path, config.data)
    if is_first_process():
        folder.check_unused()
        folder.check_free(overwrite=overwrite)
    pictures = _scan(config, console)
    if split is None:
        seed = config.seed_of_split
        split = stratified_split(pictures, config.fractions, seed)
    session = _Session(config, machine, folder, pictures, split, console)
    with contextlib.ExitStack() as stack:
        if is_first_process():
            try:
                stack.enter_context(folder.alone())
                folder.create(overwrite=overwrite)
                write_json(folder.split, split.to_dict(pictures))
                write_json(folder.config, config.to_dict())
            except OSError as error:
                raise TrainingError(_unwritten("out=", folder, error)) from error
        return session.fit(again)


def resume(
    run: str | os.PathLike[str],
    *,
    epochs: int | None = None,
    data: str | os.PathLike[str] | None = None,
    machine: Machine | None = None,
    console: Console | None = None,
    again: str = "",
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
        again: As in :func:`train`.

    Raises:
        RunFolderError: There is no run, its files are damaged, or another process is in it.
        DataError, ValueError, TrainingError: As :func:`train`.
    """
    folder = RunFolder(run)
    folder.require()
    with folder.alone() if is_first_process() else contextlib.nullcontext():
        return _resume(folder, epochs, data, machine or Machine(), console, again)


def _resume(
    folder: RunFolder,
    epochs: int | None,
    data: str | os.PathLike[str] | None,
    machine: Machine,
    console: Console | None,
    again: str,
) -> TrainResult:
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
                folder.write_state("finished", reason, len(state["rows"]), state["best_epoch"])
            return _result(folder, state["rows"], state["best_epoch"], reason, already=True)
    elif (rows := folder.finished_rows()) and not longer:
        facts = folder.read_json(folder.state)
        return _result(folder, rows, facts["best_epoch"], facts["reason"], already=True)
    elif rows:
        raise ValueError(f"epochs={epochs}: this run's last.ckpt is gone, it cannot go on")
    pictures = _scan(config, console)
    split = Split.from_dict(folder.read_json(folder.split), pictures)
    session = _Session(config, machine, folder, pictures, split, console, state)
    if (longer or moved) and is_first_process():
        write_json(folder.config, config.to_dict())
    return session.fit(again)


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

    The `state` of the writer is that in the folder's ``last.ckpt``.
    """

    def __init__(
        self,
        config: TrainConfig,
        machine: Machine,
        folder: RunFolder,
        pictures: PictureSet,
        split: Split,
        console: Console | None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.machine = machine
        self.folder = folder
        self.pictures = pictures
        done = 0 if state is None else len(state["rows"])
        self.continued = done > 0
        # A continued run has its weights: those that it began with may be gone.
        start = replace(config, init_from=None) if self.continued else config
        source = first_weights(start)
        model = build_model(start, pictures.classes, machine.backend, source)
        seen = source.training.get("seen") if source else (state or {}).get("seen")
        if source is not None:
            shown = console if is_first_process() else None
            tell_of_known_pictures(config, split, pictures, seen, shown)
        self.module = Classifier(model, config, compile=machine.compile)
        small = training_transform(config, config.small_size or config.size)
        self.data = PictureDataModule(
            PictureDataset(pictures, split.train, training_transform(config, config.size)),
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
            "training": training_card(config, split, pictures, seen),
        }
        self.writer = RunWriter(folder, config.select, card)
        if state is not None:
            self.writer.load_state_dict(state)  # Lightning does so later than run.json is written
        others: list[L.Callback] = []
        if KeptNetwork.is_needed(config):
            plain = PictureDataset(pictures, split.train, eval_transform(config.size))
            others.append(KeptNetwork(config, plain))
        self.trainer = make_trainer(
            config, machine, folder, self.writer, console, others, continued=self.continued
        )

    def fit(self, again: str = "") -> TrainResult:
        """Run the training to its end, and say why it ended."""
        path = str(self.folder.last) if self.continued else None
        how = f"continue with: {again or self._command()}"
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            if is_first_process():
                self.writer.write_state("running")
            with quiet():
                self.trainer.fit(self.module, datamodule=self.data, ckpt_path=path)
        except (KeyboardInterrupt, SystemExit):
            # Lightning turns Ctrl-C and SIGTERM into an exit of the process.
            self._record("interrupted")
            raise TrainingError(f"interrupted after {self.writer.done} epochs; {how}") from None
        except OSError as error:
            reason = _unwritten("the run folder ", self.folder, error)
            self._record("failed", reason)
            kept = "the last whole epoch is kept" if self.writer.done else "no epoch was finished"
            raise TrainingError(f"{reason}; {kept}; {how}") from error
        except Exception as error:
            self._record("failed", str(error) or type(error).__name__)
            raise
        finally:
            with contextlib.suppress(ValueError):  # not in the main thread: nothing was changed
                signal.signal(signal.SIGINT, interrupt)
        state = self.writer.state_dict()
        reason = _end_reason(state["rows"], state["stopped"], self.config)
        if not reason:
            raise TrainingError(f"the training ended early for an unknown reason; {how}")
        if self.trainer.is_global_zero:
            self.writer.write_state("finished", reason)
        return _result(
            self.folder, state["rows"], state["best_epoch"], reason, bad=len(self.pictures.bad)
        )

    def _record(self, state: str, reason: str = "") -> None:
        """Write ``run.json``, if it can be written: the error that is on its way says more."""
        if is_first_process():
            with contextlib.suppress(OSError):
                self.writer.write_state(state, reason)

    def _command(self) -> str:
        """How to go on, with those of the machine's options that change results."""
        options = f" --precision {self.machine.precision}" * (self.machine.precision != "32-true")
        options += " --sync-batchnorm" * self.machine.sync_batchnorm
        return f"mobilesteelnet train --resume {shlex.quote(str(self.folder.path))}{options}"


def _saved_state(folder: RunFolder) -> dict[str, Any] | None:
    """The writer's part of ``last.ckpt``; None before the first epoch has ended."""
    if not folder.last.is_file():
        return None
    saved = AtomicCheckpointIO().load_checkpoint(folder.last)
    state = saved.get("callbacks", {}).get(RunWriter.__qualname__)
    if not isinstance(state, dict):
        raise TrainingError(f"{str(folder.last)!r} is the state of another program's training")
    return state


def _end_reason(rows: list[dict[str, Any]], stopped: bool, config: TrainConfig) -> str:
    if stopped:
        return f"validation loss not lower for {config.patience} epochs"
    if len(rows) >= config.epochs:
        return f"all {config.epochs} epochs done"
    return ""


def _unwritten(name: str, folder: RunFolder, error: OSError) -> str:
    """That the folder cannot be written, and why."""
    # safetensors tells no number, only the text.
    full = error.errno == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
    text = f"{name}{str(folder.path)!r} cannot be written: {error}"
    return f"the disk is full: {text}" if full else text


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


def _scan(config: TrainConfig, console: Console | None) -> PictureSet:
    from .progress import bar

    shown = console if is_first_process() else None
    with bar("reading pictures", shown) as progress:
        rule: Any = config.on_bad_file
        pictures = scan(config.data, on_bad_file=rule, progress=progress)
    if shown is not None:
        classes = ", ".join(pictures.classes)
        told = f"{len(pictures)} pictures of {len(pictures.classes)} classes ({classes}): "
        shown.print(told + pictures.layout, markup=False, highlight=False, soft_wrap=True)
        for file in pictures.bad:
            shown.print(f"skipped: {file.name}: {file.reason}", markup=False, highlight=False)
    tell_of_contradictions(pictures, shown)
    if len(pictures.classes) < 2:
        raise DataError(f"data={config.data!r}: two classes at least are needed")
    return pictures


def is_first_process() -> bool:
    """Whether this is the process that writes and talks; the others only compute."""
    return not _get_rank()
