"""The picture transforms of the paper's protocol, from PIL pictures to normalised tensors.

Training follows the published recipe on torchvision (extra `[train]`); evaluation needs Pillow,
numpy and torch only, so that a deployed model does not carry torchvision along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .pictures import Image, to_rgb

if TYPE_CHECKING:
    from .train_config import TrainConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of the red, green and blue channel over ImageNet, pixels in [0, 1]."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of the three channels over ImageNet, pixels in [0, 1]."""

Transform = Callable[[Image.Image], torch.Tensor]
"""A picture in, a normalised float32 tensor (3, size, size) out."""

_RESIZE_PER_CROP = 256 / 224


@dataclass(frozen=True)
class EvalTransform:
    """Resizes to size x size (bilinear, antialiased), scales to [0, 1] and normalises.

    Attributes:
        size: side of the square result in pixels.
        mean: value taken from each channel, pixels in [0, 1].
        std: divisor of each channel.
    """

    size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check_arguments(self.size, self.mean, self.std)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """A picture of any mode and size -> float32 (3, size, size)."""
        resized = to_rgb(image).resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(torch.float32).div_(255)
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return pixels.sub_(mean).div_(std).contiguous()


def eval_transform(
    size: int = 224,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> EvalTransform:
    """The transform of evaluation and prediction; see `EvalTransform`.

    Raises:
        ValueError: size below 1, or normalisation that is not three finite numbers (std above 0).
    """
    return EvalTransform(size, _three("mean", mean), _three("std", std))


def train_transform(
    size: int = 224,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Transform:
    """The augmenting transform of the published training recipe.

    Resize to 256 x 256, random crop of 224 x 224, horizontal flip (p 0.5), rotation by up to 15
    degrees, colour jitter (brightness, contrast and saturation 0.2, hue 0.1), random affine
    (translation 0.1, scale 0.9 to 1.1), normalisation; at another `size` the resize keeps its
    proportion to the crop. Randomness comes from torch's global generator.

    Args:
        size: side of the square result in pixels.
        mean: value taken from each channel, pixels in [0, 1].
        std: divisor of each channel.

    Returns:
        A picklable `torchvision.transforms.v2.Compose`: picture -> float32 (3, size, size).

    Raises:
        ImportError: torchvision is not installed.
        ValueError: as `eval_transform`.
    """
    v2 = _torchvision_transforms()
    mean, std = _three("mean", mean), _three("std", std)
    _check_arguments(size, mean, std)
    resize = max(size, round(size * _RESIZE_PER_CROP))
    return v2.Compose(
        [
            v2.Resize((resize, resize)),
            v2.RandomCrop(size),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomRotation(15),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
            v2.RandomAffine(degrees=0, translate=(0.1, 0.1), scale=(0.9, 1.1)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )


def texture_transform(
    size: int = 224,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    crop_scale: float = 0.5,
    light: float = 0.3,
    quarter_turns: bool = True,
) -> Transform:
    """An augmenting transform for grey textures, which have no up, no colour and no one scale.

    A random crop of `crop_scale` to 1 of the area, 3:4 to 4:3 times as wide as the picture, resized
    to size x size, flips along both axes and a turn by a multiple of 90 degrees (no empty corners,
    no blurred lines), brightness and contrast times 1 - `light` to 1 + `light`, and with p 0.2 each
    a slight blur (sigma 0.1 to 1.5) and noise (standard deviation 0.03 of the white level); no hue
    or saturation, which grey does not have.

    Args:
        size: side of the square result in pixels.
        mean: value taken from each channel, pixels in [0, 1].
        std: divisor of each channel.
        crop_scale: least share of the area, above 0, at most 1.
        light: from 0 to below 1.
        quarter_turns: whether pictures are turned; flips are made in any case.

    Returns:
        A picklable `torchvision.transforms.v2.Compose`: picture -> float32 (3, size, size).

    Raises:
        ImportError: torchvision is not installed.
        ValueError: as `eval_transform`, or crop_scale or light out of range.
    """
    v2 = _torchvision_transforms()
    mean, std = _three("mean", mean), _three("std", std)
    _check_arguments(size, mean, std)
    if not 0 < crop_scale <= 1:
        raise ValueError(f"crop_scale={crop_scale!r} must be above 0, at most 1")
    if not 0 <= light < 1:
        raise ValueError(f"light={light!r} must be at least 0, below 1")
    angles = (90, 180, 270) if quarter_turns else ()
    turns = [v2.RandomRotation((angle, angle)) for angle in angles]
    return v2.Compose(
        [
            v2.ToImage(),
            _Crop(size, crop_scale),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomVerticalFlip(0.5),
            v2.RandomChoice([v2.Identity(), *turns]),
            v2.ColorJitter(brightness=light, contrast=light),
            v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.5))], 0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.GaussianNoise(sigma=0.03)], 0.2),
            v2.Normalize(list(mean), list(std)),
            v2.ToPureTensor(),
        ]
    )


class _Crop:
    """A random crop of at least `scale` of the area, 3:4 to 4:3 times as wide as the picture is.

    torchvision's own takes 3:4 to 4:3 as such: of a long picture only the middle, ever.
    """

    def __init__(self, size: int, scale: float) -> None:
        self.size, self.scale = size, scale

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        v2 = _torchvision_transforms()
        height, width = image.shape[-2:]
        ratio = (3 / 4 * width / height, 4 / 3 * width / height)
        crop = v2.RandomResizedCrop(self.size, (self.scale, 1.0), ratio, antialias=True)
        cropped: torch.Tensor = crop(image)
        return cropped

    def __repr__(self) -> str:
        return f"Crop(size={self.size}, scale=({self.scale}, 1.0))"


def training_transform(config: TrainConfig, size: int) -> Transform:
    """What the options of a run do to its training pictures, resized to size x size."""
    if config.augmentation == "none":
        return eval_transform(size)
    if config.augmentation == "texture":
        options = {name: getattr(config, name) for name in ("crop_scale", "light", "quarter_turns")}
        return texture_transform(size, **options)
    return train_transform(size)


def _torchvision_transforms() -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError(
            'the training transforms need torchvision: pip install "mobilesteelnet[train]"'
        ) from error
    return v2


def _three(argument: str, values: Sequence[float]) -> tuple[float, float, float]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3:
        raise ValueError(f"{argument}={values!r} must hold three numbers, one a colour channel")
    return numbers


def _check_arguments(size: int, mean: Sequence[float], std: Sequence[float]) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size={size!r} must be a whole number of pixels, at least 1")
    if not all(math.isfinite(value) for value in mean):
        raise ValueError(f"mean={mean!r} must hold finite numbers")
    if not all(math.isfinite(value) and value > 0 for value in std):
        raise ValueError(f"std={std!r} must hold finite numbers above 0")
