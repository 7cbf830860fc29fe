"""Builds the emulator with a kernel file, once for each state of the sources.

The emulator's own files are compiled plainly. The kernel file is compiled with the hooks of
``-fsanitize=thread,bounds``, and linked to the emulator instead of the sanitizers' libraries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
_EMULATOR = CSRC / "emulator"
_COMMON = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DCIEMA_EMULATOR")
_RUNTIME = (*_COMMON, "-O2")
# -fno-gnu-unique keeps two builds of one kernel apart in a process.
_KERNEL = (
    *_COMMON,
    *("-O1", "-g", "-ffp-contract=off", "-fno-gnu-unique", "-Wno-unknown-pragmas"),
    "-fsanitize=thread,bounds",
)


def missing_tool() -> str | None:
    """The reason why the emulator can't be built here, or None."""
    for tool in ("g++", "addr2line"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python.h is not installed"
    return None


def build(kernel: Path) -> ModuleType:
    """The emulator's module with the entries of one kernel file.

    Args:
        kernel: a CUDA or C++ file that registers ``ciema::Entry`` objects.

    Returns:
        The loaded extension module; ``Session`` drives it.

    Raises:
        RuntimeError: a compiler's message, if it does not compile.
    """
    runtime = _objects()
    headers = sorted((*CSRC.glob("common/*"), *CSRC.glob("cuda/*.cuh"), *_EMULATOR.glob("*")))
    library = _cache() / f"{_digest([kernel, *headers], _KERNEL)}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as folder:
            compiled = Path(folder) / "kernel.o"
            _run(["g++", *_KERNEL, "-x", "c++", "-c", str(kernel), "-o", str(compiled)])
            linked = Path(folder) / library.name
            _run(["g++", "-shared", str(compiled), *map(str, runtime), "-ldl", "-o", str(linked)])
            os.replace(linked, library)
    return _load(library)


def _objects() -> list[Path]:
    """The compiled files of the emulator itself."""
    sources = [*sorted(_EMULATOR.glob("*.cpp")), CSRC / "cuda" / "entries.cpp"]
    headers = [*sorted(_EMULATOR.glob("*.h"))]
    headers += [CSRC / "common" / "entries.h", CSRC / "common" / "argument_values.h"]
    missing = [source for source in sources if not _object(source, headers).exists()]
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda source: _compile(source, _object(source, headers)), missing))
    return [_object(source, headers) for source in sources]


def _object(source: Path, headers: list[Path]) -> Path:
    return _cache() / f"{source.stem}-{_digest([source, *headers], _runtime_flags())}.o"


def _compile(source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=_cache()) as folder:
        compiled = Path(folder) / target.name
        _run(["g++", *_runtime_flags(), "-c", str(source), "-o", str(compiled)])
        os.replace(compiled, target)


def _runtime_flags() -> tuple[str, ...]:
    import pybind11

    includes = (pybind11.get_include(), sysconfig.get_paths()["include"])
    return (*_RUNTIME, *(f"-isystem{include}" for include in includes))


def _cache() -> Path:
    """A folder of this user alone, since code is loaded from it."""
    folder = Path(tempfile.gettempdir()) / f"ciema-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user; set TMPDIR to a folder of yours")
    return folder


def _digest(files: Iterable[Path], flags: Iterable[str]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    for part in (version, sysconfig.get_config_var("SOABI").encode(), "\0".join(flags).encode()):
        digest.update(part + b"\0")
    for file in files:
        if file.is_file():
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    if "warning:" in result.stderr:
        raise RuntimeError(f"{' '.join(command)} warns:\n{result.stderr}")


def _load(library: Path) -> ModuleType:
    # pybind11 keeps modules by their full name: each library needs its own.
    name = f"emulator_{library.stem}._emulator"
    spec = importlib.util.spec_from_file_location(name, library)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{library} can't be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
