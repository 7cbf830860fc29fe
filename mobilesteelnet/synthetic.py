"""Procedural steel-like textures for demonstrations and tests; no picture of real steel is in them.

Each class imitates what the eye sees in one class of NEU-DET: a rolled surface with grain, uneven
light and sensor noise, and one kind of defect that may be weak. They show that the software works,
not how well it would do on a real strip.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

CLASSES = (
    "synthetic_crazing",
    "synthetic_inclusion",
    "synthetic_patches",
    "synthetic_pitted_surface",
    "synthetic_rolled-in_scale",
    "synthetic_scratches",
)
"""The class directories that `make_synthetic` writes."""

_REFERENCE_SIZE = 200
_SMALLEST, _LARGEST = 32, 8192


class _Canvas:
    """A grey picture under work: float64 levels (0 to 255), a generator, and lengths in pixels.

    Lengths are given for a picture of 200 x 200 and scale with the size. The rolling direction is
    the vertical axis; `finish` turns some pictures by 90 degrees.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size = size
        self.rng = rng
        self.unit = size / _REFERENCE_SIZE
        self.level = np.zeros((size, size))
        self.rows, self.columns = np.mgrid[0:size, 0:size].astype(np.float64) / self.unit
        frequency = np.fft.rfftfreq(size)[None, :], np.fft.fftfreq(size)[:, None]
        self._fx2, self._fy2 = frequency[0] ** 2, frequency[1] ** 2
        self.strength = rng.uniform(0.45, 1.0)

    def noise(self, across: float, along: float) -> np.ndarray:
        """Gaussian noise of unit deviation, blurred by two deviations (both in pixels)."""
        white = np.fft.rfft2(self.rng.standard_normal((self.size, self.size)))
        spread = across**2 * self._fx2 + along**2 * self._fy2
        blurred = np.fft.irfft2(
            white * np.exp(-2 * np.pi**2 * self.unit**2 * spread), s=(self.size, self.size)
        )
        blurred -= blurred.mean()
        return blurred / blurred.std()

    def surface(self, brightness: float, grain: float, speckle: float, light: float) -> None:
        """Rolled steel: mean level, and deviations of grain along the roll, speckle and light."""
        self.level += brightness
        self.level += grain * (0.7 * self.noise(1.2, 14) + 0.5 * self.noise(5, 70))
        self.level += speckle * (0.75 * self.noise(0.6, 0.9) + 0.5 * self.noise(1.3, 1.8))
        self.level += light * self.noise(50, 90)

    def ellipse(
        self, row: float, column: float, half_along: float, half_across: float, angle: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of a tilted ellipse: (along, across), both 1 on its border."""
        dy, dx = self.rows - row, self.columns - column
        sine, cosine = np.sin(angle), np.cos(angle)
        return (dy * cosine + dx * sine) / half_along, (dx * cosine - dy * sine) / half_across

    def window(
        self, row: float, column: float, reach_rows: float, reach_columns: float
    ) -> tuple[slice, slice]:
        """The part of the picture within a reach of a place, to work on that part only."""
        spans = []
        for middle, reach in ((row, reach_rows), (column, reach_columns)):
            start = max(0, int(np.floor((middle - reach) * self.unit)))
            stop = max(start, int(np.ceil((middle + reach) * self.unit)) + 1)
            spans.append(slice(start, stop))
        return spans[0], spans[1]

    def finish(self, turned: float) -> np.ndarray:
        """Adds the sensor's noise and turns the picture in a share `turned` of the cases."""
        level = self.level + self.rng.uniform(0.5, 3.0) * self.rng.standard_normal(self.level.shape)
        if self.rng.random() < turned:
            level = level.T
        if self.rng.random() < 0.5:
            level = level[::-1]
        return np.ascontiguousarray(np.clip(np.rint(level), 0, 255).astype(np.uint8))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -40, 40)))


