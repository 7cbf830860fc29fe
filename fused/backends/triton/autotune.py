"""FUSED_TRITON_AUTOTUNE=1: times an op's block sizes on this GPU once, and keeps the winner.

What is timed is one whole call of an op, because candidates differ in grid and scratch sizes, which
the launchers take from the configuration. Winners are remembered by op, device and the shapes,
dtypes and layouts of all arguments, in memory and in a JSON file of the user's cache folder
(FUSED_TRITON_AUTOTUNE_CACHE names another). Another winner may sum in another order, so the last
bits can differ between machines; with the file they stay as they are on one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from . import configs, launch

FORMAT = 1
CACHE_VARIABLE = "FUSED_TRITON_AUTOTUNE_CACHE"

Call = Callable[..., object]
# None stands for the untuned choice, which takes each kernel's first candidate that fits.
Winner = int | None

_logger = logging.getLogger("fused")
_told: set[str] = set()
_lock = threading.RLock()
_winners: dict[str, Winner] | None = None


def run(op: str, call: Call, args: Sequence[object]) -> object:
    """Run `call(*args)`, the launcher of `op`, with the block sizes that are quickest here."""
    x = _largest(args)
    with _lock:
        # The interpreter's times say nothing, so a CPU keeps the untuned choice.
        winner = _winner(op, call, args, x) if x.device.type == "cuda" else None
        if winner is None:
            return call(*args)
        with configs.forced(winner):
            return call(*args)


def _winner(op: str, call: Call, args: Sequence[object], x: torch.Tensor) -> Winner:
    key = key_of(op, args, x)
    winners = _load()
    if key not in winners:
        if torch.cuda.is_current_stream_capturing():
            return None  # no clock runs while a graph is captured; a later call may tune
        with torch.cuda.device(x.device):
            winners[key] = tune(op, call, args, configs.shared_bytes(x.device))
        _save(key, winners[key])
    return winners[key]


def tune(
    op: str,
    call: Call,
    args: Sequence[object],
    room: int,
    timer: Callable[[Call], float] | None = None,
) -> Winner:
    """The quickest candidate of `op` for these arguments.

    Args:
        op: its name, for messages.
        call: its launcher.
        args: the launcher's arguments.
        room: shared memory in bytes that a block may ask for.
        timer: function → its time in any unit; by default Triton's clock, with a cold cache.

    Returns:
        The index for `configs.forced`, or None where the untuned choice is quickest or alone.
    """
    timer = _milliseconds if timer is None else timer
    used = _candidates_used(call, args)
    count = max((len(candidates) for candidates in used), default=1)
    if count == 1:
        return None
    times: dict[Winner, float] = {None: timer(lambda: call(*args))}
    for index in range(count):
        chosen = [candidates[index % len(candidates)] for candidates in used]
        if any(config.shared_bytes > room for config in chosen):
            continue
        try:
            with configs.forced(index):
                times[index] = timer(lambda: call(*args))
        except Exception as error:  # whatever the compiler or driver raises: the others remain
            _tell(f"autotune: {op}: candidate {index} does not run and is left out: {error}")
    best = min(times, key=times.__getitem__)
    _logger.info("autotune: %s: %s, taking %s", op, times, best)
    return best


def _candidates_used(call: Call, args: Sequence[object]) -> list[configs.Candidates]:
    """The rows of the table that a call's kernels were configured from."""
    taken: list[tuple[str, configs.Config]] = []

    def note(one: launch.Launch) -> None:
        taken.append((one.name, one.config))
        one.run()

    with launch.intercept(note):
        call(*args)
    return [
        candidates
        for (kernel, _), candidates in configs.TABLE.items()
        if any(kernel == name and config in candidates for name, config in taken)
    ]


def _milliseconds(call: Call) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


# -------------------------------------------------------------------------------------------- keys


def _tensors(args: Sequence[object]) -> Iterator[torch.Tensor]:
    for value in args:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _largest(args: Sequence[object]) -> torch.Tensor:
    return max(_tensors(args), key=torch.Tensor.numel)


def key_of(op: str, args: Sequence[object], x: torch.Tensor) -> str:
    """What a winner is remembered under: readable in front, all arguments in the digest behind."""
    told = [launch.dot_precision(x), *map(_signature, args)]
    digest = hashlib.sha256("; ".join(told).encode()).hexdigest()[:16]
    device = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else x.device.type
    shape = "x".join(map(str, x.shape))
    return f"{op} {device} {str(x.dtype).removeprefix('torch.')} {shape} {digest}"


def _signature(value: object) -> str:
    """What of an argument can change the best block sizes: never its values or addresses."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_signature, value)) + "]"
    return type(value).__name__ if isinstance(value, float) else repr(value)


# -------------------------------------------------------------------------------------------- file


def cache_file() -> Path:
    """Where winners are kept between processes."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    folder = Path(home) if home else Path.home() / ".cache"
    return folder / "mobilesteelnet" / "triton_autotune.json"


def _header() -> dict[str, Any]:
    """What a file must agree with: an index means nothing in another table."""
    table = repr(sorted(configs.TABLE.items())).encode()
    digest = hashlib.sha256(table).hexdigest()[:16]
    return {"format": FORMAT, "triton": triton.__version__, "table": digest}


def _read() -> dict[str, Winner]:
    """The file's winners; none, and a word in the log, if it cannot be read or understood."""
    try:
        path = cache_file()
        content = json.loads(path.read_text(encoding="utf-8"))
        entries: dict[str, Winner] = content["entries"]
        if {name: content[name] for name in ("format", "triton", "table")} != _header():
            return {}
        for key, winner in entries.items():
            if winner is not None and (not isinstance(winner, int) or winner < 0):
                raise ValueError(f"{key!r} has the winner {winner!r}")
        return dict(entries)
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        _tell(f"autotune: the cache cannot be read, winners are found anew: {error}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _tell(f"autotune: {path} is no cache of winners and is ignored: {error!r}")
    return {}


def _load() -> dict[str, Winner]:
    global _winners
    if _winners is None:
        _winners = _read()
    return _winners


def _save(key: str, winner: Winner) -> None:
    """Add one winner to the file, whatever other processes added in between."""
    try:
        path = cache_file()
        entries = _read() | {key: winner}
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({**_header(), "entries": entries}, file, indent=1)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
    except (OSError, RuntimeError) as error:
        where = f"{CACHE_VARIABLE} names another file; {type(error).__name__}"
        _tell(f"autotune: winners are not kept, the cache cannot be written ({where})")


def forget() -> None:
    """Drop the winners in memory and what was told; the file stays."""
    global _winners
    with _lock:
        _winners = None
        _told.clear()


def _tell(message: str) -> None:
    if message not in _told:
        _told.add(message)
        _logger.warning("%s", message)
