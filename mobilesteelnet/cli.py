"""The command line ``mobilesteelnet``: one function a command, the work is done elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .cli_common import (
    OK,
    SOME_FAILED,
    Backend,
    BatchSize,
    CheckpointArgument,
    Classes,
    DataOfRun,
    Device,
    FrozenOption,
    OnBadFile,
    Output,
    check_targets,
    checkpoint_and_pictures,
    choose_part,
    command_line,
    open_checkpoint,
    read_pictures,
    require_name,
    tell_bad_files,
    to_json,
    write,
)
from .cli_reproduce import reproduce_command
from .cli_results import (
    calibrate_command,
    crossval_command,
    package_weights_command,
    robustness_command,
)
from .cli_training import train_command
from .progress import bar

if TYPE_CHECKING:
    import torch

EXIT_CODES = """
Exit codes: 0 all done; 1 done, but some input files could not be used, or data check found one
picture in several classes; 2 wrong options, run folder
or a missing extra; 3 the pictures cannot be used; 4 the checkpoint cannot be used; 5 the training
failed or was interrupted; 6 a file cannot be read, written or exported; 70 a fault of this program;
130 interrupted.
"""

app = typer.Typer(
    name="mobilesteelnet",
    help="Classify defects on steel surfaces: train, evaluate and use MobileSteelNet.\n\n"
    + EXIT_CODES.replace("\n", " "),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at picture sets before training on them.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.command("train")(train_command)
app.command("crossval")(crossval_command)
app.command("reproduce")(reproduce_command)
app.command("robustness")(robustness_command)
app.command("calibrate")(calibrate_command)
app.command("package-weights")(package_weights_command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("mobilesteelnet")
        except PackageNotFoundError:
            number = "(not installed)"
        typer.echo(f"mobilesteelnet {number}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command; ``main`` looks for --debug itself."""


@app.command("eval")
def evaluate_command(
    source: CheckpointArgument,
    data: DataOfRun = None,
    split: Annotated[
        str | None,
        typer.Option(help="test, val, train or all; left out: what the training never saw."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Report folder; left out: RUN/eval-SPLIT or ./evaluation.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Write the HTML report and its figures.")] = True,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    backend: Backend = None,
    classes: Classes = None,
    frozen: FrozenOption = True,
    on_bad_file: OnBadFile = "skip",
) -> int:
    """Measure a checkpoint on labelled pictures and write a report.

    Example: [bold]mobilesteelnet eval runs/first --split test[/bold]

    Example: [bold]mobilesteelnet eval best.safetensors --data plates.zip --out report[/bold]
    """
    from .evaluate import WHOSE, evaluate
    from .run_folder import EVALUATION, refuse_inside, require_folder, write_json
    from .tables import evaluation_table

    console = Console(stderr=True)
    checkpoint, run = open_checkpoint(source, device, backend, classes, frozen)
    pictures = read_pictures(source, data, run, on_bad_file, console)
    split, indexes = choose_part(split, checkpoint, pictures, run, console)
    target = out or (run.path / f"{EVALUATION}-{split}" if run is not None else Path("evaluation"))
    refuse_inside("--out ", target, pictures.path)
    require_folder(target)
    with bar("classifying", console) as progress:
        result = evaluate(
            checkpoint, pictures, indexes, split=split, batch_size=batch_size, progress=progress
        )
    Output().print(evaluation_table(result))
    typer.echo(
        f"average accuracy {100 * result.average_accuracy:.2f} %, overall accuracy "
        f"{100 * result.overall_accuracy:.2f} %, {len(result.wrong)} of "
        f"{len(result.predictions)} wrong ({WHOSE[split]})"
    )
    if report:
        from .report import write_report

        with console.status("writing the report"):
            files = write_report(
                target, result, checkpoint, pictures, run=run, command=command_line()
            )
        typer.echo(f"report: {files.page}")
    else:
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "evaluation.json", result.to_dict())
        typer.echo(f"figures: {target / 'evaluation.json'}")
    return tell_bad_files(pictures.bad)


@app.command("predict")
def predict_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[CHECKPOINT] PICTURES...",
            help="A run folder or checkpoint, left out: the package's own weights; then pictures, "
            "folders or zips of pictures.",
        ),
    ],
    top_k: Annotated[int, typer.Option(help="How many classes to show for each picture.")] = 1,
    min_confidence: Annotated[
        float, typer.Option(help="Call pictures uncertain below this probability, 0 to 1.")
    ] = 0.0,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write JSON; - is the output.")
    ] = None,
    csv_file: Annotated[
        str | None, typer.Option("--csv", metavar="FILE|-", help="Write CSV; - is the output.")
    ] = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    backend: Backend = None,
    classes: Classes = None,
    frozen: FrozenOption = True,
) -> int:
    """Say which defect each picture shows; goes on past files that cannot be read.

    Of several pictures, folders and zips the names are told with their paths. In CSV, names that
    a spreadsheet would take for a formula begin with an apostrophe.

    Example: [bold]mobilesteelnet predict plates/*.jpg --min-confidence 0.9[/bold]

    Example: [bold]mobilesteelnet predict runs/first plate.jpg --top-k 3[/bold]

    Example: [bold]mobilesteelnet predict best.safetensors pictures/ --csv result.csv[/bold]
    """
    from .data import scan_several
    from .predict import predict
    from .run_folder import rows_to_csv
    from .tables import prediction_table

    if json_file == "-" and csv_file == "-":
        raise ValueError("--json and --csv cannot both be written to the output")
    check_targets(json_file, csv_file)
    source, paths = checkpoint_and_pictures(paths)
    console = Console(stderr=True)
    checkpoint, _ = open_checkpoint(source, device, backend, classes, frozen)
    with bar("reading pictures", console) as progress:
        pictures = scan_several(paths, progress=progress)
    with bar("classifying", console) as progress:
        result = predict(
            checkpoint,
            pictures,
            top_k=top_k,
            min_confidence=min_confidence,
            batch_size=batch_size,
            progress=progress,
        )
    if json_file is not None:
        write(json_file, to_json(json_file, result.to_dict()))
    if csv_file is not None:
        write(csv_file, rows_to_csv(result.to_rows()))
    if "-" not in (json_file, csv_file) and result.items:
        Output().print(prediction_table(result))
    return tell_bad_files(result.bad, all_failed=not result.items)


