"""Peak memory of a call, and the bytes that autograd keeps."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def _settle() -> None:
    """Give freed memory back, or a call that reuses it would look free of charge."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_of(call: Callable[[], object], before: Callable[[], object] | None = None) -> int | None:
    """Growth of resident memory to its peak during `call`, in bytes.

    The kernel's own peak counter is reset for it (Linux, /proc/self/clear_refs), so allocations of
    every library count.

    Args:
        call: runs whatever the result.
        before: runs first; what it keeps counts too, its own peak does not.

    Returns:
        None where the counter cannot be reset.
    """
    _settle()
    try:
        start = _resident("VmRSS")
    except OSError:
        start = None
    if before is not None:
        before()
        _settle()
    try:
        _CLEAR.write_text("5")
    except OSError:
        start = None
    call()
    return None if start is None else max(_resident("VmHWM") - start, 0)


def saved_bytes(forward: Callable[[], object], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the different storages that autograd keeps of `forward`, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del out
    return total
