"""Picture sets other than NEU-DET: both recipes are tried on them as they stand.

A recipe that was chosen on one set may fit that set alone. The network is the one without MSFF,
which takes a sixth of the whole one's work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..predict import Progress
from ..recipes import OURS, PUBLISHED
from ..synthetic import make_synthetic, write_set
from .grid import FIRST_SEED, PlannedRun
from .runner import Places

FOLDER = "sets"
"""Below the run folders and below the result files."""

NETWORK = "ciema"
_SYNTHETIC_PER_CLASS = 300  # as many pictures as NEU-DET has


@dataclass(frozen=True)
class PictureSource:
    """A set that can be made here.

    Attributes:
        title: What it is.
        make: Writes it as a new folder, telling its progress.
    """

    title: str
    make: Callable[[Path, Progress | None], Path]


def make_digits(path: Path, progress: Progress | None = None) -> Path:
    """Write scikit-learn's handwritten digits (1797 of 8×8 pixels) as a folder of pictures.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: There is something at ``path``.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'the digits need scikit-learn: pip install "mobilesteelnet[sets]"'
        ) from error
    found: Any = load_digits()
    counts: dict[int, int] = {}

    def pictures() -> Any:
        for ink, digit in zip(found.images, found.target, strict=True):
            counts[digit] = counts.get(digit, 0) + 1
            # 0 to 16 in the set.
            yield f"digit{digit}", counts[digit], np.rint(ink * (255 / 16)).astype(np.uint8)

    return write_set(path, pictures(), len(found.images), progress=progress)


def _make_synthetic(path: Path, progress: Progress | None = None) -> Path:
    return make_synthetic(path, per_class=_SYNTHETIC_PER_CLASS, progress=progress)


SETS: dict[str, PictureSource] = {
    "synthetic": PictureSource(
        "drawn textures in the manner of NEU-DET (`mobilesteelnet data synthetic`)", _make_synthetic
    ),
    "digits": PictureSource("scikit-learn's handwritten digits of 8×8 pixels", make_digits),
}


def set_name(data: Path) -> str:
    """What a set of one's own is called."""
    name = data.resolve().name
    return name.removesuffix(".zip") or "pictures"


def set_folder(name: str, runs: Path) -> Path:
    """Where the pictures of one of :data:`SETS` lie, or will lie."""
    return runs / FOLDER / name / "pictures"


def find_set(name: str, runs: Path, progress: Progress | None = None) -> Path:
    """The folder of one of :data:`SETS`; it is made if it is not there.

    Args:
        name: Key of :data:`SETS`.
        runs: Folder of the run folders; the pictures lie in it too.
        progress: Called with (done, total) while it is made.

    Raises:
        ImportError: What it is made from is not installed.
        OSError: It cannot be written.
    """
    path = set_folder(name, runs)
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        SETS[name].make(path, progress)
    return path.absolute()


def set_places(name: str, data: Path, places: Places) -> Places:
    """Where the runs and results of a set lie."""
    return replace(
        places,
        data=str(data),
        runs=places.runs / FOLDER / name,
        results=places.results / FOLDER / name,
    )


def plan_set(seeds: int) -> list[PlannedRun]:
    """Both recipes on a set, seed by seed.

    Raises:
        ValueError: ``seeds`` is below 1.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: must be 1 or more")
    numbers = range(FIRST_SEED, FIRST_SEED + seeds)
    return [PlannedRun(NETWORK, recipe, seed) for seed in numbers for recipe in (PUBLISHED, OURS)]
