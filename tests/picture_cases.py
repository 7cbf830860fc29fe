"""Pictures and picture sets, folder and zip, that several test files write."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (12, 10), kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return encode(image, kind)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def encode_deep_colours(values: np.ndarray) -> bytes:
    """A PNG of (H,W,3) 16-bit colours, which Pillow reads but does not write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    return content


def two_classes(each: int = 3) -> dict[str, bytes]:
    names = [f"{name}/{name}_{n}.png" for name in ("dent", "rust") for n in range(1, each + 1)]
    return {name: picture(seed) for seed, name in enumerate(names)}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


WRITERS = {
    "folder": lambda root, files: write_folder(root / "set", files),
    "zip": lambda root, files: write_zip(root / "set.zip", files),
}


@pytest.fixture(params=sorted(WRITERS))
def write(request, tmp_path):
    return lambda files: WRITERS[request.param](tmp_path, files)


PNG = picture(99)
JPEG = picture(99, (64, 64), "JPEG")
