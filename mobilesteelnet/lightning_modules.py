"""The Lightning side of the training: what a step is, and which picture comes when.

All randomness is a function of (seed, epoch, place of the picture in the split), never of a
generator's history. So a run that was killed and resumed, or uses another number of reading
processes, sees the same pictures with the same augmentation in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler

from .calibration import fit_temperature
from .train_config import TrainConfig

try:
    import lightning as L
    from torchmetrics import MeanMetric
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'training needs {error.name}: pip install "mobilesteelnet[train]"', name=error.name
    ) from None

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

Key = tuple[int, int, bool]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class TrainingError(RuntimeError):
    """A training that could not go on; the run folder keeps the last good state."""


class NotFiniteError(TrainingError):
    """A training whose loss is not finite any more: its options are at fault, not the machine."""


def mix_seed(*parts: int) -> int:
    """One 64-bit seed from several whole numbers; near inputs give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


class SeededDataset(Dataset[tuple[torch.Tensor, int, bool]]):
    """Gives each picture its own random numbers, drawn from (seed, epoch, index).

    Args:
        dataset: Items ``(image, label)``; its transforms draw from torch's global generator.
        seed: The run's seed.
        small: The same pictures, smaller: what the first ``small_epochs`` epochs see.
        small_epochs: How many those are.
    """

    def __init__(
        self,
        dataset: Dataset[tuple[torch.Tensor, int]],
        seed: int,
        *,
        small: Dataset[tuple[torch.Tensor, int]] | None = None,
        small_epochs: int = 0,
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.small = dataset if small is None else small
        self.small_epochs = small_epochs

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # a map-style dataset has a length

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int, bool]:
        epoch, index, counted = key
        dataset = self.small if epoch < self.small_epochs else self.dataset
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            image, label = dataset[index]
        return image, label, counted


