"""Where pictures come from and how one is decoded: folders, zip files, and everything hostile.

Nothing is ever extracted to disk. `Folder` and `ZipArchive` list the files below a root and read
one of them as bytes; `decode` turns the bytes into an 8-bit RGB picture or says why it cannot.
"""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

try:
    from PIL import Image, UnidentifiedImageError
except ImportError as error:
    raise ImportError('reading pictures needs Pillow: pip install "mobilesteelnet[cli]"') from error

PICTURE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})
"""The file name endings that are taken for pictures, in lower case."""

MAX_FILE_BYTES = 512 * 2**20
"""A file (or a zip entry, once unpacked) above this size is refused unread."""

_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir"})
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF")
_GREY_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_LEAST_16_BIT_MAXIMUM = 2**14
_ZIP_ENCRYPTED = 0x1


def is_ignored(name: str) -> bool:
    """Whether a file is none of the set's business: hidden or left by an operating system."""
    return any(p.startswith(".") or p.lower() in _SYSTEM_FILES for p in name.split("/"))


class DataError(ValueError):
    """A picture set that cannot be used; the message names the path, argument or files."""


class PictureError(ValueError):
    """One file that is no usable picture; the message is the reason."""


class Source(Protocol):
    """A root with files below it, addressed by relative names with `/` between the parts."""

    path: Path

    def names(self) -> list[str]:
        """Every file below the root."""

    def refused(self) -> Mapping[str, str]:
        """Files that must not be read: name to reason."""

    def empty_folders(self) -> list[str]:
        """Folders below the root that hold nothing."""

    def read(self, name: str) -> bytes:
        """The bytes of one file.

        Raises:
            PictureError: it cannot be read; the message is the reason.
        """