@data_app.command("check")
def check_command(
    path: Annotated[Path, typer.Argument(help="Folder or zip of <class>/<picture>.")],
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write JSON; - is the output.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a box plot of the contrasts as PNG.")
    ] = None,
    on_bad_file: OnBadFile = "skip",
) -> int:
    """Count pictures, find duplicates and bad files, and measure the contrast of each class.

    Example: [bold]mobilesteelnet data check NEU-DET.zip --plot contrast.png[/bold]
    """
    from .data import scan
    from .datacheck import check, contrast_box_plot
    from .run_folder import refuse_inside

    rule: Any = on_bad_file
    check_targets(json_file)
    require_name("--plot", plot, ".png")
    if plot is not None:
        refuse_inside("--plot ", plot, path)
    with bar("reading pictures", Console(stderr=True)) as progress:
        pictures = scan(path, on_bad_file=rule, progress=progress)
    facts = check(pictures)
    if json_file is not None:
        write(json_file, facts.to_json() + "\n")
    if json_file != "-":
        Output().print(facts)
    if plot is not None:
        contrast_box_plot(pictures, plot)
    return OK if facts.ok else SOME_FAILED


@data_app.command("synthetic")
def synthetic_command(
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    per_class: Annotated[int, typer.Option(help="Pictures of each of the six classes.")] = 60,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 200,
    seed: Annotated[int, typer.Option(help="The same seed draws the same pictures.")] = 0,
) -> int:
    """Draw a set of synthetic pictures to try things on; they are not photographs of steel.

    Example: [bold]mobilesteelnet data synthetic toy-set --per-class 100[/bold]
    """
    from .synthetic import make_synthetic

    with bar("drawing", Console(stderr=True)) as progress:
        typer.echo(make_synthetic(out, per_class, size, seed, progress=progress))
    return OK


