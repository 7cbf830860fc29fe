"""The folder of a training run: what lies in it, and writing that never leaves half a file.

``config.json``        every option of the run; written once
``split.json``         the names of the training, validation and test pictures; written once
``run.json``           state: running, interrupted, failed or finished, and why; epochs done
``metrics.csv`` and ``history.json``    one row an epoch
``best.safetensors``   the network of the chosen epoch
``last.ckpt``          what :mod:`mobilesteelnet.train` needs to continue after a kill
``tensorboard/``       event files
``.mobilesteelnet.lock``    there while a process works in the folder
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .run_lock import LOCK, locked


class RunFolderError(ValueError):
    """The folder given for a run cannot be used as such; nothing in it was changed."""


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it onto ``path``.

    Whatever goes wrong (a full disk, a kill, an exception in ``write``), ``path`` holds either its
    old bytes or the complete new ones. A link stays one: what it points to is written. A device, a
    pipe or a descriptor, as ``/dev/stdout``, is given the complete bytes.

    Args:
        path: The file to write. Its folder must exist.
        write: Called with the temporary file's path; has to write the whole content there.

    Raises:
        OSError: The folder is missing or not writable, or the disk is full.
    """
    target = Path(path)
    require_writable(target)
    if _is_stream(target):
        _write_to_stream(target, write)
        return
    target = Path(os.path.realpath(target))
    descriptor, name = tempfile.mkstemp(
        prefix=f".{target.name}.", suffix=".part", dir=target.parent
    )
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        _give_default_permissions(temporary)
        _flush_to_disk(temporary)
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, name):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # no name of ours
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Refuse what cannot be written, before the work whose result would be lost.

    Raises:
        OSError: ``path`` is a folder, or its own folder is missing or not writable.
    """
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not folder.exists():
        number = errno.ENOENT
    elif not folder.is_dir():
        number = errno.ENOTDIR
    elif not os.access(target if _is_stream(target) else folder, os.W_OK):
        number = errno.EACCES
    else:
        return
    raise OSError(number, f"{os.strerror(number)}: {folder}", str(target))


def require_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be made or written to, before the work.

    Raises:
        OSError: ``path`` is a file, or it or what it would be made in is not writable.
    """
    place = target = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OSError(errno.ENOTDIR, f"{place} is a file, not a folder", str(target))
    if not os.access(place, os.W_OK):
        raise OSError(errno.EACCES, f"{os.strerror(errno.EACCES)}: {place}", str(target))


def refuse_inside(name: str, target: str | os.PathLike[str], data: str | os.PathLike[str]) -> None:
    """Refuse to write among the pictures: what lies there is taken for a part of the set.

    Raises:
        ValueError: ``target`` is in ``data`` or is it; the message begins with ``name``.
    """
    if Path(target).resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(f"{name}{str(target)!r}: lies in the pictures that are looked at")


def _is_stream(path: Path) -> bool:
    """Whether something there takes bytes and keeps none: renaming onto it would remove it."""
    folder = str(path.parent.resolve())
    of_process = folder == "/dev" or folder.startswith("/proc/")
    return path.exists() and (of_process or not path.is_file())


def _write_to_stream(target: Path, write: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, target.name)
        write(whole)
        try:
            with target.open("ab") as stream, whole.open("rb") as source:
                shutil.copyfileobj(source, stream)
        except OSError as error:
            if error.filename or isinstance(error, BrokenPipeError):  # a reader that has gone
                raise
            raise OSError(error.errno, error.strerror, str(target)) from error


def _give_default_permissions(path: Path) -> None:
    # mkstemp makes files for their owner only; reports and weights are meant to be shared.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 through :func:`write_atomically`."""
    write_atomically(path, lambda part: _write_all(part, text.encode("utf-8")))


