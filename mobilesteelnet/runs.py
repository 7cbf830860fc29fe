"""Runs that are parts of something larger: trained, continued or left as they are, as it needs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

from .run_folder import RunFolder, RunFolderError
from .run_lock import LOCK
from .train import Machine, TrainConfig, TrainResult, is_first_process, resume, train

if TYPE_CHECKING:
    from rich.console import Console

    from .splits import Split


def finish_run(
    config: TrainConfig,
    path: str | os.PathLike[str],
    *,
    machine: Machine | None = None,
    console: Console | None = None,
    split: Split | None = None,
    again: str = "",
) -> TrainResult:
    """Train a run, continue it where it was cut off, or take it as it is when it is finished.

    Args:
        config: What is learnt, and how; the same as before for a run that exists.
        path: The run's folder.
        machine: Where it is computed.
        console: Where progress is shown.
        split: Of the pictures of a new run; None draws it as the options say.
        again: As in :func:`mobilesteelnet.train.train`.

    Raises:
        RunFolderError: The folder holds a run with other options, or no run at all, or another
            process is in it.
        DataError, ValueError, TrainingError: As :func:`mobilesteelnet.train.train`.
    """
    run = RunFolder(path)
    if is_first_process():
        run.check_unused()
    if run.config.is_file():
        stored = TrainConfig.from_dict(run.read_json(run.config))
        changed = differing_option(stored, config)
        if changed:
            raise RunFolderError(
                f"run={str(run.path)!r} was begun with other options ({changed}): choose another "
                "folder for the runs, or start it again with --overwrite"
            )
        return resume(run.path, data=config.data, machine=machine, console=console, again=again)
    if _begun_only(run):
        with run.alone():
            run.delete()  # nothing is lost
    return train(config, run.path, machine=machine, console=console, split=split, again=again)


def _begun_only(run: RunFolder) -> bool:
    """Whether a run was cut off before its options were written."""
    names = {item.name for item in run.path.iterdir()} if run.path.is_dir() else set()
    return names - {LOCK} == {run.split.name}


def delete_runs(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Delete runs that are to be made again: all of them before the first one begins.

    So what is there after an interruption is of the new ones, and they go on without being told to
    begin again.

    Raises:
        RunFolderError: A folder holds something else than a run, or another process is in one;
            nothing was deleted.
    """
    found = [run for path in dict.fromkeys(paths) if (run := RunFolder(path)).path.exists()]
    with contextlib.ExitStack() as stack:
        for run in found:
            _check_deletable(run)
            stack.enter_context(run.alone())
        for run in found:
            run.delete()


def _check_deletable(run: RunFolder) -> None:
    if not _begun_only(run):
        run.check_free(overwrite=True)
    if others := run.others():
        raise RunFolderError(
            f"run={str(run.path)!r} is to be made again, but {others[0]!r} lies in it too: move "
            "that away"
        )


def differing_option(stored: TrainConfig, wanted: TrainConfig) -> str:
    """The first option that differs, as ``name=stored, not wanted``; where the data lies may."""
    for item in fields(TrainConfig):
        had, has = getattr(stored, item.name), getattr(wanted, item.name)
        if item.name == "data":
            had, has = os.path.basename(had), os.path.basename(has)
        if had != has:
            return f"{item.name}={had!r}, not {has!r}"
    return ""
