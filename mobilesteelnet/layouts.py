"""Which class a picture belongs to, told from the names of the files alone (and VOC annotations).

Layouts, tried in this order, after any directories that wrap the whole set (such as `NEU-DET/`):

1. VOC: pictures in `IMAGES/` (or `JPEGImages/`), one XML file each in `ANNOTATIONS/` beside it.
   The class is the only object name of the annotation, else the file name without its number.
2. Class directories: `<class>/<picture>`, also below `train/`, `validation/`, `test/` and
   `images/`, which are merged. Directories inside a class directory belong to the class.
3. Flat NEU-CLS: `Cr_1.bmp`, `In_1.bmp`, … or `crazing_1.jpg`, … without class directories.

Upper and lower case does not matter in the structural names. Class names are taken as they are, but
when they are the six of NEU-DET in any of their usual spellings (`Cr`, `Rolled-in_Scale`, `Pitted`,
…) they become `NEU_CLASSES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from xml.parsers import expat

from .pictures import PICTURE_EXTENSIONS, DataError, PictureError, is_ignored

NEU_CLASSES = (
    "crazing",
    "inclusion",
    "patches",
    "pitted_surface",
    "rolled-in_scale",
    "scratches",
)
"""The classes of NEU-DET and NEU-CLS (Song and Yan, 2013), as this package names them."""

_NEU_ALIASES = {
    "crazing": ("cr",),
    "inclusion": ("in", "inclusions"),
    "patches": ("pa", "patch"),
    "pitted_surface": ("ps", "pitted"),
    "rolled-in_scale": ("rs", "rolled"),
    "scratches": ("sc", "scratch"),
}
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_IMAGE_DIRECTORIES = frozenset({"images", "jpegimages"})
_ANNOTATION_DIRECTORY = "annotations"
_COMPANION_EXTENSIONS = frozenset(
    {".xml", ".txt", ".json", ".csv", ".md", ".yaml", ".yml", ".html", ".pdf", ".sha256", ".md5"}
)
_MAX_ANNOTATION_BYTES = 2**20


@dataclass
class Layout:
    """What the names of a set tell.

    Attributes:
        kind: the layout in words.
        classes: class of each picture, by name of the file.
        bad: files that belong to no class or are no pictures, with the reason.
    """

    kind: str
    classes: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)


def extension(name: str) -> str:
    """The ending of a file name in lower case, with its dot, or an empty string."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


def is_picture(name: str) -> bool:
    """Whether a file name ends as a picture's does."""
    return extension(name) in PICTURE_EXTENSIONS


def is_companion(name: str) -> bool:
    """Whether a file is a note or an annotation that may lie beside pictures unreported."""
    return extension(name) in _COMPANION_EXTENSIONS


def recognise(
    names: Iterable[str], read: Callable[[str], bytes], empty: Iterable[str] = ()
) -> Layout:
    """Finds the layout of a set and the class of every picture.

    Args:
        names: relative names of all files, `/` between the parts.
        read: gives the bytes of a file; called for VOC annotations only, may raise `PictureError`.
        empty: names of the directories that hold nothing.

    Returns:
        The layout. Files with an unknown ending inside a class directory are reported as bad, and
        so are directories beside those of classes that hold no picture; notes and annotations
        (`.txt`, `.xml`, …) and files outside are passed over in silence.

    Raises:
        DataError: the names show no classes, or parts of a split beside other directories.
    """
    files = [name for name in names if not is_ignored(name)]
    pictures = [name for name in files if is_picture(name)]
    annotations = _annotations(files)
    if any(_annotation_key(name) in annotations for name in pictures):
        layout = _voc(pictures, annotations, read)
    else:
        layout = _class_directories(files, pictures, empty) or _flat_neu(pictures)
    layout.classes = _canonical(layout.classes)
    return layout


def _annotations(files: Iterable[str]) -> dict[tuple[str, str], str]:
    """XML files of annotation directories, by (directory above, stem)."""
    found = {}
    for name in files:
        above, _, directory, base = _tail(name)
        if directory == _ANNOTATION_DIRECTORY and extension(base) == ".xml":
            found[above, base.rpartition(".")[0]] = name
    return found


