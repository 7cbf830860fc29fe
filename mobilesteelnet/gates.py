"""Where a network looks: the spatial gate of CIEMA on a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .checkpoint import Checkpoint
from .data import eval_transform

if TYPE_CHECKING:
    from PIL.Image import Image


def mean_gate(checkpoint: Checkpoint, picture: Image) -> np.ndarray | None:
    """The gate w (h, w), 0 to 1, averaged over its groups; None for a network without CIEMA."""
    transform = eval_transform(checkpoint.input_size, **checkpoint.normalisation)
    device = next(checkpoint.model.parameters()).device
    with torch.inference_mode():
        gate = checkpoint.model.spatial_gate(transform(picture)[None].to(device))  # type: ignore[operator]
    if gate is None:
        return None
    found: np.ndarray = gate[0].float().mean(dim=0).cpu().numpy()
    return found
