"""The synthetic textures: repeatable, whole, different, and told apart by a little learning."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image

from mobilesteelnet.data import scan
from mobilesteelnet.synthetic import CLASSES, draw, make_synthetic


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", [32, 75, 200])
def test_a_picture_is_made_again_exactly(name, size):
    first = draw(name, 3, size, seed=1)
    assert (first.shape, first.dtype) == ((size, size), np.uint8)
    assert np.array_equal(first, draw(name, 3, size, seed=1))
    assert not np.array_equal(first, draw(name, 4, size, seed=1))
    assert not np.array_equal(first, draw(name, 3, size, seed=2))
    assert first.std() > 1


@pytest.mark.parametrize("name", CLASSES)
def test_pictures_vary_and_are_not_burnt_out(name):
    pictures = np.stack([draw(name, n, 100) for n in range(1, 13)])
    means = pictures.mean(axis=(1, 2))
    assert means.std() > 8
    assert means.min() > 25
    assert means.max() < 245


def test_folder_is_read_as_six_named_classes(tmp_path):
    calls = []
    path = make_synthetic(
        tmp_path / "demo", per_class=3, size=48, progress=lambda *done: calls.append(done)
    )
    assert path == tmp_path / "demo"
    assert calls == [(n, 18) for n in range(1, 19)]
    pictures = scan(path, on_bad_file="fatal")
    assert pictures.classes == sorted(CLASSES)
    assert all("synthetic" in p.name.split("/")[1] for p in pictures.items)
    assert [pictures.labels.count(label) for label in range(6)] == [3] * 6
    assert pictures.duplicate_groups() == []
    stored = np.asarray(Image.open(path / CLASSES[2] / f"{CLASSES[2]}_2.png"))
    assert np.array_equal(stored, draw(CLASSES[2], 2, 48))
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"mine' exists already; nothing was written"):
        make_synthetic(tmp_path / "mine", per_class=1, size=32)
    with pytest.raises(ValueError, match=r"note.txt' exists already"):
        make_synthetic(tmp_path / "mine" / "note.txt", per_class=1, size=32)
    assert (tmp_path / "mine" / "note.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert len(scan(make_synthetic(tmp_path / "empty", per_class=1, size=32))) == 6


def test_an_interrupted_run_leaves_no_folder_and_can_be_repeated(tmp_path):
    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_synthetic(tmp_path / "demo", per_class=2, size=32, progress=stop)
    assert not (tmp_path / "demo").exists()
    assert len(scan(make_synthetic(tmp_path / "demo", per_class=2, size=32))) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_class": 0}, "per_class=0"),
        ({"size": 31}, "size=31"),
        ({"size": 64.0}, r"size=64\.0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_senseless_arguments_are_named_and_write_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_synthetic(tmp_path / "demo", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_senseless_class_or_number_is_named():
    with pytest.raises(ValueError, match="name='crazing'"):
        draw("crazing", 1)
    with pytest.raises(ValueError, match="number=0"):
        draw(CLASSES[0], 0)


def features(image: np.ndarray) -> np.ndarray:
    """Energy of bands and directions, and tails of the grey levels: nothing learnt in them."""
    level = image.astype(np.float64)
    level = (level - level.mean()) / 40
    power = np.abs(np.fft.fft2(level)) ** 2
    fy, fx = np.meshgrid(*[np.fft.fftfreq(n) for n in level.shape], indexing="ij")
    radius, angle = np.hypot(fy, fx), np.arctan2(np.abs(fy), np.abs(fx))
    edges = [0.01, 0.03, 0.06, 0.12, 0.2, 0.35, 0.72]
    bands = [
        power[(radius >= low) & (radius < high) & (angle >= a) & (angle < a + np.pi / 6)].mean()
        for low, high in pairwise(edges)
        for a in (0, np.pi / 6, np.pi / 3)
    ]
    return np.concatenate([np.log(bands), np.quantile(level, [0.002, 0.02, 0.1, 0.9, 0.98, 0.998])])


def test_classes_can_be_learnt_but_not_trivially():
    x = np.array([[features(draw(c, n, 100)) for n in range(1, 61)] for c in CLASSES])
    mean, deviation = x.reshape(-1, x.shape[-1]).mean(0), x.reshape(-1, x.shape[-1]).std(0)
    x = np.concatenate([(x - mean) / deviation, np.ones((*x.shape[:2], 1))], axis=2)
    train, test = x[:, :40], x[:, 40:]
    flat, truth = train.reshape(-1, train.shape[-1]), np.repeat(np.eye(6), 40, axis=0)
    weights = np.linalg.solve(flat.T @ flat + np.eye(flat.shape[1]), flat.T @ truth)
    guess = (test.reshape(-1, test.shape[-1]) @ weights).argmax(1)
    accuracy = (guess == np.repeat(np.arange(6), 20)).mean()
    assert 0.6 < accuracy < 1.0
