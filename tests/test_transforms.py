"""The transforms of the paper's protocol."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image

from mobilesteelnet.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalTransform,
    eval_transform,
    texture_transform,
    train_transform,
)


def noise(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(5)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("height", "width"), [(200, 200), (480, 640), (37, 11), (1, 1)])
@pytest.mark.parametrize("size", [224, 64])
def test_eval_transform_is_that_of_torchvision(height, width, size):
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed")
    image = noise(height, width)
    expected = v2.Compose(
        [
            v2.Resize((size, size)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)),
        ]
    )(image)
    result = eval_transform(size)(image)
    assert result.is_contiguous()
    torch.testing.assert_close(result, expected.as_subclass(torch.Tensor), rtol=0, atol=1e-5)


def test_eval_transform_normalises_by_its_arguments():
    grey = Image.new("L", (9, 5), 51)
    result = eval_transform(4, mean=[0.1, 0.2, 0.3], std=[0.5, 1, 2])(grey)
    expected = torch.tensor([0.2, 0.0, -0.05]).view(3, 1, 1).expand(3, 4, 4)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_eval_transform_needs_no_torchvision():
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from PIL import Image\n"
        "from mobilesteelnet.transforms import eval_transform, train_transform\n"
        "assert eval_transform(8)(Image.new('RGB', (4, 4))).shape == (3, 8, 8)\n"
        "try:\n    train_transform(8)\n"
        "except ImportError as error:\n    print(error)\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'pip install "mobilesteelnet[train]"' in done.stdout


def test_train_transform_augments_and_repeats_by_the_seed():
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    transform, image = train_transform(64), noise(90, 70)
    torch.manual_seed(1)
    first, second = transform(image), transform(image)
    torch.manual_seed(1)
    assert torch.equal(transform(image), first)
    assert not torch.equal(first, second)
    assert (first.shape, first.dtype) == ((3, 64, 64), torch.float32)


def test_train_transform_is_the_published_recipe():
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed")
    steps = train_transform(112).transforms
    resize, crop, flip, rotation, jitter, affine = steps[:6]
    assert list(resize.size) == [128, 128]
    assert tuple(crop.size) == (112, 112)
    assert flip.p == 0.5
    assert list(rotation.degrees) == [-15, 15]
    assert (jitter.brightness, jitter.hue) == ((0.8, 1.2), (-0.1, 0.1))
    assert (jitter.contrast, jitter.saturation) == ((0.8, 1.2), (0.8, 1.2))
    assert (list(affine.degrees), tuple(affine.translate), tuple(affine.scale)) == (
        [0, 0],
        (0.1, 0.1),
        (0.9, 1.1),
    )
    assert isinstance(steps[-1], v2.Normalize)
    assert list(train_transform(224).transforms[0].size) == [256, 256]
    assert train_transform(1)(noise(3, 3)).shape == (3, 1, 1)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 320), (320, 40)])
def test_texture_shows_all_of_a_long_picture(height, width):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    ramp = np.linspace(0, 255, max(height, width))
    rows = np.tile(ramp, (height, 1)) if width >= height else np.tile(ramp[:, None], (1, width))
    image = Image.fromarray(rows.astype(np.uint8)).convert("RGB")
    plain = {"light": 0.0, "quarter_turns": False, "mean": (0, 0, 0), "std": (1, 1, 1)}
    crop = texture_transform(32, crop_scale=0.8, **plain)
    torch.manual_seed(0)
    seen = [crop(image).clamp(0, 1) for _ in range(60)]
    assert min(float(one.min()) for one in seen) < 0.04
    assert max(float(one.max()) for one in seen) > 0.96
    spans = [float(one[0].amax() - one[0].amin()) for one in seen]
    assert min(spans) > 0.5  # 0.8 of the area at 4:3 is three quarters of a side


def test_transforms_are_picklable_and_readable():
    evaluation = eval_transform(96, mean=(0.4, 0.4, 0.4))
    assert pickle.loads(pickle.dumps(evaluation)) == evaluation
    assert repr(evaluation).startswith("EvalTransform(size=96, mean=(0.4, 0.4, 0.4), std=(0.229,")
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    training = pickle.loads(pickle.dumps(train_transform(96)))
    assert training(noise(20, 20)).shape == (3, 96, 96)
    assert "RandomCrop(size=(96, 96)" in repr(training)


@pytest.mark.parametrize("make", [eval_transform, train_transform])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 2.5}, r"size=2\.5"),
        ({"size": True}, "size=True"),
        ({"mean": (0.1, 0.2)}, "mean="),
        ({"mean": (0.1, 0.2, float("inf"))}, "mean="),
        ({"std": (1, 1, 0)}, "std="),
    ],
)
def test_senseless_arguments_are_named(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_class_and_function_agree():
    assert eval_transform() == EvalTransform()
