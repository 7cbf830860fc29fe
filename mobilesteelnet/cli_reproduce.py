"""The command ``reproduce``: the tables of the paper, run by run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .cli_common import (
    OK,
    SOME_FAILED,
    Accelerator,
    Backend,
    Fits,
    Overwrite,
    Precision,
    Settings,
    Workers,
    command_to_go_on,
    make_machine,
    tell_bad_files,
)
from .progress import bar

if TYPE_CHECKING:
    from .crossval import CrossValidation
    from .reproduction.grid import PlannedRun
    from .reproduction.runner import Places
    from .train_config import Machine

WHAT = (
    *("table3", "table4", "table5", "table6", "table7", "table8", "table9"),
    *("ours", "recipe", "sets", "page"),
)
_PLACES = {"data", "runs", "results", "page", "figures"}
_COMPUTING = {"settings", "only", "show", "accelerator", "backend", "overwrite"}
_TRAINING = {*_COMPUTING, "epochs", "part", "precision", "workers"}
# The options that do something, but for the places; any other one is refused rather than ignored.
_MEANT: dict[str, set[str]] = {
    "page": set(),
    "table3": {"show"},
    **dict.fromkeys(("table6", "table8"), _COMPUTING),
    "recipe": {*_TRAINING, "fits"},
    "sets": {*_TRAINING, "seeds"},
}
_OF_A_TABLE = {*_TRAINING, "seeds", "recipe"}


def reproduce_command(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            help="table4, table5, table7, table9 (accuracies), ours (our recipe), recipe "
            "(cross-validation of its candidates), sets (both recipes on other pictures), table3, "
            "table6, table8 (contrast, cost), page (RESULTS.md)."
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="The pictures, for all but costs and sets.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each network, from seed 42 on.")] = 5,
    recipe: Annotated[
        str | None, typer.Option(help="published or ours; left out: what the table needs.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Another length than the recipe's, to try things.")
    ] = None,
    settings: Settings = None,
    only: Annotated[str | None, typer.Option(help="Rows of the table (or sets), a,b,c.")] = None,
    part: Annotated[
        str, typer.Option(help="i/n: every n-th run from the i-th, for several machines.")
    ] = "1/1",
    fits: Fits = None,
    show: Annotated[
        bool, typer.Option("--list", help="Only list the runs and what they would take.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Run folders.")] = Path("runs/reproduce"),
    results: Annotated[Path, typer.Option(help="JSON files.")] = Path("results"),
    page: Annotated[Path, typer.Option(help="The page, for `page`.")] = Path("RESULTS.md"),
    figures: Annotated[Path, typer.Option(help="Its figures.")] = Path("docs/results"),
    accelerator: Accelerator = "auto",
    precision: Precision = "32-true",
    workers: Workers = None,
    backend: Backend = None,
    overwrite: Overwrite = False,
) -> int:
    """Make a table of the paper again; what is done stays, what was cut off goes on.

    Example: [bold]mobilesteelnet reproduce table7 --data NEU-DET.zip --seeds 5[/bold]

    Example: [bold]mobilesteelnet reproduce table7 --data NEU-DET.zip --list[/bold]

    Example: [bold]mobilesteelnet reproduce page[/bold]
    """
    from .recipes import parse_settings
    from .run_folder import require_folder

    if what not in WHAT:
        raise ValueError(f"{what!r}: must be one of {', '.join(WHAT)}")
    _refuse_unused(context, what)
    if what == "page":
        from .reproduction.page import write_page

        for path in write_page(results, page, figures):
            typer.echo(path)
        return OK
    for folder in (runs, results):
        require_folder(folder)
    changes = parse_settings(settings or [])
    if epochs is not None:
        changes["epochs"] = epochs
    machine = make_machine(accelerator, precision, workers, backend)
    from .reproduction.runner import Places

    places = Places("" if data is None else str(data.absolute()), runs, results)
    request = _Request(places, changes, machine, only, part, show, overwrite)
    if what in ("table6", "table8"):
        return _measure(what, request)
    if data is None and what != "sets":
        raise ValueError(f"reproduce {what}: --data is needed")
    if data is not None and what == "table3":
        return _contrast(data, results, show)
    if what == "sets":
        return _sets(data, seeds, request)
    if what == "recipe":
        return _candidates(request, fits)
    return _accuracies(what, seeds, recipe, request)


def _refuse_unused(context: typer.Context, what: str) -> None:
    """Raise for an option that would change nothing of what is asked for."""
    meant = _MEANT.get(what, _OF_A_TABLE) | _PLACES | {"what"}
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name not in meant and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"reproduce {what}: {parameter.opts[0]} has no meaning")


@dataclass(frozen=True)
class _Request:
    """What was asked for, but for what only some of it takes."""

    places: Places
    changes: dict[str, Any]
    machine: Machine
    only: str | None
    part: str
    show: bool
    overwrite: bool


def _accuracies(what: str, seeds: int, recipe: str | None, request: _Request) -> int:
    from .recipes import OURS, PUBLISHED
    from .reproduction.grid import ROW_OPTIONS, plan_runs

    _refuse(what, request.changes, {"seed", *ROW_OPTIONS}, "each row and run has its own")
    planned = plan_runs(what, seeds, recipe or (OURS if what == "ours" else PUBLISHED))
    names = _chosen(request.only, sorted({run.network for run in planned}))
    return _train([run for run in planned if run.network in names], request)


def _sets(data: Path | None, seeds: int, request: _Request) -> int:
    """Both recipes on one's own pictures, or on those that can be made here."""
    from .reproduction.sets import SETS, find_set, plan_set, set_folder, set_name, set_places

    _refuse("sets", request.changes, {"seed"}, "each run has its own")
    planned = plan_set(seeds)
    found = {} if data is None else {set_name(data): data.absolute()}
    code = OK
    for name in _chosen(request.only, list(found or SETS)):
        if data is None and request.show and not set_folder(name, request.places.runs).is_dir():
            typer.echo(f"{name}: pictures to make, {len(planned)} runs to do")
            continue
        if data is None:
            with bar(f"making the pictures of {name}", Console(stderr=True)) as progress:
                found[name] = find_set(name, request.places.runs, progress)
        places = set_places(name, found[name], request.places)
        code = max(code, _train(planned, replace(request, places=places)))
    return code


