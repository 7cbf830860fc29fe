"""What happens around the steps of a training: keeping its results, and showing how far it is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .checkpoint import save_checkpoint
from .lightning_modules import Classifier, TrainingError
from .published import why_torch_refuses
from .run_folder import RunFolder, write_atomically
from .train_config import TrainConfig

FIGURES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate")


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint files: never half written, never unpickling code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write the state through :func:`write_atomically`.

        Raises:
            OSError: The file cannot be written, for example because the disk is full.
        """

        def write(part: Path) -> None:
            try:
                # A file of Python's: torch's own does not say why it could not be written.
                with part.open("wb") as handle:
                    torch.save(checkpoint, handle)
            except RuntimeError as error:
                raise _behind(error, path) from error

        write_atomically(path, write)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read the state; ``weights_only`` is always on.

        Raises:
            TrainingError: The file is damaged.
        """
        try:
            state = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            why = why_torch_refuses(error)
            raise TrainingError(f"{str(path)!r} is no training state: {why}") from None
        if not isinstance(state, dict) or "pytorch-lightning_version" not in state:
            raise TrainingError(f"{str(path)!r} is no training state")
        return state

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the file."""
        Path(path).unlink(missing_ok=True)


def _behind(error: RuntimeError, path: str | os.PathLike[str]) -> OSError:
    """The OSError after which torch's zip writer went on and failed with another error."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if cause is None:
        return OSError(f"writing {str(path)!r} failed: {error}")
    return OSError(cause.errno, cause.strerror, str(path))


class SparseValidation(L.Callback):
    """Lets only those epochs validate that the options name.

    Args:
        config: The run's options.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell Lightning about this epoch: its own rule would leave out a last one."""
        due = self.config.validates(trainer.current_epoch + 1)
        trainer.check_val_every_n_epoch = 1 if due else self.config.epochs + 1


def _figures(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """The figures of the epoch that ends; None for those of a validation that was not due."""
    assert isinstance(module, Classifier)
    validated = module.config.validates(trainer.current_epoch + 1)
    return {
        key: float(trainer.callback_metrics[key])
        if validated or not key.startswith("val_")
        else None
        for key in FIGURES
    }


class RunWriter(Checkpoint):
    """Writes ``best.safetensors``, the history and ``last.ckpt`` at the end of each epoch.

    ``last.ckpt`` comes after them and holds the history too: a kill between two of the files costs
    nothing, the resumed run writes the same files again. ``run.json`` then counts the epoch.

    Args:
        folder: The run's folder.
        select: ``val_loss``, ``val_accuracy`` or ``last``.
        card: Keyword arguments of ``save_checkpoint`` (classes, input_size, normalisation,
            training).
    """

    def __init__(self, folder: RunFolder, select: str, card: dict[str, Any]) -> None:
        self.folder = folder
        self.select = select
        self.card = card
        self.rows: list[dict[str, Any]] = []
        self.done = 0  # epochs in last.ckpt: one less than rows while the files are written
        self.best_epoch = 0
        self.best_value: float | None = None
        self.stopped = False
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Plain types only: the state has to load without unpickling code."""
        return {
            "rows": [dict(row) for row in self.rows],
            "best_epoch": self.best_epoch,
            "best_value": self.best_value,
            "stopped": self.stopped,
            "seen": self.card["training"].get("seen"),  # what it started from may be gone
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of the run that was interrupted."""
        self.rows = list(state_dict["rows"])
        self.done = len(self.rows)
        self.best_epoch = state_dict["best_epoch"]
        self.best_value = state_dict["best_value"]
        self.stopped = state_dict["stopped"]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the epoch's clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the epoch's row and write all files."""
        row: dict[str, Any] = {"epoch": trainer.current_epoch + 1, **_figures(trainer, pl_module)}
        row["seconds"] = round(time.perf_counter() - self._started, 3)
        self.rows.append(row)
        self.stopped = bool(trainer.should_stop)
        improved = self._improved(row)
        if trainer.is_global_zero:
            if improved:
                self._save_best(pl_module, row)
            self.folder.write_rows(self.rows)
        trainer.save_checkpoint(self.folder.last)
        self.done = len(self.rows)
        if trainer.is_global_zero:
            self.write_state("running")

    def _improved(self, row: dict[str, Any]) -> bool:
        if row["val_loss"] is None:  # what is kept is made when it is validated
            return False
        value = float(row["epoch"]) if self.select == "last" else float(row[self.select])
        lower_is_better = self.select == "val_loss"
        best = self.best_value
        if best is None or (value < best if lower_is_better else value > best):
            self.best_value = value
            self.best_epoch = int(row["epoch"])
            return True
        return False

    def _save_best(self, module: L.LightningModule, row: dict[str, Any]) -> None:
        assert isinstance(module, Classifier)
        network = module.kept
        # Without the seconds: the same run has to give the same file.
        figures = {key: value for key, value in row.items() if key != "seconds"}
        training = {**self.card["training"], **figures, "selected_by": self.select}
        card = {**self.card, "training": training, "temperature": module.temperature}
        save_checkpoint(self.folder.best, network, **card)

    def write_state(self, state: str, reason: str = "") -> None:
        """Write ``run.json``."""
        self.folder.write_state(state, reason, self.done, self.best_epoch)


class EpochProgress(L.Callback):
    """One bar over the epochs with the latest figures; without a terminal, a line an epoch.

    Args:
        console: Where to write (standard error).
        epochs: The most epochs that the run may take.
    """

    def __init__(self, console: Console, epochs: int) -> None:
        self.console = console
        self.epochs = epochs
        self._bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        if not (trainer.is_global_zero and self.console.is_terminal):
            return
        self._bar = Progress(
            TextColumn("[bold]{task.fields[place]}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._bar.add_task(
            "starting",
            total=self.epochs * max(int(trainer.num_training_batches), 1),
            place=self._place(trainer, 0),
        )
        self._bar.start()

    @staticmethod
    def _place(trainer: L.Trainer, batch: int) -> str:
        return (
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} "
            f"batch {batch}/{trainer.num_training_batches}"
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            done = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx + 1
            self._bar.update(
                self._bar.task_ids[0], completed=done, place=self._place(trainer, batch_idx + 1)
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the epoch's figures."""
        if not trainer.is_global_zero:
            return
        figures = _figures(trainer, pl_module)
        text = f"train loss {figures['train_loss']:.4f} accuracy {figures['train_accuracy']:.1%}"
        if figures["val_loss"] is not None:
            text += (
                f", validation loss {figures['val_loss']:.4f} "
                f"accuracy {figures['val_accuracy']:.1%}"
            )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=text)
        else:
            self.console.print(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {text}",
                highlight=False,
                soft_wrap=True,
            )

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar as it is."""
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._stop()
