"""Lightning's trainer as the runs of this package use it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from .callbacks import AtomicCheckpointIO, EpochProgress, RunWriter, SparseValidation
from .run_folder import RunFolder
from .train_config import Machine, TrainConfig


def make_trainer(
    config: TrainConfig,
    machine: Machine,
    folder: RunFolder,
    writer: RunWriter,
    console: Console | None,
    others: Sequence[L.Callback] = (),
    *,
    continued: bool = False,
) -> L.Trainer:
    """Lightning's trainer for a run, with its callbacks (`others` first) and loggers.

    Of a `continued` run, what was logged after its last whole epoch is logged again.

    Raises:
        ValueError: Lightning cannot do what the machine's options ask for.
    """
    callbacks: list[L.Callback] = [*others, writer]
    if config.validate_every > 1:
        callbacks.append(SparseValidation(config))
    if config.patience:
        callbacks.append(EarlyStopping("val_loss", patience=config.patience, check_finite=False))
    if console is not None:
        callbacks.append(EpochProgress(console, config.epochs))
    on_gpu = torch.cuda.is_available() and machine.accelerator in ("auto", "gpu", "cuda")
    try:
        with quiet():
            return L.Trainer(
                accelerator=machine.accelerator,
                devices=machine.devices,
                num_nodes=machine.num_nodes,
                strategy=machine.strategy,
                precision=machine.precision,  # type: ignore[arg-type]  # checked by Lightning
                sync_batchnorm=machine.sync_batchnorm,
                max_epochs=config.epochs,
                gradient_clip_val=config.gradient_clip or None,
                logger=TensorBoardLogger(
                    str(folder.path),
                    name=folder.tensorboard.name,
                    version="",
                    purge_step=_next_step(folder) if continued else None,
                ),
                callbacks=callbacks,
                plugins=[AtomicCheckpointIO()],
                default_root_dir=str(folder.path),
                # Bilinear resizing has no deterministic backward on CUDA; a CPU needs no help.
                deterministic="warn" if on_gpu else None,
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
                log_every_n_steps=1,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    except (MisconfigurationException, ValueError, TypeError) as error:
        wanted = f"accelerator={machine.accelerator!r}, devices={machine.devices!r}, "
        wanted += f"strategy={machine.strategy!r}, precision={machine.precision!r}"
        raise ValueError(f"{wanted} are not possible: {error}") from None


def _next_step(folder: RunFolder) -> int:
    """The first step that ``last.ckpt`` does not hold."""
    return int(AtomicCheckpointIO().load_checkpoint(folder.last)["global_step"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notes to developers from the user's terminal."""
    logger = logging.getLogger("lightning.pytorch")
    fabric = logging.getLogger("lightning.fabric")
    levels = logger.level, fabric.level
    logger.setLevel(logging.ERROR)
    fabric.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*log_every_n_steps.*")
            warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
            warnings.filterwarnings("ignore", module="lightning.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(levels[0])
        fabric.setLevel(levels[1])