def _train(planned: list[PlannedRun], request: _Request) -> int:
    from .reproduction.runner import finish_runs, read_result

    planned = _share(planned, request.part)
    if request.show:
        return _list(planned, request)
    paths = finish_runs(
        planned,
        request.places,
        request.changes,
        machine=request.machine,
        console=Console(stderr=True),
        overwrite=request.overwrite,
        again=command_to_go_on(),
    )
    code = OK
    for path in paths:
        result = read_result(path)
        typer.echo(f"{100 * result['test']['average_accuracy']:6.2f} %  {path}")
        code = SOME_FAILED if result.get("bad_files") else code
    typer.echo("next: mobilesteelnet reproduce page")
    return code


def _list(planned: list[PlannedRun], request: _Request) -> int:
    from .data import scan
    from .predict import choose_device
    from .reproduction.listing import in_words, list_runs

    console = Console(stderr=True)
    with bar("reading pictures", console) as progress:
        pictures = scan(request.places.data, progress=progress)
    device = choose_device(request.machine.device)
    with console.status("timing two steps of each network"):
        listed = list_runs(
            planned,
            request.places,
            request.changes,
            pictures=pictures,
            device=device,
            precision=request.machine.precision,
        )
    for item in listed:
        left = f", {in_words(item.seconds)} at most" if item.seconds else ""
        typer.echo(f"{item.run.recipe} {item.run.name}: {item.state}{left}")
    rough = "" if all(item.measured for item in listed) else " (from two training steps: rough)"
    total = in_words(sum(item.seconds for item in listed))
    typer.echo(f"{len(listed)} runs, {total} at most on this machine{rough}")
    return OK


