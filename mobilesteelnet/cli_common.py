"""What the commands share: their common options, opening a checkpoint, telling of bad files."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .progress import bar

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .data import PictureSet
    from .run_folder import RunFolder
    from .train_config import Machine

OK, SOME_FAILED = 0, 1
CHECKPOINT_ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt")

CheckpointArgument = Annotated[
    Path, typer.Argument(help="A run folder, a .safetensors checkpoint, or published .pth weights.")
]
DataOfRun = Annotated[
    Path | None, typer.Option(help="Folder or zip; left out: the pictures of the run.")
]
BatchSize = Annotated[int, typer.Option(help="Pictures a forward.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Backend = Annotated[
    str | None, typer.Option(help="Backend of the fused stages; left out: the best that runs.")
]
Classes = Annotated[
    str | None,
    typer.Option(help="Class names for published weights, a,b,c in the order of the outputs."),
]
FrozenOption = Annotated[
    bool,
    typer.Option("--frozen/--no-frozen", help="On a CPU: fold and pack the weights first, faster."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="OPTION=VALUE", help="Change an option of train; repeatable."),
]
Fits = Annotated[
    int | None,
    typer.Option(help="Only the first so many trainings of a cross-validation (of 4)."),
]
Accelerator = Annotated[str, typer.Option(help="auto, cpu or gpu.")]
Precision = Annotated[str, typer.Option(help="32-true, bf16-mixed, 16-mixed.")]
Workers = Annotated[int | None, typer.Option(help="Reading processes; changes no result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Do again what is there already.")]
OnBadFile = Annotated[str, typer.Option(help="skip bad files (exit code 1), or fatal.")]


class Output(Console):
    """What a command answers; a reader that has gone is told as by print, not as bad pictures."""

    def on_broken_pipe(self) -> None:
        """As rich asks for it."""
        raise BrokenPipeError


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a run folder, named like a checkpoint, or the word ``shipped``."""
    from .run_folder import RunFolder
    from .shipped import is_shipped

    if path.is_dir():
        return RunFolder(path).holds_run()
    return path.suffix.lower() in CHECKPOINT_ENDINGS or is_shipped(path)


def checkpoint_and_pictures(paths: list[Path]) -> tuple[Path, list[Path]]:
    """The checkpoint that comes first, or the package's, and the pictures.

    Raises:
        ValueError: There are no pictures, or a checkpoint among them.
    """
    from .shipped import SHIPPED

    source, *rest = paths
    if not is_checkpoint(source):
        source, rest = Path(SHIPPED), paths
    elif not rest:
        raise ValueError(f"{str(source)!r} is a checkpoint: give the pictures after it")
    for path in rest:
        if is_checkpoint(path):
            raise ValueError(f"{str(path)!r} is a checkpoint: give one, before the pictures")
    return source, rest


def open_checkpoint(
    source: Path, device: str, backend: str | None, classes: str | None, frozen: bool = False
) -> tuple[Checkpoint, RunFolder | None]:
    """The network of a path or of the word ``shipped``, and the run where the path is one."""
    from .checkpoint import load_checkpoint
    from .predict import choose_device
    from .run_folder import RunFolder
    from .shipped import is_shipped, load_shipped

    place = choose_device(device)
    if is_shipped(source):
        if classes is not None:
            raise ValueError("--classes: the shipped weights have the names of theirs")
        shipped = load_shipped(place, backend=backend)
        return shipped.frozen() if frozen and place.type == "cpu" else shipped, None
    run = None
    file = source
    if source.is_dir():
        run = RunFolder(source)
        run.require()
        file = run.best
    names = [name.strip() for name in classes.split(",")] if classes is not None else None
    checkpoint = load_checkpoint(file, place, classes=names, backend=backend)
    return checkpoint.frozen() if frozen and place.type == "cpu" else checkpoint, run


def read_pictures(
    source: Path, data: Path | None, run: RunFolder | None, on_bad_file: str, console: Console
) -> PictureSet:
    """The labelled pictures of ``--data``, or those of the run that ``source`` is."""
    from .data import scan

    if data is None:
        if run is None:
            raise ValueError(f"--data is needed: {str(source)!r} is no run folder")
        data = run.read_data()
    rule: Any = on_bad_file
    with bar("reading pictures", console) as progress:
        return scan(data, on_bad_file=rule, progress=progress)