def _crazing(canvas: _Canvas) -> np.ndarray:
    """A broken network of fine dark cracks: borders of warped cells on a rough, bright surface."""
    rng = canvas.rng
    canvas.surface(
        rng.uniform(85, 190), rng.uniform(4, 12), rng.uniform(12, 26), rng.uniform(5, 16)
    )
    cell = rng.uniform(20, 34)
    across = np.arange(-1, _REFERENCE_SIZE / cell + 1) * cell
    flat = rng.uniform(1.3, 2.0)  # cells are wider than high, as cracks open along the roll
    along = np.arange(-1, flat * _REFERENCE_SIZE / cell + 1) * cell / flat
    centres = np.stack(np.meshgrid(along, across, indexing="ij"), -1).reshape(-1, 2)
    centres += rng.uniform(-0.5, 0.5, centres.shape) * (cell / flat, cell)
    y = canvas.rows + 2.5 * canvas.noise(5, 3)
    x = canvas.columns + 2.5 * canvas.noise(3, 5)
    nearest = np.full(y.shape, np.inf)
    second = np.full(y.shape, np.inf)
    for cy, cx in centres:  # a centre is the first or second nearest of points close by only
        window = canvas.window(cy, cx, 2 * cell / flat + 8, 2 * cell + 8)
        distance = np.hypot(flat * (y[window] - cy), x[window] - cx)
        second[window] = np.minimum(second[window], np.maximum(nearest[window], distance))
        nearest[window] = np.minimum(nearest[window], distance)
    width = rng.uniform(0.7, 1.3) * (1 + 0.4 * np.clip(canvas.noise(6, 6), -1.5, 2))
    cracks = np.exp(-(((second - nearest) / (2 * width)) ** 2))
    open_share = _sigmoid(5 * (canvas.noise(9, 7) + rng.uniform(-0.3, 0.6)))
    canvas.level -= canvas.strength * rng.uniform(70, 120) * cracks * open_share
    holes = _sigmoid(6 * (canvas.noise(1.6, 3) - 3.0))
    canvas.level -= canvas.strength * 70 * holes
    return canvas.finish(turned=0.15)


def _inclusion(canvas: _Canvas) -> np.ndarray:
    """Dark slivers drawn out along the roll, with ragged borders, on a smooth surface."""
    rng = canvas.rng
    canvas.surface(rng.uniform(70, 200), rng.uniform(1, 4), rng.uniform(2, 6), rng.uniform(3, 14))
    ragged = 0.22 * canvas.noise(1.5, 4) + 0.18 * canvas.noise(4, 14)
    lean = rng.normal(0, 0.04)
    row, column = rng.uniform(30, 170, 2)
    cover = np.zeros_like(canvas.level)
    for _ in range(rng.integers(1, 6)):
        length = rng.uniform(9, 55)
        along, across = canvas.ellipse(
            row + rng.normal(0, 45),
            np.clip(column + rng.normal(0, 28), 8, 192),
            length,
            rng.uniform(2.0, 3.2) + length / rng.uniform(12, 22),
            lean + rng.normal(0, 0.03),
        )
        inside = 1 - np.hypot(along, across) + ragged
        cover = np.maximum(cover, rng.uniform(0.6, 1) * _sigmoid(9 * inside))
    canvas.level -= (
        canvas.strength * rng.uniform(35, 70) * cover * (0.85 + 0.1 * canvas.noise(1, 5))
    )
    return canvas.finish(turned=0.15)


def _patches(canvas: _Canvas) -> np.ndarray:
    """Large dark stains with soft, uneven borders on a rough, bright surface."""
    rng = canvas.rng
    canvas.surface(
        rng.uniform(125, 225), rng.uniform(4, 12), rng.uniform(8, 22), rng.uniform(5, 14)
    )
    wide = rng.uniform(13, 26)
    shape = canvas.noise(wide, wide * rng.uniform(1.0, 2.8))
    shape += 0.2 * canvas.noise(6, 7) + 0.06 * canvas.noise(2, 2)
    share = rng.uniform(0.10, 0.42)  # of the picture that is stained
    stain = _sigmoid(rng.uniform(2.5, 6) * (shape - np.quantile(shape, 1 - share)))
    depth = canvas.strength * rng.uniform(80, 135)
    canvas.level -= depth * stain * (1 + 0.15 * canvas.noise(10, 10))
    canvas.level += rng.uniform(0, 18) * (1 - stain)
    return canvas.finish(turned=0.15)