def _candidates(request: _Request, fits: int | None) -> int:
    from .recipes import CANDIDATES
    from .reproduction.candidates import judge_candidates, result_file

    codes = [OK]

    def tell(path: Path, found: CrossValidation) -> None:
        codes.append(SOME_FAILED if found.bad_files else OK)
        spread = "" if found.deviation is None else f" ± {100 * found.deviation:.2f}"
        typer.echo(f"{100 * found.average_accuracy:.2f}{spread} %  {path}")

    names = _share(_chosen(request.only, list(CANDIDATES)), request.part)
    if request.show:
        for name in names:
            done = result_file(name, request.places).is_file()
            typer.echo(f"{name}: {'done' if done else 'to do'}")
        return OK
    judge_candidates(
        names,
        request.places,
        request.changes,
        fits=fits,
        machine=request.machine,
        console=Console(stderr=True),
        overwrite=request.overwrite,
        again=command_to_go_on(),
        tell=tell,
    )
    return max(codes)


def _refuse(what: str, changes: dict[str, Any], names: set[str], why: str) -> None:
    """Raise for an option by ``--set`` that ``names`` has."""
    for name in sorted(names & changes.keys()):
        raise ValueError(f"reproduce {what}: --set {name} has no meaning, {why}")


def _measure(what: str, request: _Request) -> int:
    from .predict import choose_device
    from .reproduction.cost import measure_cost, stored_cost
    from .reproduction.grid import COST_TABLES
    from .run_folder import write_json

    changes, backend = request.changes, request.machine.backend
    _refuse(what, changes, set(changes) - {"size", "batch_size"}, "nothing is trained")
    size, batch = changes.get("size", 224), changes.get("batch_size", 4)
    console = Console(stderr=True)
    for name in _chosen(request.only, list(COST_TABLES[what].rows)):
        target = request.places.results / "cost" / f"{name}.json"
        if not request.overwrite and (found := stored_cost(target, size, batch, backend)):
            typer.echo(f"there already, of {found['machine']['device']}: {target}")
            continue
        if request.show:
            typer.echo(f"{name}: to do")
            continue
        with console.status(f"measuring {name}"):
            device = choose_device(request.machine.device)
            cost = measure_cost(name, device=device, backend=backend, size=size, batch=batch)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, cost)
        typer.echo(f"{1000 * cost['forward_seconds']:8.2f} ms an image  {target}")
    return OK


def _contrast(data: Path, results: Path, show: bool) -> int:
    from .data import scan
    from .datacheck import contrast_table
    from .run_folder import write_json

    target = results / "contrast.json"
    if show:
        typer.echo(f"{target}: {'there, to be measured again' if target.is_file() else 'to do'}")
        return OK
    with bar("reading pictures", Console(stderr=True)) as progress:
        pictures = scan(data, progress=progress)
    results.mkdir(parents=True, exist_ok=True)
    write_json(target, contrast_table(pictures))
    typer.echo(target)
    return tell_bad_files(pictures.bad)


def _chosen(only: str | None, names: list[str]) -> list[str]:
    if only is None:
        return names
    wanted = [name.strip() for name in only.split(",")]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ValueError(f"--only {unknown[0]!r}: must be of {', '.join(names)}")
    return wanted


def _share(items: list[Any], part: str) -> list[Any]:
    try:
        number, parts = (int(text) for text in part.split("/"))
    except ValueError:
        raise ValueError(f"--part {part!r}: must be i/n, as 1/4") from None
    if not 1 <= number <= parts:
        raise ValueError(f"--part {part!r}: i must be from 1 to n")
    return items[number - 1 :: parts]