def _write_all(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented, strict JSON (NaN is refused) through :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


_COMPUTED = ("=", "+", "-", "@", "\t", "\r")


def rows_to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV text; the columns are the keys of the first row.

    A text that a spreadsheet would compute gets a leading apostrophe.
    """
    if not rows:
        return ""
    buffer = io.StringIO()
    columns = list(rows[0])
    plain = csv.writer(buffer, lineterminator="\n")
    # Python's writer quotes a carriage return only where it ends lines itself.
    quoted = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL)
    plain.writerow(columns)
    for row in rows:
        cells = [_harmless(row[name]) for name in columns]
        strange = any(isinstance(cell, str) and "\r" in cell for cell in cells)
        (quoted if strange else plain).writerow(cells)
    return buffer.getvalue()


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_COMPUTED) else cell


_LEFTOVER = ".*.part"  # of a kill while a file was written
EVALUATION = "eval"
"""A report of a run lies in its folder, in ``eval-<part>/``."""


class RunFolder:
    """Paths and small files of one run. See the module's docstring for the list.

    Args:
        path: The folder; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.split = self.path / "split.json"
        self.state = self.path / "run.json"
        self.metrics = self.path / "metrics.csv"
        self.history = self.path / "history.json"
        self.best = self.path / "best.safetensors"
        self.last = self.path / "last.ckpt"
        self.tensorboard = self.path / "tensorboard"
        self._files = (self.best, self.last, self.split, self.state, self.metrics, self.history)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out of the folder while the block runs; makes the folder.

        Of the processes that share a training, only the first calls this.

        Raises:
            RunFolderError: Another process is in it; nothing was changed.
            OSError: The folder cannot be made.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path))
            except BlockingIOError:
                raise RunFolderError(
                    f"folder {str(self.path)!r} is in use by another process: wait for its end, or "
                    "choose another folder"
                ) from None
            yield

    def check_unused(self) -> None:
        """Check that no other process is in the folder.

        Raises:
            RunFolderError: One is.
        """
        if (self.path / LOCK).exists():
            with self.alone():
                pass

    def check_free(self, *, overwrite: bool = False) -> None:
        """Check that a new run may be put here; changes nothing.

        Args:
            overwrite: An earlier *run* that lies there may be deleted.

        Raises:
            RunFolderError: The folder is not empty (or not a run, with ``overwrite``).
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"out={str(self.path)!r} is a file, not a folder")
        if not self.path.is_dir() or all(item.name == LOCK for item in self.path.iterdir()):
            return
        if not overwrite:
            raise RunFolderError(
                f"out={str(self.path)!r} is not empty: choose another folder, continue the run in "
                "it with --resume, or start again with --overwrite"
            )
        if not self.holds_run():
            raise RunFolderError(
                f"out={str(self.path)!r} is not empty and holds no run (no config.json of one): "
                "refusing to delete it"
            )

    def holds_run(self) -> bool:
        """Whether ``config.json`` is one of a training, not of some other program."""
        try:
            config = json.loads(self.config.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(config, dict) and {"data", "fractions", "epochs"} <= config.keys()

    def delete(self) -> None:
        """Delete the run's own files, as :meth:`check_free` allows; what else lies there stays."""
        for path in self._files:
            path.unlink(missing_ok=True)
        for left in self.path.glob(_LEFTOVER):
            left.unlink(missing_ok=True)
        for folder in (self.tensorboard, *self.path.glob(f"{EVALUATION}-*")):
            shutil.rmtree(folder, ignore_errors=True)
        self.config.unlink(missing_ok=True)  # last: until then the folder is known as a run

    def others(self) -> list[str]:
        """Names of what lies in the folder and is no file of the run."""
        own = {LOCK, *(path.name for path in (*self._files, self.config, self.tensorboard))}
        found = sorted(self.path.iterdir()) if self.path.is_dir() else []
        return [
            path.name
            for path in found
            if path.name not in own
            and not path.name.startswith(f"{EVALUATION}-")
            and not path.match(_LEFTOVER)
        ]

    def create(self, *, overwrite: bool = False) -> None:
        """Make the empty folder for a new run, as :meth:`check_free` allows.

        Raises:
            RunFolderError: See :meth:`check_free`.
            OSError: The folder cannot be made or written.
        """
        self.check_free(overwrite=overwrite)
        self.delete()
        self.path.mkdir(parents=True, exist_ok=True)

    def require(self) -> None:
        """Check that a run lies here.

        Raises:
            RunFolderError: There is no folder, or no run in it.
        """
        if not self.path.is_dir():
            raise RunFolderError(f"run={str(self.path)!r} is not a folder")
        for needed in (self.config, self.split):
            if not needed.is_file():
                raise RunFolderError(
                    f"run={str(self.path)!r} holds no run: {needed.name} is missing"
                )

    def read_json(self, path: Path) -> Any:
        """Read one of the folder's JSON files.

        Raises:
            RunFolderError: The file is missing, unreadable or not JSON.
        """
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(
                f"run={str(self.path)!r}: cannot read {path.name}: {error}"
            ) from None

    def read_data(self) -> Path:
        """Where the run's pictures lay, of ``config.json``.

        Raises:
            RunFolderError: The file is damaged.
        """
        config = self.read_json(self.config)
        data = config.get("data") if isinstance(config, dict) else None
        if not isinstance(data, str) or not data:
            raise RunFolderError(
                f"run={str(self.path)!r}: config.json names no pictures (data={data!r}): say with "
                "--data where they lie"
            )
        return Path(data)

    def write_state(self, state: str, reason: str, epochs: int, best_epoch: int) -> None:
        """Write ``run.json``."""
        facts = {"state": state, "reason": reason, "epochs": epochs, "best_epoch": best_epoch}
        write_json(self.state, facts)

    def write_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows of all epochs so far to ``history.json`` and ``metrics.csv``."""
        write_json(self.history, list(rows))
        write_text(self.metrics, rows_to_csv(rows))

    def read_rows(self) -> list[dict[str, Any]]:
        """The rows of ``history.json``; empty before the first epoch has ended."""
        if not self.history.is_file():
            return []
        rows = self.read_json(self.history)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise RunFolderError(f"run={str(self.path)!r}: history.json is not a list of rows")
        return rows

    def finished_rows(self) -> list[dict[str, Any]]:
        """The rows of a finished run, even where ``last.ckpt`` is gone to save room; else none."""
        if not self.state.is_file() or not self.best.is_file():
            return []
        facts = self.read_json(self.state)
        finished = isinstance(facts, dict) and facts.get("state") == "finished"
        return self.read_rows() if finished else []
