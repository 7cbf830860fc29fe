"""One process at a time in a folder: a lock that ends with its process, however that ends.

The lock is the system's, on the file ``.mobilesteelnet.lock`` in the folder, which is deleted
afterwards. What a kill leaves of it locks nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

LOCK = ".mobilesteelnet.lock"

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        # lockf, not flock: reading processes are forks, and would keep a flock after a kill.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


_TAKEN = (errno.EACCES, errno.EAGAIN)
# The system lets a process lock again what it has locked, and would then unlock it too early.
_held: set[str] = set()


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a folder, which must exist, while the block runs.

    Raises:
        BlockingIOError: Another process holds it, or another part of this one.
    """
    path = Path(os.path.realpath(folder), LOCK)
    if str(path) in _held:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
    _held.add(str(path))
    try:
        descriptor = _acquire(path)
        try:
            yield
        finally:
            if descriptor is not None:
                # Deleted while it is held, so that nobody locks it in between; Windows keeps it.
                with contextlib.suppress(OSError):
                    path.unlink()
                os.close(descriptor)
    finally:
        _held.discard(str(path))


def _acquire(path: Path) -> int | None:
    """The open, locked file; None where there can be no lock."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None  # nothing can be written there: who tries to will be told
        try:
            _lock(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _TAKEN:
                raise BlockingIOError(error.errno, error.strerror, str(path)) from None
            return None  # a file system without locks: a run without one is better than none
        if _is_there(descriptor, path):
            return descriptor
        os.close(descriptor)  # it was deleted by its last holder: others lock the next one


def _is_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