class Folder:
    """The files below a directory, links followed, or `only` one of them."""

    def __init__(self, path: Path, only: str | None = None) -> None:
        self.path = path
        self._refused: dict[str, str] = {}
        self._empty: list[str] = []
        self._names = [only] if only is not None else sorted(self._walk(path, "", ()))

    def _walk(self, directory: Path, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
        real = os.path.realpath(directory)
        if real in above:  # a link that leads back to where it lies
            return
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            if prefix:
                self._refused[prefix] = f"cannot be listed: {error.strerror}"
                return
            raise DataError(
                f"path={str(directory)!r} cannot be listed: {error.strerror}"
            ) from error
        if prefix and not entries:
            self._empty.append(prefix.rstrip("/"))
        for entry in entries:
            name = prefix + entry.name
            if is_ignored(entry.name):
                continue
            if not _is_printable_unicode(name):
                shown = name.encode("utf-8", "backslashreplace").decode()
                ending = "/" * _is_directory(entry)  # a class, maybe: all that is in it is left out
                self._refused[shown + ending] = "the name is not valid Unicode"
            elif _is_directory(entry):
                yield from self._walk(Path(entry.path), f"{name}/", (*above, real))
            else:
                yield name

    def names(self) -> list[str]:
        """Every file below the root that is not ignored, sorted."""
        return self._names

    def empty_folders(self) -> list[str]:
        """Folders below the root that hold nothing."""
        return self._empty

    def refused(self) -> Mapping[str, str]:
        """Files, and folders with an ending slash, whose names cannot be shown or stored."""
        return self._refused

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        path = self.path / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device would never end
                raise PictureError("is not a regular file")
            _check_size(status.st_size)
            return path.read_bytes()
        except OSError as error:
            raise PictureError(f"cannot be read: {error.strerror or error}") from error


class ZipArchive:
    """The files of a zip, read in place.

    The handle is opened in each process that reads and never travels: instances can be pickled and
    survive the fork of a data-loader worker.

    Raises:
        DataError: not a zip, encrypted, or with a name that leads out of the archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: zipfile.ZipFile | None = None
        self._owner = -1
        self._stored: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        folders = []
        for entry in self._archive().infolist():
            if entry.is_dir():
                folders.append("/".join(_parts(entry.filename)))
                continue
            name = self._safe_name(entry.filename)
            if entry.flag_bits & _ZIP_ENCRYPTED:
                raise DataError(f"path={str(path)!r}: the zip is encrypted ({name!r}); unlock it")
            if name in self._stored:
                self._refused[name] = "is stored more than once in the zip"
            elif not _is_printable_unicode(name):
                self._refused[repr(name)] = "the file name is not valid Unicode"
            else:
                self._stored[name] = entry.filename
        held = {name[:i] for name in self._stored for i in _slashes(name)}
        held |= {name[:i] for name in folders for i in _slashes(name)}
        self._empty = [
            name for name in folders if name and name not in held and not is_ignored(name)
        ]

    def _safe_name(self, stored: str) -> str:
        parts = _parts(stored)
        outside = stored[:1] in ("/", "\\") or stored[1:2] == ":"
        if outside or not parts or ".." in parts:
            raise DataError(
                f"path={str(self.path)!r}: the zip holds the unsafe name {stored!r}; pack it anew"
            )
        return "/".join(parts)

    def _archive(self) -> zipfile.ZipFile:
        handle = self._handle
        if handle is None or self._owner != os.getpid():  # a forked handle shares its file position
            try:
                handle = zipfile.ZipFile(self.path)
            except Exception as error:  # a hostile directory raises far more than BadZipFile
                raise DataError(
                    f"path={str(self.path)!r} is not a readable zip: {error}"
                ) from error
            self._handle, self._owner = handle, os.getpid()
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_owner": -1}

    def names(self) -> list[str]:
        """Every file of the archive that is stored once, sorted."""
        return sorted(set(self._stored) - set(self._refused))

    def refused(self) -> Mapping[str, str]:
        """Files that are stored more than once."""
        return self._refused

    def empty_folders(self) -> list[str]:
        """Folders of the archive that hold nothing."""
        return self._empty

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        archive = self._archive()
        try:
            entry = archive.getinfo(self._stored[name])
            _check_size(entry.file_size)
            return archive.read(entry)
        except PictureError:
            raise
        except Exception as error:  # bad checksums, unknown methods, overlaps: many classes
            reason = str(error) or type(error).__name__
            raise PictureError(f"cannot be unpacked: {reason}") from error


class Several:
    """The files of several sources, each named by its source's path and its name there.

    A file that is in two of them under the same path is there once.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        self.path = Path()
        self._files: dict[str, tuple[Source, str]] = {}
        self._refused: dict[str, str] = {}
        for source in sources:
            for name in source.names():
                self._files[below(source, name)] = source, name
            for name, reason in source.refused().items():
                self._refused[below(source, name)] = reason

    def names(self) -> list[str]:
        """Every file of the sources."""
        return list(self._files)

    def refused(self) -> Mapping[str, str]:
        """What the sources refuse."""
        return self._refused

    def empty_folders(self) -> list[str]:
        """None: nobody looks for classes in several sources."""
        return []

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        source, own = self._files[name]
        return source.read(own)


def below(source: Source, name: str) -> str:
    """The name of a source's file with the path of the source before it."""
    root = source.path.as_posix().rstrip("/")
    return name if root == "." else f"{root}/{name}"


def _parts(stored: str) -> list[str]:
    return [part for part in stored.replace("\\", "/").split("/") if part not in ("", ".")]


def _slashes(name: str) -> list[int]:
    return [i for i, character in enumerate(name) if character == "/"]


def _is_printable_unicode(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _check_size(size: int) -> None:
    if size == 0:
        raise PictureError("is empty")
    if size > MAX_FILE_BYTES:
        raise PictureError(f"has {size} bytes, more than the {MAX_FILE_BYTES} that are read")


_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # of TIFF


def decode(content: bytes) -> Image.Image:
    """Decodes a JPEG, PNG, BMP or TIFF file wholly into 8-bit RGB.

    16-bit grey is scaled by 255/65535, transparency is laid over white, palette and CMYK are
    converted by Pillow, of a TIFF with several pages the first is taken. The pixels stay as stored:
    an EXIF orientation is not applied.

    Pixels of 16 or 32 bits that all lie below a quarter of 65536 are refused: cameras of 10 to 14
    bits store them unscaled, and they would be taken for almost black without a word. A picture
    that is scaled and really so dark is refused with them, and can be read once it has 8 bits.

    Args:
        content: the bytes of the file.

    Returns:
        A loaded picture in mode RGB.

    Raises:
        PictureError: no such picture, damaged, too large, or of unscaled pixels; the message is the
            reason.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise PictureError(
                    f"has {image.width} x {image.height} pixels, more than {limit} are not read"
                )
            deep = _has_16_bit_colours(image)  # loading forgets it
            image.load()
            if deep:
                brightest = max(high for _, high in image.getextrema()[:3])
                _check_scaled(256 * brightest + 255)
            return to_rgb(image)
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError("is not a JPEG, PNG, BMP or TIFF picture") from error
    except Exception as error:  # Pillow's decoders raise many classes on damaged files
        reason = str(error) or type(error).__name__
        raise PictureError(f"cannot be decoded: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Brings a loaded picture of any 8- or 16-bit mode to 8-bit RGB (see `decode`).

    Raises:
        PictureError: 32-bit or floating-point pixels, whose range is unknown, or unscaled ones.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode == "F":
        raise PictureError("has floating-point pixels; convert it to 8 or 16 bits")
    if image.mode == "I" or image.mode in _GREY_16_BIT:
        values = np.asarray(image)
        tags: Any = getattr(image, "tag_v2", {})
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts such pixels of 8 bits only
            values = 65535 - values.astype(np.int64)
        return _grey_16_bit_to_rgb(values)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _grey_16_bit_to_rgb(values: np.ndarray) -> Image.Image:
    # Some decoders hand 16-bit pixels over in 32-bit integers; beyond 16 bits the range is unknown.
    if values.min() < 0 or values.max() > 65535:
        raise PictureError("has 32-bit pixels; convert it to 8 or 16 bits")
    _check_scaled(int(values.max()))
    grey = (values.astype(np.uint32) * 255 + 32767) // 65535
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _has_16_bit_colours(image: Image.Image) -> bool:
    # Pillow keeps the upper byte of each colour; what the file holds is told by its raw mode alone.
    raw = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    return raw and image.format in ("PNG", "TIFF") and image.mode in ("RGB", "RGBA")


def _check_scaled(largest: int) -> None:
    if largest < _LEAST_16_BIT_MAXIMUM:
        bits = max(8, largest.bit_length())
        raise PictureError(
            f"has no value above {largest} of 65535 and would be read as almost black; multiply "
            f"them by {65535 // (2**bits - 1)} if they have {bits} bits, or convert it to 8 bits"
        )