class EpochSampler(Sampler[Key]):
    """Keys ``(epoch, index, counted)`` of one process's share of an epoch.

    All processes get equally many; where the pictures do not come out even, the first ones are
    taken again with ``counted`` False, so that validation figures count each picture once.

    Args:
        length: Number of pictures.
        seed: The run's seed.
        shuffle: A new order each epoch.
        rank: This process's number.
        world_size: Number of processes.
    """

    def __init__(
        self, length: int, *, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.length // self.world_size)

    def __iter__(self) -> Iterator[Key]:
        order = list(range(self.length))
        if self.shuffle:
            random.Random(mix_seed(self.seed, self.epoch)).shuffle(order)
        for place in range(self.rank, len(self) * self.world_size, self.world_size):
            yield self.epoch, order[place % self.length], place < self.length


class PictureDataModule(L.LightningDataModule):
    """Training and validation pictures as Lightning wants them.

    Args:
        train: Items ``(image, label)`` with augmentation.
        val: Items ``(image, label)`` without.
        batch_size: Pictures a batch and process.
        seed: The run's seed.
        workers: Reading processes; None takes 0 on a CPU and 4 on a GPU.
        small, small_epochs: See :class:`SeededDataset`.
        first_epoch: The one that is trained first, from 0: above it, of a run that is continued.
    """

    def __init__(
        self,
        train: Dataset[tuple[torch.Tensor, int]],
        val: Dataset[tuple[torch.Tensor, int]],
        *,
        batch_size: int,
        seed: int,
        workers: int | None = None,
        small: Dataset[tuple[torch.Tensor, int]] | None = None,
        small_epochs: int = 0,
        first_epoch: int = 0,
    ) -> None:
        super().__init__()
        self.first_epoch = first_epoch
        self.train = SeededDataset(train, seed, small=small, small_epochs=small_epochs)
        self.val = SeededDataset(val, seed)
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers

    def _loader(self, dataset: SeededDataset, shuffle: bool) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None
        on_gpu = trainer.strategy.root_device.type == "cuda"
        workers = self.workers if self.workers is not None else (4 if on_gpu else 0)
        sampler = EpochSampler(
            len(dataset),
            seed=self.seed,
            shuffle=shuffle,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        # Reading processes ask for their first pictures before Lightning tells the epoch.
        sampler.set_epoch(self.first_epoch)
        keyed: Dataset[Any] = dataset
        return DataLoader(
            keyed,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=on_gpu,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches ``(images (B,3,H,W), labels (B,), counted (B,))`` in the epoch's random order."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The same in the split's order."""
        return self._loader(self.val, shuffle=False)


class Classifier(L.LightningModule):
    """One step of training or validation of a picture classifier.

    Logs ``train_loss``, ``train_accuracy``, ``val_loss``, ``val_accuracy`` (fractions of 1) and
    ``learning_rate`` once an epoch, and ``train_loss_step``. ``temperature`` is that of the last
    validation (see :func:`mobilesteelnet.calibration.fit_temperature`).

    Args:
        model: images (B,3,H,W) → logits (B,num_classes).
        config: The run's options.
        compile: Run the network through ``torch.compile``.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, *, compile: bool = False) -> None:
        super().__init__()
        self.model = model
        self.config = config
        # Outside the module tree, so that the keys of the state stay those of the plain network.
        forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model) if compile else model
        object.__setattr__(self, "_forward", forward)
        object.__setattr__(self, "_kept", None)
        # Not "disable", with which torchmetrics passes over weights.
        self.train_loss = MeanMetric(nan_strategy="error")
        self.train_accuracy = MeanMetric(nan_strategy="error")
        self.val_loss = MeanMetric(nan_strategy="error")
        self.val_accuracy = MeanMetric(nan_strategy="error")
        self.temperature = 1.0
        self._validated: list[Batch] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B,num_classes) of images (B,3,H,W)."""
        run: Callable[[torch.Tensor], torch.Tensor] = self.__dict__["_forward"]
        return run(images)

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and saved: the one in training, if no other was given."""
        other: nn.Module | None = self.__dict__["_kept"]
        return self.model if other is None else other

    def keep(self, network: nn.Module) -> None:
        """Validate and save ``network``; it is no part of this module's state."""
        object.__setattr__(self, "_kept", network)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the global generators anew, for what draws from them (dropout, mixing).

        Each batch, not each epoch: a data loader draws too when it starts, and a resumed run starts
        its loaders at another time.
        """
        seed = mix_seed(self.config.seed, self.current_epoch, batch_idx, self.global_rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def training_step(self, batch: Batch, batch_index: int) -> torch.Tensor:
        """Cross-entropy of one batch.

        Raises:
            TrainingError: The loss is not finite on any of the processes.
        """
        images, labels, _ = batch
        targets = labels
        if self.config.mix != "none":
            images, targets = self._mix(images, labels)
        logits = self(images)
        loss = functional.cross_entropy(
            logits.float(), targets, label_smoothing=self.config.label_smoothing
        )
        self._require_finite(loss, f"step {batch_index + 1} (global step {self.global_step + 1})")
        self.train_loss.update(loss.detach(), len(labels))
        self.train_accuracy.update((logits.argmax(1) == labels).float())
        self.log("train_loss_step", loss.detach(), on_step=True, on_epoch=False)
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        self.log("learning_rate", self._learning_rate(), on_step=False, on_epoch=True)
        return loss

    def _mix(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each picture blended with another of the batch; labels become shares (B, classes)."""
        from torchvision.transforms import v2

        kinds = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
        classes: int = self.model.config["num_classes"]  # type: ignore[index,assignment]
        mix = kinds[self.config.mix](alpha=self.config.mix_alpha, num_classes=classes)
        blended, shares = mix(images, labels)
        return blended, shares

    def on_validation_start(self) -> None:
        """Validate one network on all processes: each has buffers of its own since its last step.

        They are those of the first one, whose network is saved.
        """
        if self.trainer.world_size > 1:
            for buffer in self.kept.buffers():
                torch.distributed.broadcast(buffer, 0)

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation's logits."""
        self._validated = []

    def on_validation_epoch_end(self) -> None:
        """Fit the temperature of the network that was validated, on all processes' pictures."""
        logits, labels, counted = (torch.cat(parts) for parts in zip(*self._validated, strict=True))
        gathered: Any = self.all_gather((logits, labels, counted))
        # Of several processes each tensor has a dimension in front.
        all_labels, all_counted = gathered[1].flatten(), gathered[2].flatten()
        all_logits = gathered[0].reshape(-1, logits.shape[1])
        self.temperature = fit_temperature(all_logits[all_counted], all_labels[all_counted])
        self._validated = []

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Loss and accuracy of one batch; a picture taken twice to fill up counts once."""
        images, labels, counted = batch
        other: nn.Module | None = self.__dict__["_kept"]
        logits = (self(images) if other is None else other(images)).float()
        weight = counted.float()
        losses = functional.cross_entropy(logits, labels, reduction="none")
        self._require_finite(losses, f"validation batch {batch_index + 1}")
        self._validated.append((logits, labels, counted))
        self.val_loss.update(losses, weight)
        self.val_accuracy.update((logits.argmax(1) == labels).float(), weight)
        self.log("val_loss", self.val_loss, on_epoch=True)
        self.log("val_accuracy", self.val_accuracy, on_epoch=True)

    def _require_finite(self, loss: torch.Tensor, where: str) -> None:
        finite = bool(torch.isfinite(loss).all())
        # All processes stop together; one alone would leave the others waiting for its gradients.
        if not self.trainer.strategy.reduce_boolean_decision(finite, all=True):
            raise NotFiniteError(
                f"the loss is not finite at epoch {self.current_epoch + 1}, {where}: "
                "lower the learning rate, lengthen the warm-up or set a gradient clip"
            )

    def _learning_rate(self) -> float:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, Sequence)
        return float(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and its learning rate as a function of the step."""
        config = self.config
        options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        if config.optimizer == "sgd":
            options["momentum"] = config.momentum
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        optimizer = kinds[config.optimizer](self.model.parameters(), **options)
        steps_per_epoch = max(int(self.trainer.estimated_stepping_batches) // config.epochs, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: config.learning_rate_factor(step, steps_per_epoch)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
