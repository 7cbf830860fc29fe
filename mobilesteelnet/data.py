"""Picture sets: reading folders, zips and pictures, exact duplicates, and the dataset of a split.

    pictures = scan("NEU-DET.zip")
    split = stratified_split(pictures, fractions=(0.05, 0.05, 0.90), seed=42)
    train = PictureDataset(pictures, split.train, train_transform())

`scan` decodes every picture once, so that a damaged file is known by name before anything is
trained, and keeps what the later steps need: size, pixel digest and contrast. The layouts that are
recognised are those of `layouts.py`; transforms and splits have files of their own.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from .layouts import NEU_CLASSES, Layout, is_companion, is_picture, recognise
from .pictures import (
    DataError,
    Folder,
    Image,
    PictureError,
    Several,
    Source,
    ZipArchive,
    below,
    decode,
    is_ignored,
)
from .splits import Split, stratified_split
from .transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalTransform,
    Transform,
    eval_transform,
    texture_transform,
    train_transform,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "NEU_CLASSES",
    "BadFile",
    "DataError",
    "EvalTransform",
    "Picture",
    "PictureDataset",
    "PictureSet",
    "Split",
    "eval_transform",
    "scan",
    "scan_several",
    "stratified_split",
    "texture_transform",
    "train_transform",
]

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all), from the thread that called `scan`."""


@dataclass(frozen=True)
class Picture:
    """One sound picture of a set.

    Attributes:
        name: path below the root of the set, `/` between the parts.
        label: index into the classes of the set, None in an unlabelled set.
        width: pixels.
        height: pixels.
        digest: sha256 of the size and the decoded RGB pixels, equal for exact duplicates only.
        contrast: standard deviation of the grey levels (0 to 255) over the pixels.
    """

    name: str
    label: int | None
    width: int
    height: int
    digest: str
    contrast: float


@dataclass(frozen=True)
class BadFile:
    """A file of the set that is not used, and why.

    Attributes:
        name: path below the root of the set.
        reason: continues the sentence that the name begins: "is empty", "cannot be decoded: …".
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


@dataclass(frozen=True)
class PictureSet:
    """The pictures of a folder or zip; made by `scan`, can be pickled and sent to workers.

    Attributes:
        path: the folder, zip or single picture; the current folder for several of them.
        classes: sorted names; empty in an unlabelled set.
        items: the sound pictures in natural order of their names.
        bad: files that are not used.
        layout: what the set was recognised as, in words.
    """

    path: Path
    classes: list[str]
    items: list[Picture]
    bad: list[BadFile]
    layout: str
    _source: Source = field(repr=False)

    def __len__(self) -> int:
        return len(self.items)

    def open(self, i: int) -> Image.Image:
        """Decodes picture i into mode RGB.

        Raises:
            DataError: the file has changed or gone since the scan.
        """
        name = self.items[i].name
        try:
            return decode(self._source.read(name))
        except PictureError as error:
            raise DataError(
                f"{name!r} of {str(self.path)!r} {error} (it was sound before)"
            ) from error

    @functools.cached_property
    def _labels(self) -> list[int]:
        return [p.label for p in self.items if p.label is not None]

    @property
    def labels(self) -> list[int]:
        """The label of each picture.

        Raises:
            DataError: the set is unlabelled.
        """
        if not self.classes:
            raise DataError(f"path={str(self.path)!r} was scanned without labels")
        return list(self._labels)

    def class_of(self, i: int) -> str:
        """The class name of picture i in a labelled set."""
        return self.classes[self._labels[i]]

    def duplicate_groups(self) -> list[list[int]]:
        """Indexes of pictures with exactly the same pixels, groups of two and more, ascending."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, picture in enumerate(self.items):
            groups[picture.digest].append(i)
        return [group for group in groups.values() if len(group) > 1]


def scan(
    path: str | os.PathLike[str],
    *,
    on_bad_file: Literal["skip", "fatal"] = "skip",
    labelled: bool = True,
    progress: Progress | None = None,
) -> PictureSet:
    """Reads a folder or zip of pictures, decoding each once to know that it is sound.

    Args:
        path: a folder or zip in one of the layouts of `layouts.py`; without labels also a single
            picture, and pictures at any depth.
        on_bad_file: "skip" collects unusable files in `.bad`, "fatal" makes them an error.
        labelled: whether the classes are wanted.
        progress: called after every picture with (done, all).

    Returns:
        The set. A labelled one has at least two classes with at least one picture each; an
        unlabelled one may have nothing but bad files.

    Raises:
        ValueError: an unknown `on_bad_file`.
        DataError: no such path, not a picture set, no usable pictures (in a class), fewer than
            two classes, or bad files with `on_bad_file="fatal"` (the message names them all).
    """
    if on_bad_file not in ("skip", "fatal"):
        raise ValueError(f"on_bad_file={on_bad_file!r} must be 'skip' or 'fatal'")
    root = Path(path)
    source = _open_source(root, labelled)
    if labelled:
        try:
            layout = recognise(source.names(), source.read, source.empty_folders())
        except DataError as error:
            raise DataError(f"path={str(root)!r}: {error}") from None
    else:
        layout = _unlabelled(source, root)
    return _read(root, source, layout, on_bad_file, labelled, progress)