def _pitted_surface(canvas: _Canvas) -> np.ndarray:
    """Many small dark pits with a bright rim on the lit side, gathered in bands."""
    rng = canvas.rng
    canvas.surface(rng.uniform(110, 225), rng.uniform(2, 7), rng.uniform(4, 14), rng.uniform(6, 22))
    density = np.exp(rng.uniform(0.5, 1.4) * canvas.noise(22, 60))
    chance = (density / density.sum()).ravel()
    typical = rng.uniform(1.5, 3.2)
    light = rng.uniform(0, 2 * np.pi)
    pits = np.zeros_like(canvas.level)
    rims = np.zeros_like(canvas.level)
    for place in rng.choice(chance.size, size=rng.integers(35, 130), p=chance):
        row, column = divmod(int(place), canvas.size)
        radius = min(typical * rng.lognormal(0, 0.35), 7.0)
        window = canvas.window(
            row / canvas.unit, column / canvas.unit, 3 * radius + 2, 3 * radius + 2
        )
        dy = canvas.rows[window] - row / canvas.unit
        dx = canvas.columns[window] - column / canvas.unit
        distance = np.hypot(dy / rng.uniform(1.0, 1.5), dx)
        depth = rng.uniform(0.45, 1)
        pits[window] = np.maximum(pits[window], depth * _sigmoid(2.2 * (radius - distance)))
        facing = (dy * np.sin(light) + dx * np.cos(light)) / (distance + 0.5)
        rim = np.exp(-(((distance - radius - 1.0) / 0.9) ** 2)) * np.clip(facing, 0, 1)
        rims[window] = np.maximum(rims[window], depth * rim)
    canvas.level -= canvas.strength * rng.uniform(50, 95) * pits
    canvas.level += canvas.strength * rng.uniform(15, 50) * rims * (1 - pits)
    return canvas.finish(turned=0.15)


def _rolled_in_scale(canvas: _Canvas) -> np.ndarray:
    """Short wavy scales pressed into the surface: a relief of streaks, dark below, bright above."""
    rng = canvas.rng
    canvas.surface(rng.uniform(70, 160), rng.uniform(1, 4), rng.uniform(4, 10), rng.uniform(5, 16))
    slope = rng.uniform(-0.5, 0.5)
    wave = rng.uniform(3, 7) * np.sin(2 * np.pi * canvas.columns / rng.uniform(35, 80))
    y = canvas.rows + slope * canvas.columns + wave + 4 * canvas.noise(16, 12)
    # The relief is drawn straight and then read along the wavy rows.
    relief = canvas.noise(rng.uniform(3.5, 5.5), rng.uniform(1.3, 2.0))
    source = np.rint(y * canvas.unit).astype(np.intp) % canvas.size
    relief = np.take_along_axis(relief, source, axis=0)
    where = _sigmoid(3 * (canvas.noise(18, 22) + rng.uniform(-0.5, 0.5)))
    scales = _sigmoid(4 * (relief - rng.uniform(1.1, 1.5))) * where
    lit = np.roll(scales, -max(1, round(2 * canvas.unit)), axis=0)
    strength = canvas.strength * rng.uniform(45, 85)
    canvas.level -= strength * (scales - 0.5 * np.clip(lit - scales, 0, 1))
    canvas.level += canvas.strength * rng.uniform(3, 9) * relief * (0.3 + where)
    return canvas.finish(turned=0.1)


