"""The ``train`` command: every option of the protocol, with the paper's values as defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

DATA, NETWORK, PROTOCOL, MACHINE = "Data", "Network", "Protocol", "Machine"
# What a resumed run takes from the command line; everything else is in its config.json.
RESUMABLE = {
    *("resume", "epochs", "data", "accelerator", "devices", "num_nodes", "strategy", "precision"),
    *("sync_batchnorm", "workers", "backend", "compile"),
}


def train_command(  # one parameter an option
    context: typer.Context,
    data: Annotated[
        Path | None, typer.Option(help="Folder or zip of <class>/<picture>.", rich_help_panel=DATA)
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Run folder; must be empty or missing.", rich_help_panel=DATA)
    ] = Path("runs/train"),
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue the run in this folder.", rich_help_panel=DATA, metavar="RUN"),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Delete an earlier run in --out.", rich_help_panel=DATA),
    ] = False,
    fractions: Annotated[
        str,
        typer.Option(help="Shares of training, validation, test.", rich_help_panel=DATA),
    ] = "0.05,0.05,0.90",
    seed: Annotated[
        int, typer.Option(help="Weights, order, augmentation; the split.", rich_help_panel=DATA)
    ] = 42,
    split_seed: Annotated[
        int | None, typer.Option(help="Of the split; left out: --seed.", rich_help_panel=DATA)
    ] = None,
    size: Annotated[int, typer.Option(help="Input size in pixels.", rich_help_panel=DATA)] = 224,
    small_size: Annotated[
        int | None,
        typer.Option(help="Of the first epochs, to save time.", rich_help_panel=DATA),
    ] = None,
    small_share: Annotated[
        float, typer.Option(help="Share of the epochs at --small-size.", rich_help_panel=DATA)
    ] = 0.75,
    augmentation: Annotated[
        str, typer.Option(help="published, texture or none.", rich_help_panel=DATA)
    ] = "published",
    crop_scale: Annotated[
        float, typer.Option(help="Least area of a crop of texture.", rich_help_panel=DATA)
    ] = 0.5,
    light: Annotated[
        float,
        typer.Option(help="How far texture changes brightness and contrast.", rich_help_panel=DATA),
    ] = 0.3,
    quarter_turns: Annotated[
        bool, typer.Option(help="Let texture turn by 90 degrees.", rich_help_panel=DATA)
    ] = True,
    mix: Annotated[str, typer.Option(help="none, mixup or cutmix.", rich_help_panel=DATA)] = "none",
    mix_alpha: Annotated[
        float, typer.Option(help="Beta distribution of the mix.", rich_help_panel=DATA)
    ] = 0.2,
    on_bad_file: Annotated[str, typer.Option(help="skip or fatal.", rich_help_panel=DATA)] = "skip",
    network: Annotated[
        str,
        typer.Option(help="mobilesteelnet, or resnet18, ... of table 4.", rich_help_panel=NETWORK),
    ] = "mobilesteelnet",
    attention: Annotated[
        str,
        typer.Option(
            help="ciema, none, se, eca, cbam, ca, ema, ciema-no-channel-interaction, "
            "ciema-no-cross-spatial.",
            rich_help_panel=NETWORK,
        ),
    ] = "ciema",
    fusion: Annotated[str, typer.Option(help="msff or none.", rich_help_panel=NETWORK)] = "msff",
    activation: Annotated[
        str,
        typer.Option(help="none (published), relu or relu-output.", rich_help_panel=NETWORK),
    ] = "none",
    width: Annotated[
        float, typer.Option(help="Multiplier of the channels.", rich_help_panel=NETWORK)
    ] = 1.0,
    bn_statistics: Annotated[
        str,
        typer.Option(help="sequential (published) or pooled.", rich_help_panel=NETWORK),
    ] = "sequential",
    dropout: Annotated[float, typer.Option(help="Before the head.", rich_help_panel=NETWORK)] = 0.0,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Start from the weights of a checkpoint; [bold]shipped[/bold] are the package's "
            "(with --recipe ours).",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="published or ours: what the options left out are.", rich_help_panel=PROTOCOL
        ),
    ] = "published",
    epochs: Annotated[int, typer.Option(help="At most so many.", rich_help_panel=PROTOCOL)] = 200,
    batch_size: Annotated[
        int, typer.Option(help="Pictures a step and device.", rich_help_panel=PROTOCOL)
    ] = 32,
    optimizer: Annotated[
        str, typer.Option(help="adam, adamw or sgd.", rich_help_panel=PROTOCOL)
    ] = "adam",
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="Peak.", rich_help_panel=PROTOCOL)
    ] = 1e-3,
    weight_decay: Annotated[float, typer.Option(rich_help_panel=PROTOCOL)] = 1e-4,
    momentum: Annotated[float, typer.Option(help="Of sgd.", rich_help_panel=PROTOCOL)] = 0.9,
    warmup_epochs: Annotated[
        int,
        typer.Option(help="Linear warm-up; the paper gives no length.", rich_help_panel=PROTOCOL),
    ] = 5,
    schedule: Annotated[
        str, typer.Option(help="none or cosine.", rich_help_panel=PROTOCOL)
    ] = "none",
    label_smoothing: Annotated[float, typer.Option(rich_help_panel=PROTOCOL)] = 0.0,
    gradient_clip: Annotated[
        float, typer.Option(help="Largest gradient norm; 0 is off.", rich_help_panel=PROTOCOL)
    ] = 0.0,
    patience: Annotated[
        int,
        typer.Option(
            help="Stop after so many epochs without a lower validation loss; 0 is off.",
            rich_help_panel=PROTOCOL,
        ),
    ] = 10,
    select: Annotated[
        str,
        typer.Option(
            help="Which epoch to keep: val_loss, val_accuracy or last.", rich_help_panel=PROTOCOL
        ),
    ] = "val_loss",
    validate_every: Annotated[
        int, typer.Option(help="Epochs between validations.", rich_help_panel=PROTOCOL)
    ] = 1,
    averaging: Annotated[
        str, typer.Option(help="Of the kept weights: none, ema or swa.", rich_help_panel=PROTOCOL)
    ] = "none",
    average_decay: Annotated[
        float, typer.Option(help="Of ema, a step.", rich_help_panel=PROTOCOL)
    ] = 0.98,
    average_from: Annotated[
        float, typer.Option(help="Share of the epochs before swa.", rich_help_panel=PROTOCOL)
    ] = 0.75,
    recalibrate_bn: Annotated[
        bool,
        typer.Option(help="Batch-norm buffers anew each epoch.", rich_help_panel=PROTOCOL),
    ] = False,
    accelerator: Annotated[
        str, typer.Option(help="auto, cpu or gpu.", rich_help_panel=MACHINE)
    ] = "auto",
    devices: Annotated[
        str, typer.Option(help="How many, or which (0,1).", rich_help_panel=MACHINE)
    ] = "auto",
    num_nodes: Annotated[int, typer.Option(help="Machines.", rich_help_panel=MACHINE)] = 1,
    strategy: Annotated[
        str, typer.Option(help="auto, ddp, ... of Lightning.", rich_help_panel=MACHINE)
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="32-true, bf16-mixed, 16-mixed.", rich_help_panel=MACHINE)
    ] = "32-true",
    sync_batchnorm: Annotated[
        bool, typer.Option(help="Batch norms over all devices.", rich_help_panel=MACHINE)
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(help="Reading processes; changes no result.", rich_help_panel=MACHINE),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend of the fused stages.", rich_help_panel=MACHINE)
    ] = None,
    compile: Annotated[
        bool, typer.Option(help="Use torch.compile.", rich_help_panel=MACHINE)
    ] = False,
) -> int:
    """Train a network; the defaults are the paper's protocol.

    Leaves best.safetensors, metrics.csv, history.json, split.json and TensorBoard logs in the run
    folder. A run that was cut off continues from its last whole epoch, with the same result if
    --precision and --sync-batchnorm are given as before; --data says where its pictures lie now.

    Example: [bold]mobilesteelnet train --data NEU-DET.zip --out runs/first[/bold]

    Example: [bold]mobilesteelnet train --resume runs/first[/bold]

    Example: [bold]mobilesteelnet train --data NEU-DET.zip --out runs/ours --recipe ours[/bold]

    Example: [bold]mobilesteelnet train --data plates/ --out runs/mine --fractions 0.7,0.15,0.15
    --schedule cosine --patience 0 --epochs 60[/bold]
    """
    from .recipes import recipe_options
    from .train import Machine, TrainConfig, train
    from .train import resume as resume_run
    from .train_config import refuse_idle

    console = Console(stderr=True)
    machine = Machine(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,
        sync_batchnorm=sync_batchnorm,
        workers=workers,
        backend=backend,
        compile=compile,
    )
    given = {name: context.params[name] for name in context.params if _was_given(context, name)}
    if resume is not None:
        foreign = sorted(set(given) - RESUMABLE)
        if foreign:
            options = ", ".join("--" + name.replace("_", "-") for name in foreign)
            raise ValueError(f"--resume takes the run's own options: leave out {options}")
        longer = epochs if "epochs" in given else None
        result = resume_run(resume, epochs=longer, data=data, machine=machine, console=console)
        return _tell(result)
    if data is None:
        raise ValueError("--data or --resume is needed")
    chosen = {name: given[name] for name in given if name in TrainConfig.__dataclass_fields__}
    chosen |= {"data": str(data), "fractions": _parse_fractions(fractions)}
    if chosen.get("activation") == "none":
        chosen["activation"] = None
    if init_from is not None:
        chosen["init_from"] = str(init_from)
    config = TrainConfig(**{**recipe_options(recipe), **chosen})
    refuse_idle(config, chosen)
    return _tell(train(config, out, machine=machine, overwrite=overwrite, console=console))


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _parse_fractions(text: str) -> tuple[float, float, float]:
    try:
        first, second, third = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--fractions {text!r}: must be three numbers, as 0.05,0.05,0.90"
        ) from None
    return first, second, third


def _tell(result: Any) -> int:
    from .train import is_first_process

    code = 1 if result.bad_files else 0
    if not is_first_process():
        return code
    row = result.rows[result.best_epoch - 1]
    start = "already finished" if result.already_finished else "finished"
    typer.echo(f"{start} after {len(result.rows)} epochs: {result.reason}")
    typer.echo(
        f"epoch {result.best_epoch} kept: validation loss {row['val_loss']:.4f}, "
        f"accuracy {100 * row['val_accuracy']:.2f} %"
    )
    typer.echo(f"checkpoint: {result.checkpoint}")
    typer.echo(f"next: mobilesteelnet eval {result.run}")
    return code