def _annotation_key(picture: str) -> tuple[str, str] | None:
    above, _, directory, base = _tail(picture)
    return (above, base.rpartition(".")[0]) if directory in _IMAGE_DIRECTORIES else None


def _tail(name: str) -> tuple[str, str, str, str]:
    """Splits `a/b/DIR/file` into ("a/b", "DIR", "dir", "file")."""
    parent, _, base = name.rpartition("/")
    above, _, directory = parent.rpartition("/")
    return above, directory, directory.lower(), base


def _voc(
    pictures: list[str],
    annotations: Mapping[tuple[str, str], str],
    read: Callable[[str], bytes],
) -> Layout:
    layout = Layout("VOC (pictures and XML annotations)" + _together(pictures))
    objects: dict[str, list[str]] = {}
    for name in pictures:
        key = _annotation_key(name)
        if key is None:
            layout.bad[name] = "lies outside the directory of the annotated pictures"
        elif key not in annotations:
            objects[name] = []
        else:
            try:
                objects[name] = object_names(read(annotations[key]))
            except PictureError as error:
                layout.bad[name] = f"its annotation {annotations[key]!r} {error}"
    known = {_squeezed(name): name for named in objects.values() for name in named}
    if set(known) <= set(_NEU_BY_ALIAS):
        known = {**_NEU_BY_ALIAS, **known}
    for name, named in objects.items():
        by_name = known.get(_squeezed(_without_number(name)))
        if len(named) == 1:
            layout.classes[name] = named[0]
        elif by_name is not None:
            layout.classes[name] = by_name
        else:
            what = f"names {len(named)} classes" if named else "names no class or is missing"
            layout.bad[name] = f"its annotation {what}, and its file name tells none either"
    return layout


def object_names(annotation: bytes) -> list[str]:
    """The different `object/name` texts of a VOC annotation, sorted.

    Raises:
        PictureError: not well-formed XML, too long, or with a document type (whose entities could
            expand without end).
    """
    if len(annotation) > _MAX_ANNOTATION_BYTES:
        raise PictureError(f"is longer than {_MAX_ANNOTATION_BYTES} bytes")
    found: set[str] = set()
    tags: list[str] = []
    text: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        tags.append(tag)
        text.clear()

    def end(tag: str) -> None:
        if tags[-2:] == ["object", "name"]:
            found.add("".join(text).strip())
        tags.pop()

    def refuse(*_: object) -> None:
        raise PictureError("declares a document type, which is not read")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(annotation, True)
    except PictureError:
        raise
    except Exception as error:  # expat's own class, and codec errors of the declared encoding
        raise PictureError(f"is not well-formed XML: {error}") from error
    return sorted(found - {""})


def _class_directories(
    files: list[str], pictures: list[str], empty: Iterable[str]
) -> Layout | None:
    parts = {name: name.split("/") for name in pictures}
    depth = _structural_depth(list(parts.values()))
    inside = {name: p[depth] for name, p in parts.items() if len(p) > depth + 1}
    heads = set(inside.values())
    if {head.lower() for head in heads} <= _SPLITS | _IMAGE_DIRECTORIES:
        return None
    if len(heads) == 1 and len({_neu_class_by_name(name) for name in inside} - {None}) > 1:
        return None  # a wrapper around flat NEU-CLS
    _check_no_split_among(heads, [p[depth:] for p in parts.values() if len(p) > depth + 1])
    merged = _together("/".join(part[: depth + 1]) for part in parts.values())
    layout = Layout("class directories" + merged, classes=inside)
    homes = {tuple(parts[name][: depth + 1]) for name in inside}
    for name in files:
        if name in parts:
            if name not in inside:
                layout.bad[name] = "lies outside the class directories"
        elif not is_companion(name) and tuple(name.split("/")[: depth + 1]) in homes:
            layout.bad[name] = f"is no picture: its ending is none of {_ENDINGS}"
    layout.bad.update(_without_pictures(files, empty, homes))
    return layout


