"""How the program's process treats memory that was freed: it keeps it."""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt's parameters (malloc.h) and the variables by which a user sets them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_MOST = 2**31 - 1
# glibc before 2.35 takes no threshold above half an arena (32 MB on 64 bits).
_LARGE = (1 << 30, 1 << 25)


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed instead of giving it back to the system.

    Maps of a training step are tens of megabytes. Given back and taken anew in every step, their
    pages are zeroed and mapped one by one: an eighth to a sixth of a step's time on a CPU. For a
    process of one's own only: it keeps its peak of memory until it ends.

    Returns:
        Whether it was done: not on other systems and libraries, nor where the user has set
        glibc's own variables.
    """
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in _BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Setting either alone ends glibc's own raising of the other, which would be worse than nothing.
    if not any(mallopt(_MMAP_THRESHOLD, large) == 1 for large in _LARGE):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _MOST) == 1)
