"""The commands that judge recipes and networks, and make the weights of a release."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .cli_common import (
    OK,
    SOME_FAILED,
    Accelerator,
    Backend,
    BatchSize,
    CheckpointArgument,
    DataOfRun,
    Device,
    Fits,
    FrozenOption,
    OnBadFile,
    Output,
    Overwrite,
    Precision,
    Settings,
    Workers,
    check_targets,
    choose_part,
    command_to_go_on,
    make_machine,
    open_checkpoint,
    read_pictures,
    require_name,
    tell_bad_files,
    write,
)
from .progress import bar

if TYPE_CHECKING:
    from .evaluate import Evaluation


def crossval_command(
    data: Annotated[Path, typer.Option(help="Folder or zip of <class>/<picture>.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs and crossval.json.")] = Path(
        "runs/crossval"
    ),
    recipe: Annotated[str, typer.Option(help="published or ours.")] = "published",
    settings: Settings = None,
    folds: Annotated[int, typer.Option(help="Parts, each validated on once.")] = 2,
    repeats: Annotated[int, typer.Option(help="How often the pictures are divided anew.")] = 2,
    fits: Fits = None,
    accelerator: Accelerator = "auto",
    precision: Precision = "32-true",
    workers: Workers = None,
    backend: Backend = None,
    overwrite: Overwrite = False,
) -> int:
    """Judge training options without touching the test pictures.

    Divides the training and validation pictures (10 % of the set) into folds; goes on where it was
    cut off.

    Example: [bold]mobilesteelnet crossval --data NEU-DET.zip --recipe ours --set dropout=0.2[/bold]
    """
    from .crossval import cross_validate
    from .recipes import parse_settings, recipe_options
    from .train_config import TrainConfig, refuse_idle

    changes = parse_settings(settings or [])
    config = TrainConfig(**{"data": str(data), **recipe_options(recipe), **changes})
    refuse_idle(config, changes)
    found = cross_validate(
        config,
        out,
        folds=folds,
        repeats=repeats,
        fits=fits,
        machine=make_machine(accelerator, precision, workers, backend),
        console=Console(stderr=True),
        overwrite=overwrite,
        again=command_to_go_on(),
    )
    spread = "" if found.deviation is None else f" ± {100 * found.deviation:.2f}"
    typer.echo(
        f"average accuracy {100 * found.average_accuracy:.2f}{spread} % over "
        f"{len(found.folds)} trainings, loss {found.loss:.4f}, calibration error "
        f"{100 * found.calibration_error:.2f} %"
    )
    return SOME_FAILED if found.bad_files else OK


def robustness_command(
    source: CheckpointArgument,
    data: DataOfRun = None,
    split: Annotated[
        str | None,
        typer.Option(help="test, val, train or all; left out: what the training never saw."),
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write JSON; - is the output.")
    ] = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    backend: Backend = None,
    frozen: FrozenOption = True,
    on_bad_file: OnBadFile = "skip",
) -> int:
    """Measure a checkpoint on darker, brighter, blurred, noisy and compressed pictures.

    Example: [bold]mobilesteelnet robustness runs/first --json results/robustness.json[/bold]
    """
    from .robustness import measure_robustness
    from .tables import robustness_table

    check_targets(json_file)
    console = Console(stderr=True)
    checkpoint, run = open_checkpoint(source, device, backend, None, frozen)
    pictures = read_pictures(source, data, run, on_bad_file, console)
    split, indexes = choose_part(split, checkpoint, pictures, run, console)
    with bar("classifying changed pictures", console) as progress:
        rows = measure_robustness(
            checkpoint, pictures, indexes, batch_size=batch_size, progress=progress
        )
    facts = {
        "split": split,
        "pictures": len(indexes),
        "checkpoint": source.name,
        "temperature": checkpoint.temperature,
        "rows": [asdict(row) for row in rows],
    }
    if json_file is not None:
        write(json_file, json.dumps(facts, indent=2) + "\n")
    if json_file != "-":
        Output().print(robustness_table(rows))
    return tell_bad_files(pictures.bad)


def calibrate_command(
    source: CheckpointArgument,
    data: DataOfRun = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="test, val, train or all; left out: val of the run, or of --data all pictures "
            "that the training did not learn from."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The new checkpoint; left out: that of the run itself.")
    ] = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    backend: Backend = None,
    on_bad_file: OnBadFile = "skip",
) -> int:
    """Make a checkpoint say how sure it is, by pictures that it did not learn from.

    Fits the temperature by which logits are divided: no decision changes, only the probabilities,
    and with them what --min-confidence accepts. A training does so with its validation pictures;
    this is for other pictures, as those of your own line, ten at least. Weights are written in
    float32. Where no other temperature fits better, the checkpoint's own is kept. How sure the new
    checkpoint says it is has to be judged on other pictures than these.

    Example: [bold]mobilesteelnet calibrate shipped --data my-line/ --out my-line.safetensors[/bold]
    """
    from .run_folder import RunFolder

    require_name("--out", out, ".safetensors")
    if out is None and not source.is_dir():
        raise ValueError(f"--out is needed: {str(source)!r} is no run folder")
    folder = RunFolder(source if out is None else out.parent)
    # A training that works there would have its best weights replaced.
    with folder.alone() if folder.holds_run() else contextlib.nullcontext():
        return _calibrate(source, data, split, out, batch_size, device, backend, on_bad_file)


def _calibrate(
    source: Path,
    data: Path | None,
    split: str | None,
    out: Path | None,
    batch_size: int,
    device: str,
    backend: str | None,
    on_bad_file: str,
) -> int:
    """``calibrate_command``, in a folder that nobody else writes to."""
    from .checkpoint import save_checkpoint
    from .evaluate import find_temperature, pick_split
    from .run_folder import RunFolder, refuse_inside, require_writable
    from .shipped import unlearnt_pictures

    console = Console(stderr=True)
    checkpoint, run = open_checkpoint(source, device, backend, None)
    target = out or RunFolder(source).best
    require_writable(target)
    pictures = read_pictures(source, data, run, on_bad_file, console)
    refuse_inside("--out ", target, pictures.path)
    if split is None and (run is None or data is not None):
        split, indexes = unlearnt_pictures(checkpoint, pictures)
    else:
        split = split or "val"
        indexes = pick_split(pictures, split, run)
    with bar("classifying", console) as progress:
        temperature, before, after = find_temperature(
            checkpoint, pictures, indexes, split=split, batch_size=batch_size, progress=progress
        )
    save_checkpoint(
        target,
        checkpoint.model,
        classes=checkpoint.classes if checkpoint.named_classes else pictures.classes,
        input_size=checkpoint.input_size,
        normalisation=checkpoint.normalisation,
        training=checkpoint.training,
        temperature=temperature,
    )
    typer.echo(_what_changed(checkpoint.temperature, temperature, before, after))
    typer.echo(f"checkpoint: {target}")
    return tell_bad_files(pictures.bad)


def _what_changed(old: float, new: float, before: Evaluation, after: Evaluation) -> str:
    errors = [100 * r.calibration.expected_error for r in (before, after) if r.calibration]
    pictures = f"{len(before.predictions)} pictures ({before.split})"
    if new == old:
        return (
            f"temperature {old:g} kept: none fits the {pictures} better: loss {before.loss:.4f}, "
            f"calibration error {errors[0]:.2f} %"
        )
    return (
        f"temperature {old:g} -> {new:g} from {pictures}: loss {before.loss:.4f} -> "
        f"{after.loss:.4f}, calibration error {errors[0]:.2f} -> {errors[1]:.2f} %"
    )


def package_weights_command(
    source: Annotated[Path, typer.Argument(help="A finished run folder, or a checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of weights, card.json and CARD.md.")] = Path(
        "weights"
    ),
    data: DataOfRun = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="What the accuracies are measured on; left out: what the training never saw."
        ),
    ] = None,
    storage: Annotated[str, typer.Option(help="int8, float16 or float32.")] = "int8",
    max_bytes: Annotated[
        int | None, typer.Option(help="Largest file; int8 takes seven bits where it must.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Points of accuracy that may be lost.")] = 0.3,
    note: Annotated[
        str, typer.Option(help="For the card: where the pictures are from, whom to cite.")
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the weights that lie in --out.")
    ] = False,
    batch_size: BatchSize = 32,
    device: Device = "auto",
) -> int:
    """Store a run's weights small, with a card and a checksum, if they stay as accurate.

    Example: [bold]mobilesteelnet package-weights runs/ours --max-bytes 8200000[/bold]
    """
    from .run_folder import refuse_inside
    from .shipped import package_weights

    console = Console(stderr=True)
    checkpoint, run = open_checkpoint(source, device, None, None)
    pictures = read_pictures(source, data, run, "skip", console)
    refuse_inside("--out ", out, pictures.path)
    split, indexes = choose_part(split, checkpoint, pictures, run, console)
    with bar("classifying twice", console) as progress:
        made = package_weights(
            checkpoint,
            pictures,
            indexes,
            out,
            split=split,
            storage=storage,
            max_bytes=max_bytes,
            tolerance=tolerance,
            note=note,
            overwrite=overwrite,
            batch_size=batch_size,
            progress=progress,
        )
    typer.echo(
        f"{made.bytes:,} bytes as {storage}: {100 * made.after.average_accuracy:.2f} % "
        f"({abs(made.loss):.2f} points {'less' if made.loss > 0 else 'more'} than before)"
    )
    typer.echo(f"weights: {made.file}")
    return tell_bad_files(pictures.bad)