def _together(names: Iterable[str]) -> str:
    """Says which parts of somebody's split are merged; nothing of one part, as a zip may hold."""
    folders = {part for name in names for part in name.split("/")[:-1]}
    parts = sorted(part for part in folders if part.lower() in _SPLITS)
    return f", {', '.join(parts)} taken together" if len(parts) > 1 else ""


def _check_no_split_among(heads: set[str], parts: list[list[str]]) -> None:
    """Refuses `train/` and `test/` as classes where another directory beside them hides them."""
    split = sorted(head for head in heads if head.lower() in _SPLITS)
    others = sorted(heads - set(split))
    if split and others and all(len(p) > 2 for p in parts if p[0] in split):
        raise DataError(
            f"the folders {', '.join(map(repr, split))} hold folders, as the parts of a split do, "
            f"but {', '.join(map(repr, others))} beside them is no part: move it away, or rename "
            "those if they are classes"
        )


def _without_pictures(
    files: list[str], empty: Iterable[str], homes: set[tuple[str, ...]]
) -> dict[str, str]:
    """Directories beside those of the classes, `homes`, in which nothing is read, and why."""
    above, depth = {home[:-1] for home in homes}, len(next(iter(homes)))
    found: dict[tuple[str, ...], list[str]] = {}
    for name in files:
        place = tuple(name.split("/")[:depth])
        if name.count("/") >= depth and not is_companion(name):
            found.setdefault(place, []).append(name)
    bad = {}
    for place, names in found.items():
        if place not in homes and place[:-1] in above:
            example = names[0].rpartition("/")[2]
            bad["/".join(place) + "/"] = (
                f"holds no picture that is read: {len(names)} other files, such as {example!r}"
            )
    for name in empty:
        place = tuple(name.split("/"))
        if len(place) == depth and place not in homes and place[:-1] in above:
            bad[f"{name}/"] = "is an empty folder"
    return bad


def _structural_depth(parts: list[list[str]]) -> int:
    """How many leading directories of every name are wrappers, splits or `images`, not classes."""
    depth = 0
    while True:
        inside = [p for p in parts if len(p) > depth + 1]
        deeper = sum(len(p) > depth + 2 for p in inside)
        heads = {p[depth].lower() for p in inside}
        shared = len(heads) == 1 or heads <= _SPLITS | _IMAGE_DIRECTORIES
        if not shared or 2 * deeper <= len(inside):
            return depth
        depth += 1


def _flat_neu(pictures: list[str]) -> Layout:
    layout = Layout("flat, named as NEU-CLS")
    for name in pictures:
        alias = _neu_class_by_name(name)
        if alias is None:
            layout.bad[name] = "has no class directory and no file name of NEU-CLS, as Cr_1.bmp"
        else:
            layout.classes[name] = alias
    if not layout.classes:
        raise DataError(
            "no classes found: put the pictures into one directory a class, <class>/<picture>"
        )
    return layout


def _canonical(classes: dict[str, str]) -> dict[str, str]:
    """Gives the classes their NEU-DET names when they are those six and no others."""
    aliases = {c: _NEU_BY_ALIAS.get(_squeezed(c)) for c in set(classes.values())}
    if set(aliases.values()) != set(NEU_CLASSES):
        return classes
    return {name: aliases[c] or c for name, c in classes.items()}


def _neu_class_by_name(name: str) -> str | None:
    return _NEU_BY_ALIAS.get(_squeezed(_without_number(name)))


def _without_number(name: str) -> str:
    return re.sub(r"[_\-\s]?\d+$", "", name.rpartition("/")[2].rpartition(".")[0])


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_\-]", "", name).lower()


_NEU_BY_ALIAS = {
    _squeezed(alias): name for name, aliases in _NEU_ALIASES.items() for alias in (name, *aliases)
}
_ENDINGS = ", ".join(sorted(PICTURE_EXTENSIONS))