def _scratches(canvas: _Canvas) -> np.ndarray:
    """Long bright lines in any direction, mostly along the roll, on a smooth, dark surface."""
    rng = canvas.rng
    canvas.surface(rng.uniform(45, 130), rng.uniform(2, 6), rng.uniform(1.5, 5), rng.uniform(3, 12))
    wobble = canvas.noise(30, 30)
    any_direction = rng.random() < 0.3
    angle = rng.uniform(-np.pi / 2, np.pi / 2) if any_direction else rng.normal(0, 0.03)
    for _ in range(rng.integers(1, 5)):
        half = rng.choice([0.5, 0.8, 1.3, 2.5, 4.5], p=[0.25, 0.3, 0.25, 0.13, 0.07])
        along, across = canvas.ellipse(
            rng.uniform(20, 180),
            rng.uniform(12, 188),
            rng.uniform(25, 190),
            half,
            angle + rng.normal(0, 0.02),
        )
        across = across + rng.uniform(0, 1.2) * wobble / half
        profile = np.exp(-(np.abs(across) ** rng.choice([2.0, 4.0])))
        if half > 1:  # a broad scratch is a bundle of lines
            profile *= 0.75 + 0.35 * np.sin(across * half * rng.uniform(1.5, 3.0))
        ends = _sigmoid(7 * (1 - np.abs(along)))
        broken = 0.8 + 0.25 * np.clip(canvas.noise(1.5, 6), -2, 2)
        canvas.level += canvas.strength * rng.uniform(55, 140) * profile * ends * broken
    return canvas.finish(turned=0.4)


_PAINTERS: dict[str, Callable[[_Canvas], np.ndarray]] = dict(
    zip(
        CLASSES,
        (_crazing, _inclusion, _patches, _pitted_surface, _rolled_in_scale, _scratches),
        strict=True,
    )
)


def draw(name: str, number: int, size: int = 200, seed: int = 0) -> np.ndarray:
    """Draws one picture; the same arguments give the same pixels.

    Args:
        name: one of `CLASSES`.
        number: which picture of the class, from 1.
        size: side in pixels, 32 to 8192.
        seed: any whole number from 0.

    Returns:
        Grey levels, uint8 (size, size).

    Raises:
        ValueError: an argument outside these bounds.
    """
    if name not in _PAINTERS:
        raise ValueError(f"name={name!r} must be one of {', '.join(CLASSES)}")
    _check_whole("number", number, 1)
    _check_whole("size", size, _SMALLEST, _LARGEST)
    _check_whole("seed", seed, 0)
    rng = np.random.default_rng([seed, CLASSES.index(name), number])
    return _PAINTERS[name](_Canvas(size, rng))


def make_synthetic(
    path: str | os.PathLike[str],
    per_class: int = 60,
    size: int = 200,
    seed: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes a folder of synthetic pictures, `<class>/<class>_<n>.png` with n from 1.

    The folder appears when it is complete: an interrupted run leaves only `<path>.partial`.

    Args:
        path: the folder to make; it must not exist, or be empty.
        per_class: pictures of each of the six classes.
        size: side in pixels, 32 to 8192.
        seed: any whole number from 0; the same seed gives the same pixels.
        progress: called after every picture with (done, all).

    Returns:
        The folder.

    Raises:
        ValueError: an argument outside its bounds, or a folder with something in it.
        ImportError: Pillow is not installed.
    """
    _check_whole("per_class", per_class, 1)
    _check_whole("size", size, _SMALLEST, _LARGEST)
    _check_whole("seed", seed, 0)
    drawn = (
        (name, number, draw(name, number, size, seed))
        for name in CLASSES
        for number in range(1, per_class + 1)
    )
    return write_set(path, drawn, len(CLASSES) * per_class, progress=progress)


def write_set(
    path: str | os.PathLike[str],
    pictures: Iterable[tuple[str, int, np.ndarray]],
    total: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes pictures as `<class>/<class>_<n>.png`.

    The folder appears when it is complete: an interrupted run leaves only `<path>.partial`.

    Args:
        path: the folder to make; it must not exist, or be empty.
        pictures: class, n and grey levels (uint8, (H, W)) of each.
        total: how many there are, for `progress`.
        progress: called after every picture with (done, total).

    Returns:
        The folder.

    Raises:
        ValueError: a folder with something in it.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            'writing pictures needs Pillow: pip install "mobilesteelnet[cli]"'
        ) from error
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"path={str(path)!r} exists already; nothing was written")
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    for done, (name, number, levels) in enumerate(pictures, 1):
        (partial / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels).save(partial / name / f"{name}_{number}.png")
        if progress is not None:
            progress(done, total)
    if target.exists():
        target.rmdir()
    partial.replace(target)
    return target


def _check_whole(argument: str, value: int, least: int, most: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        upto = "" if most is None else f", at most {most}"
        raise ValueError(f"{argument}={value!r} must be a whole number, at least {least}{upto}")
