"""Peak memory of a call, and the bytes that autograd keeps.

`python -m benchmarks.memory` prints the peaks of forwards, each provider in a process of its own:
what the C library keeps of earlier calls would hide what a later one takes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import subprocess
import sys
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


def _measure(subject: str, shape: str, provider: str, calls: int) -> str:
    """A line of the peaks of some calls after the first, in MB."""
    from .measure import Steps, case_of
    from .stages import FORWARD
    from .turns import BY_NAME

    case = case_of(subject, shape)
    found = BY_NAME[provider]
    reason = found.why_not(case, FORWARD)
    if reason is not None:
        return f"{provider}: {reason}"
    steps = Steps(found.build(case, FORWARD, torch.get_num_threads()), case, FORWARD)
    steps.once()
    peaks = [steps.peak() for _ in range(calls)]
    told = "  ".join("unknown" if peak is None else f"{peak / 1e6:.1f}" for peak in peaks)
    return f"{subject} {case.size} {provider}: {told} MB"


def main() -> int:
    """Print the peaks; the exit status."""
    from .stages import SHAPES, SUBJECTS
    from .turns import BY_NAME

    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--subject", default="network", choices=SUBJECTS)
    parser.add_argument("--shape", default="paper", choices=list(SHAPES))
    parser.add_argument("--calls", type=int, default=3, help="measured, after one that is not")
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=list(BY_NAME),
        default=["published", "fused-auto", "fused-frozen", "fused-frozen-bf16"],
    )
    options = parser.parse_args()
    if options.calls < 1:
        parser.error("--calls must be at least 1")
    if len(options.providers) == 1:
        print(_measure(options.subject, options.shape, options.providers[0], options.calls))
        return 0
    given = ["--subject", options.subject, "--shape", options.shape, "--calls", str(options.calls)]
    for provider in options.providers:
        command = [sys.executable, "-m", "benchmarks.memory", *given, "--providers", provider]
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
