"""The network that is validated and kept, where it is not simply that of the last step.

Averages of weights (`averaging="ema"` or `"swa"`) and recalibrated batch norms, by torch's
`swa_utils`. A training on few pictures has few steps an epoch, so that the buffers of batch norms,
moving averages themselves, lag behind the weights: recalibrated, they belong to them.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)
from torch.utils.data import DataLoader, Dataset

from .lightning_modules import Classifier
from .train_config import TrainConfig


class KeptNetwork(L.Callback):
    """Gives the classifier the network to validate and to keep; training goes on beside it.

    Every process computes it from the same pictures; the classifier evens out its buffers.

    Args:
        config: The run's options; ``averaging`` or ``recalibrate_bn`` is on.
        pictures: Items ``(image, label)``, the training pictures without augmentation.
    """

    def __init__(self, config: TrainConfig, pictures: Dataset[tuple[torch.Tensor, int]]) -> None:
        self.config = config
        self.loader = DataLoader(pictures, batch_size=config.batch_size)
        self._network: AveragedModel | None = None
        self._saved: dict[str, Any] | None = None

    @staticmethod
    def is_needed(config: TrainConfig) -> bool:
        """Whether a run keeps another network than that of its last step."""
        return config.averaging != "none" or config.recalibrate_bn

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the network, or take the interrupted run's average."""
        assert isinstance(pl_module, Classifier)
        ema = self.config.averaging == "ema"
        average = get_ema_multi_avg_fn(self.config.average_decay) if ema else get_swa_multi_avg_fn()
        # Buffers of an average of few steps are averaged with it; swa recalibrates them anyway.
        self._network = AveragedModel(pl_module.model, multi_avg_fn=average, use_buffers=ema)
        self._network.requires_grad_(False)
        if self._saved is not None:
            self._network.load_state_dict(self._saved)
            self._saved = None
        pl_module.keep(self._network.module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move the average: the exponential one each step, the other at the end of an epoch."""
        epoch_ends = batch_idx + 1 == trainer.num_training_batches
        swa = self._averages_epochs(trainer) and epoch_ends
        if swa or self.config.averaging == "ema":
            assert self._network is not None
            assert isinstance(pl_module, Classifier)
            self._network.update_parameters(pl_module.model)

    def _averages_epochs(self, trainer: L.Trainer) -> bool:
        begun = trainer.current_epoch >= self.config.epochs_before_swa
        return self.config.averaging == "swa" and begun

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the network that this epoch validates."""
        assert self._network is not None
        assert isinstance(pl_module, Classifier)
        swa = self._averages_epochs(trainer)
        if not swa and self.config.averaging != "ema":
            self._network.module.load_state_dict(pl_module.model.state_dict())
        if swa or self.config.recalibrate_bn:
            dtype = next(self._network.module.parameters()).dtype
            # Of a network that is whole in another precision; one in the loader's has no copies.
            images = (batch[0].to(pl_module.device, dtype) for batch in self.loader)
            update_bn(images, self._network.module)
        self._network.eval()

    def state_dict(self) -> dict[str, Any]:
        """The average, for ``last.ckpt``; without one it is made anew each epoch."""
        if self._network is None or self.config.averaging == "none":
            return {}
        return {"network": self._network.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Wait with the average of the interrupted run until there is a network."""
        self._saved = state_dict.get("network")
