"""Judging the candidates of a recipe one after the other, each by cross-validation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..crossval import FOLDS, REPEATS, CrossValidation, cross_validate, forget, judged_on
from ..data import PictureSet, scan
from ..predict import choose_device
from ..progress import bar
from ..recipes import CANDIDATES
from ..run_folder import RunFolderError, write_json
from ..runs import differing_option
from ..train import Machine, TrainConfig
from .grid import FIRST_SEED
from .runner import WAY_OUT, Places, machine_facts

if TYPE_CHECKING:
    from rich.console import Console


def result_file(name: str, places: Places) -> Path:
    """Where the result of a candidate lies."""
    return places.results / "recipe" / f"{name}.json"


def judge_candidates(
    names: Sequence[str],
    places: Places,
    changes: dict[str, Any],
    *,
    fits: int | None = None,
    machine: Machine | None = None,
    console: Console | None = None,
    overwrite: bool = False,
    again: str = "",
    tell: Callable[[Path, CrossValidation], None],
) -> None:
    """Cross-validate the candidates whose results are not there yet.

    Args:
        names: Keys of :data:`mobilesteelnet.recipes.CANDIDATES`.
        places: Where things lie.
        changes: Options that replace those of all candidates.
        fits: Trainings of each; None does all (see :func:`mobilesteelnet.crossval.cross_validate`).
            A result of fewer is gone on with.
        machine: Where it is computed.
        console: Where progress is shown.
        overwrite: Judge them again; what is there of any of them is deleted first.
        again: As in :func:`mobilesteelnet.train.train`.
        tell: Called with each new result file and what is in it.

    Raises:
        RunFolderError: A run or result of other options is in the way.
        DataError, ValueError, TrainingError: As training does.
    """
    wanted = FOLDS * REPEATS if fits is None else fits
    with bar("reading pictures", console) as progress:
        pictures = scan(places.data, progress=progress)
    if overwrite:
        for name in names:
            forget(places.runs / "recipe" / name)
            result_file(name, places).unlink(missing_ok=True)
    for name in names:
        target = result_file(name, places)
        options = {"data": places.data, "seed": FIRST_SEED, **CANDIDATES[name]}
        config = replace(TrainConfig(**options), **changes)
        if target.is_file() and _fits_done(target, config, pictures) >= wanted:
            if console is not None:
                console.print(f"there already: {target}", highlight=False, markup=False)
            continue
        if console is not None:
            console.print(f"candidate {name}", highlight=False, markup=False)
        found = cross_validate(
            config,
            places.runs / "recipe" / name,
            fits=fits,
            machine=machine,
            console=console,
            again=again,
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        where = machine or Machine()
        facts = machine_facts(choose_device(where.device), where.precision)
        write_json(target, {**found.to_dict(), "machine": facts})
        tell(target, found)


def _fits_done(target: Path, config: TrainConfig, pictures: PictureSet) -> int:
    """How many trainings a result is of; it must be one of the same options and pictures."""
    try:
        result = json.loads(target.read_text("utf-8"))
        had = [fold["pictures"] for fold in result["folds"]]
        stored = TrainConfig.from_dict({**result["config"], "data": config.data})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"result {str(target)!r} cannot be read: {error}") from None
    changed = differing_option(stored, config)
    if changed:
        raise RunFolderError(
            f"result {str(target)!r} was made with other options ({changed}): {WAY_OUT}"
        )
    if had != (has := judged_on(config, pictures))[: len(had)]:
        raise RunFolderError(
            f"result {str(target)!r} is of other pictures (judged on {had}, here on {has}): "
            f"{WAY_OUT}"
        )
    return len(had)
