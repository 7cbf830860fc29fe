"""gpu_budgets.toml: a part for each command that writes one, kept apart by marks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).resolve().parent / "gpu_budgets.toml"
# Part → the line that begins it, in the order of the file.
MARKS = {
    "cuda": "",
    "triton": "# ---- Triton kernels\n",
    "emulated": "# ---- CUDA kernels, emulated\n",
}


def split(text: str) -> dict[str, str]:
    """The parts of the file's text, without their marks; a part that is not there is empty."""
    parts = {}
    for name in ("emulated", "triton"):
        text, _, parts[name] = text.partition(MARKS[name])
    return {"cuda": text, **parts}


def join(parts: Mapping[str, str]) -> str:
    """The inverse of `split`; empty parts are left out."""
    found = [mark + parts[name].strip("\n") for name, mark in MARKS.items() if parts[name]]
    return "\n\n".join(found) + "\n"


def read(part: str) -> dict[str, Any]:
    """The tables of a part."""
    return tomllib.loads(split(FILE.read_text())[part])


def write(part: str, text: str) -> None:
    """Put `text` in the place of a part."""
    FILE.write_text(join({**split(FILE.read_text()), part: text}))