def scan_several(
    paths: Sequence[str | os.PathLike[str]], *, progress: Progress | None = None
) -> PictureSet:
    """Reads pictures, folders and zips as one set without labels.

    Args:
        paths: one and more. The names in the set begin with these paths if there are several of
            them; what lies in two of them is taken once.
        progress: called after every picture with (done, all).

    Raises:
        ValueError: no paths.
        DataError: one of them cannot be read at all, or there are no pictures in any.
    """
    if isinstance(paths, (str, os.PathLike)):  # a text would be taken for its characters
        paths = [paths]
    if not paths:
        raise ValueError("paths=[]: at least one is needed")
    if len(paths) == 1:
        return scan(paths[0], labelled=False, progress=progress)
    sources = {path: _open_source(path, labelled=False) for path in map(Path, paths)}
    merged = Layout("pictures without classes")
    for path, source in sources.items():
        layout = _unlabelled(source, path)
        merged.classes.update(dict.fromkeys((below(source, name) for name in layout.classes), ""))
        merged.bad.update({below(source, name): why for name, why in layout.bad.items()})
    return _read(Path(), Several(sources.values()), merged, "skip", False, progress)


def _read(
    root: Path,
    source: Source,
    layout: Layout,
    on_bad_file: str,
    labelled: bool,
    progress: Progress | None,
) -> PictureSet:
    """The set of a source that was recognised."""
    refused = source.refused()
    bad = {**layout.bad, **{n: r for n, r in refused.items() if is_picture(n) or n.endswith("/")}}
    facts = _inspect_all(source, sorted(layout.classes, key=natural_key), bad, progress)

    classes = sorted({layout.classes[name] for name in facts}) if labelled else []
    items = [
        Picture(name, classes.index(layout.classes[name]) if labelled else None, *fact)
        for name, fact in facts.items()
    ]
    files = [BadFile(name, bad[name]) for name in sorted(bad, key=natural_key)]
    listed = "\n".join(f"  {file}" for file in files)
    if files and on_bad_file == "fatal":
        raise DataError(f"path={str(root)!r} has {len(files)} bad files\n{listed}")
    if not items and (labelled or not files):
        raise DataError(f"path={str(root)!r} has no usable pictures\n{listed}".rstrip())
    emptied = sorted(set(layout.classes.values()) - set(classes)) if labelled else []
    if emptied:
        raise DataError(f"path={str(root)!r}: class {emptied[0]!r} has bad files only\n{listed}")
    if labelled and len(classes) < 2:
        only = f"path={str(root)!r} has one class only, {classes[0]!r}; two are needed"
        raise DataError(f"{only}\n{listed}".rstrip())
    return PictureSet(root, classes, items, files, layout.kind, source)


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key that puts `a_2` before `a_10`."""
    runs = re.findall(r"([0-9]+)|([^0-9]+)", name)
    # The length of a run of digits without zeros orders numbers of any size without int().
    key = []
    for digits, text in runs:
        number = digits.lstrip("0")
        key.append((len(number), number) if digits else (-1, text))
    return key, name


def _open_source(path: Path, labelled: bool) -> Source:
    shown = str(path)
    try:
        if path.is_dir():
            return Folder(path)
        if not path.is_file():
            raise DataError(f"path={shown!r} does not exist or is neither file nor folder")
        if path.suffix.lower() == ".zip" or _begins_like_zip(path):
            return ZipArchive(path)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"path={shown!r} cannot be read: {error}") from error
    if labelled:
        raise DataError(f"path={shown!r} is neither a folder nor a zip of <class>/<picture>")
    return Folder(path.parent, only=path.name)


def _begins_like_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unlabelled(source: Source, root: Path) -> Layout:
    """Every picture at any depth; a single file is taken whatever its name."""
    layout = Layout("pictures without classes")
    single = source.path != root
    for name in source.names():
        if single or (is_picture(name) and not is_ignored(name)):
            layout.classes[name] = ""
        elif not is_ignored(name) and not is_companion(name):
            layout.bad[name] = "is no picture by its ending"
    return layout


def _inspect_all(
    source: Source, names: Sequence[str], bad: dict[str, str], progress: Progress | None
) -> dict[str, tuple[int, int, str, float]]:
    """Decodes all pictures on a few threads; failures go to `bad`, in the order of the names."""
    facts = {}
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="scan") as pool:
        try:
            results = pool.map(functools.partial(_inspect, source), names)
            for done, (name, result) in enumerate(zip(names, results, strict=True), start=1):
                if isinstance(result, PictureError):
                    bad[name] = str(result)
                else:
                    facts[name] = result
                if progress is not None:
                    progress(done, len(names))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # so that Ctrl-C need not wait for all
            raise
    return facts


def _inspect(source: Source, name: str) -> tuple[int, int, str, float] | PictureError:
    """Width, height, digest and contrast of one picture, or why it has none."""
    try:
        image = decode(source.read(name))
    except PictureError as error:
        return error
    digest = hashlib.sha256(f"{image.width}x{image.height} RGB\n".encode())
    digest.update(image.tobytes())
    contrast = float(np.asarray(image.convert("L"), dtype=np.float64).std())
    return image.width, image.height, digest.hexdigest(), contrast


class PictureDataset(Dataset[tuple[torch.Tensor, int]]):
    """Some pictures of a set, transformed: the dataset that a data loader reads.

    Args:
        pictures: the set.
        indexes: which of its pictures, in this order.
        transform: picture -> tensor.

    Items are (tensor, label), the label -1 when the set is unlabelled.

    Raises:
        DataError: an index outside the set.
    """

    def __init__(self, pictures: PictureSet, indexes: Iterable[int], transform: Transform) -> None:
        self.pictures = pictures
        self.indexes = [int(i) for i in indexes]
        self.transform = transform
        for i in self.indexes:
            if not 0 <= i < len(pictures):
                raise DataError(f"indexes holds {i}, but the set has {len(pictures)} pictures")

    def __len__(self) -> int:
        return len(self.indexes)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        i = self.indexes[position]
        label = self.pictures.items[i].label
        return self.transform(self.pictures.open(i)), -1 if label is None else label
