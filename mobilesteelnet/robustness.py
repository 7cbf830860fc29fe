"""How much worse a network gets on pictures that were taken under other conditions.

Each picture is changed before it is resized: brightness, contrast, blur, noise, JPEG compression.
The same call changes it in the same way, whatever the order of the pictures.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .checkpoint import Checkpoint
from .data import PictureSet
from .evaluate import evaluate
from .predict import Progress

if TYPE_CHECKING:
    from PIL.Image import Image

LEVELS: dict[str, tuple[str, tuple[float, ...]]] = {
    "brightness": ("factor", (0.5, 0.75, 1.25, 1.5)),
    "contrast": ("factor", (0.5, 0.75, 1.25, 1.5)),
    "blur": ("Gaussian, radius in pixels", (0.5, 1.0, 2.0)),
    "noise": ("standard deviation in grey levels", (5.0, 10.0, 20.0)),
    "jpeg": ("quality", (50.0, 25.0, 10.0)),
}


@dataclass(frozen=True)
class Robustness:
    """The figures under one change.

    Attributes:
        change: ``none``, or a key of :data:`LEVELS`.
        level: How strong; 0 for ``none``.
        average_accuracy: Mean of the classes' accuracies.
        calibration_error: Expected calibration error.
    """

    change: str
    level: float
    average_accuracy: float
    calibration_error: float


def change_picture(picture: Image, name: str, *, change: str, level: float) -> Image:
    """The picture as it would look under one of the conditions of :data:`LEVELS`.

    Args:
        picture: Mode RGB.
        name: Seeds the noise.
        change: A key of :data:`LEVELS`.
        level: How strong, in the unit given there.

    Raises:
        ValueError: ``change`` is unknown.
    """
    from PIL import Image as images
    from PIL import ImageEnhance, ImageFilter

    if change == "brightness":
        return ImageEnhance.Brightness(picture).enhance(level)
    if change == "contrast":
        return ImageEnhance.Contrast(picture).enhance(level)
    if change == "blur":
        return picture.filter(ImageFilter.GaussianBlur(level))
    if change == "noise":
        draw = np.random.default_rng(zlib.crc32(name.encode("utf-8", "surrogateescape")))
        # One value for all three channels: the cameras that look at steel are grey.
        noise = draw.normal(0.0, level, (picture.height, picture.width, 1))
        noisy = (np.asarray(picture, dtype=np.float64) + noise).round().clip(0, 255)
        return images.fromarray(noisy.astype(np.uint8))
    if change == "jpeg":
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(level))
        return images.open(buffer).convert("RGB")
    raise ValueError(f"change={change!r}: must be one of {', '.join(LEVELS)}")


def measure_robustness(
    checkpoint: Checkpoint,
    pictures: PictureSet,
    indexes: Sequence[int],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Robustness]:
    """Evaluate a network on the pictures as they are, and under every change and level.

    Args:
        checkpoint: The network.
        pictures: The labelled set.
        indexes: Which pictures to take.
        batch_size: Pictures a forward.
        progress: Called with (done, total).

    Raises:
        DataError, CheckpointError: As :func:`mobilesteelnet.evaluate.evaluate`.
    """
    cases = [("none", 0.0), *((name, x) for name, (_, xs) in LEVELS.items() for x in xs)]
    rows = []
    for place, (name, level) in enumerate(cases):
        change = None
        if name != "none":
            change = partial(change_picture, change=name, level=level)
        result = evaluate(checkpoint, pictures, indexes, batch_size=batch_size, change=change)
        assert result.calibration is not None
        error = result.calibration.expected_error
        rows.append(Robustness(name, level, result.average_accuracy, error))
        if progress is not None:
            progress(place + 1, len(cases))
    return rows