def choose_part(
    split: str | None,
    checkpoint: Checkpoint,
    pictures: PictureSet,
    run: RunFolder | None,
    console: Console,
) -> tuple[str, list[int]]:
    """The part that was asked for; else what the training never saw: its name, and its pictures."""
    from .evaluate import pick_split
    from .shipped import unseen_pictures

    if split is not None:
        return split, pick_split(pictures, split, run)
    part, indexes = unseen_pictures(checkpoint, pictures)
    other_set = part == "all" and checkpoint.training.get("seen") is not None
    if run is None or other_set:
        return part, indexes
    # The run's test pictures, without those that the weights it started from had seen.
    unseen, test = set(indexes), pick_split(pictures, "test", run)
    known = {i for side in ("train", "val") for i in pick_split(pictures, side, run)}
    if new := len(unseen - known - set(test)):
        console.print(
            f"{new} pictures that are in no part of the run are left out: --split all takes all"
        )
    return "test", [i for i in test if i in unseen]


def check_targets(*targets: str | Path | None) -> None:
    """Refuse files that cannot be written before the work; None and ``-`` are none.

    Raises:
        OSError: A folder is missing or not writable.
        ValueError: A picture or a checkpoint would be replaced, or one result by another.
    """
    from .pictures import PICTURE_EXTENSIONS
    from .run_folder import require_writable

    taken: set[Path] = set()
    for target in targets:
        if target is None or target == "-":
            continue
        require_writable(target)
        inputs = {*PICTURE_EXTENSIONS, ".zip", *CHECKPOINT_ENDINGS}
        if Path(target).suffix.lower() in inputs:
            raise ValueError(f"{str(target)!r} is named like an input: it would be replaced")
        place = Path(target).resolve()
        if place in taken and (place.is_file() or not place.exists()):  # a device takes both
            raise ValueError(f"{str(target)!r} is asked for twice: one would replace the other")
        taken.add(place)


def require_name(option: str, target: Path | None, suffix: str) -> None:
    """Refuse a file whose name does not say what it will be, and one that cannot be written."""
    from .run_folder import require_writable

    if target is None:
        return
    if target.suffix.lower() != suffix:
        raise ValueError(f"{option} {str(target)!r}: must end in {suffix}")
    require_writable(target)


def write(target: str, text: str) -> None:
    """Write text to a file, or for ``-`` to the output."""
    from .run_folder import write_text

    if target == "-":
        if sys.stdout is None:  # closed by whoever started us
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), "the output")
        sys.stdout.write(text)
        sys.stdout.flush()  # here a reader that has gone can be told of
    else:
        write_text(target, text)


def to_json(target: str, value: Any) -> str:
    """Indented JSON; escaped where the output's encoding may lack a name's letters."""
    encoding = "utf-8" if target != "-" or sys.stdout is None else sys.stdout.encoding
    plain = str(encoding).lower().replace("-", "") == "utf8"
    return json.dumps(value, indent=2, ensure_ascii=not plain) + "\n"


def tell_bad_files(bad: list[Any], *, all_failed: bool = False) -> int:
    """Name the files that could not be used; the exit code that they make."""
    from .data import DataError

    for file in bad:
        Console(stderr=True).print(Text(f"bad file: {file.name}: {file.reason}"), soft_wrap=True)
    if bad and all_failed:
        raise DataError(f"none of the {len(bad)} files could be used")
    return SOME_FAILED if bad else OK


def command_line() -> str:
    """The command as it was given."""
    return shlex.join(["mobilesteelnet", *sys.argv[1:]])


def command_to_go_on() -> str:
    """The command as it was given, without what would begin anew."""
    return shlex.join(["mobilesteelnet", *(word for word in sys.argv[1:] if word != "--overwrite")])


def make_machine(
    accelerator: str, precision: str, workers: int | None, backend: str | None
) -> Machine:
    """One device: the paper's batch is that of one, and parallel runs are what --part is for."""
    from .train_config import Machine

    return Machine(
        accelerator=accelerator, devices="1", precision=precision, workers=workers, backend=backend
    )