@app.command("info")
def info_command(
    source: Annotated[
        Path | None, typer.Argument(help="A checkpoint; left out: the published network.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Input size; left out: the checkpoint's, or 224.")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write JSON; - is the output.")
    ] = None,
    backend: Backend = None,
) -> int:
    """Show parameters, FLOP, bytes and which backend runs each stage, and why.

    Example: [bold]mobilesteelnet info runs/first --size 224[/bold]
    """
    from .model import MobileSteelNet
    from .networks import describe_network
    from .tables import information_table

    check_targets(json_file)
    facts: dict[str, Any] = {}
    model: torch.nn.Module = MobileSteelNet(backend=backend)
    if source is not None:
        checkpoint, _ = open_checkpoint(source, "cpu", backend, None)
        size = checkpoint.input_size if size is None else size
        facts = {"classes": checkpoint.classes, "training": checkpoint.training}
        model = checkpoint.model
    if size is not None and not 1 <= size <= 8192:
        raise ValueError(f"--size {size}: must be from 1 to 8192")
    facts = {**describe_network(model, size or 224), **facts}
    if json_file is not None:
        write(json_file, json.dumps(facts, indent=2) + "\n")
    if json_file != "-":
        console = Output()
        console.print(information_table(facts))
        megabytes = facts["float32_bytes"] / 1e6
        typer.echo(f"{facts['parameters']:,} parameters, {megabytes:.1f} MB in float32\n")
        if "classes" in facts:
            console.print(Text("classes: " + ", ".join(facts["classes"]) + "\n"))
        console.print(Text(facts["backends"]), soft_wrap=True)
    return OK


@app.command("export")
def export_command(
    source: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    classes: Classes = None,
) -> int:
    """Write a checkpoint as ONNX, with any batch size, checked against the network.

    Example: [bold]mobilesteelnet export runs/first mobilesteelnet.onnx[/bold]
    """
    import torch

    from .export import export_onnx

    require_name("OUT", out, ".onnx")
    checkpoint, _ = open_checkpoint(source, "cpu", None, classes)
    example = torch.zeros(2, 3, checkpoint.input_size, checkpoint.input_size)
    with Console(stderr=True).status("exporting"):
        # The temperature: logits are divided by it before the softmax, those of the file are not.
        names = ("classes", "normalisation", "temperature")
        about = {name: json.dumps(getattr(checkpoint, name)) for name in names}
        export_onnx(checkpoint.model, example, out, metadata=about)
    typer.echo(out)
    return OK


@app.command("demo")
def demo_command(
    data: Annotated[
        Path | None, typer.Option(help="Your pictures; left out: a synthetic set is drawn.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where everything is put.")] = Path("demo-output"),
    budget: Annotated[
        str | None,
        typer.Option(
            help="shipped: the package's weights on --data; or a training: tiny (a minute), small "
            "(some minutes), full (the paper's). Left out: shipped with --data, else small."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 42,
    overwrite: Annotated[bool, typer.Option(help="Start an earlier demo in --out again.")] = False,
) -> int:
    """Classify pictures with the weights that come with the package, and write the report.

    Without --data a small synthetic set is drawn and a narrow network trained on it first, in
    minutes on two cores; with a budget to train, that is done on your pictures too.

    Run again, it continues where it was cut off, or shows what is already there.

    Example: [bold]mobilesteelnet demo --data NEU-DET.zip[/bold]

    Example: [bold]mobilesteelnet demo --budget tiny[/bold]

    Example: [bold]mobilesteelnet demo --data NEU-DET.zip --budget small[/bold]
    """
    from .demo import default_budget, run_demo
    from .evaluate import WHOSE

    result = run_demo(
        out,
        data=data,
        budget=budget or default_budget(data),
        seed=seed,
        overwrite=overwrite,
        console=Console(stderr=True),
        command=command_line(),
    )
    typer.echo(
        f"average accuracy {100 * result.evaluation.average_accuracy:.2f} % on "
        f"{len(result.evaluation.predictions)} pictures, {WHOSE[result.evaluation.split]} "
        f"(chance: {100 / len(result.evaluation.classes):.1f} %)"
    )
    typer.echo(f"report:      {result.report}")
    typer.echo(f"checkpoint:  {result.checkpoint}")
    typer.echo(f"predictions: {result.predictions}")
    return tell_bad_files(result.bad)
