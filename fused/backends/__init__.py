"""The registry of backends: who can run which op on which input, who is chosen, and why.

Precedence of a choice: the call's argument, the module's attribute, `set_backend()`, the
environment variable FUSED_BACKEND (read once, at import), "auto".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..contract import STAGES
from . import cpu, cuda, reference, triton
from .backend import Backend, BackendError

__all__ = [
    "AUTO",
    "BACKENDS",
    "Backend",
    "BackendError",
    "Explanation",
    "choose",
    "explain",
    "requested",
    "set_backend",
]

AUTO = "auto"
REFERENCE = Backend("reference", reference.KERNELS, reference.can_run)
# The order in which "auto" asks; the reference runs everything, so it comes last.
_ORDER = (cuda.BACKEND, triton.BACKEND, cpu.BACKEND, REFERENCE)
BACKENDS: Mapping[str, Backend] = {b.name: b for b in _ORDER}

_logger = logging.getLogger("fused")
_told: set[tuple[str, str, str]] = set()


_default = os.environ.get("FUSED_BACKEND", AUTO)


def check_name(name: str, source: str = "backend") -> str:
    """Return a backend's name or "auto"; raise BackendError for any other, naming its source."""
    if name != AUTO and name not in BACKENDS:
        raise BackendError(f"{source}={name!r} is unknown, known are {[AUTO, *BACKENDS]}")
    return name


def set_backend(name: str | None) -> None:
    """Choose the backend of every call and module that names none; None returns to "auto".

    Raises:
        BackendError: the name is unknown.
    """
    global _default
    _default = AUTO if name is None else check_name(name)


def requested(backend: str | None) -> str:
    """The name that counts: a call's or module's own, else the default; may be "auto".

    Raises:
        BackendError: the default counts, and the environment names an unknown one.
    """
    # What set_backend() was given is known; asked for here, an import never fails.
    return check_name(_default, "FUSED_BACKEND") if backend is None else backend


def choose(op: str, x: torch.Tensor, backend: str = AUTO, groups: int | None = None) -> Backend:
    """The backend that runs `op` on the main input `x`, cut into `groups` where the stage does so.

    Raises:
        BackendError: `backend` is unknown, or named and unable; the message holds the reason.
    """
    if check_name(backend) != AUTO:
        chosen = BACKENDS[backend]
        reason = chosen.why_not(op, x, groups)
        if reason is not None:
            raise BackendError(f"backend={backend!r} cannot run {op}: {reason}")
        return chosen
    for candidate in BACKENDS.values():
        reason = candidate.why_not(op, x, groups, auto=True)
        if reason is None:
            return candidate
        if (op, candidate.name, reason) not in _told:
            _told.add((op, candidate.name, reason))
            _logger.info("auto: %s does not run %s: %s", candidate.name, op, reason)
    raise BackendError(f"no backend can run {op}")  # the reference can, unless it was removed


# -------------------------------------------------------------------------------------- explain


@dataclass(frozen=True)
class Line:
    """One row of an explanation.

    Attributes:
        block: name of the module inside the model, empty for the module itself or a tensor.
        stage: the paper's stage.
        backend: name.
        runs: whether it can run the stage on this input.
        chosen: whether it is the one that runs.
        reason: why not, or why it was chosen.
    """

    block: str
    stage: str
    backend: str
    runs: bool
    chosen: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What runs where and why; `print` it, or read `lines`."""

    lines: list[Line] = field(default_factory=list)

    def chosen(self) -> dict[tuple[str, str], str]:
        """(block, stage) → the backend that runs it."""
        return {(line.block, line.stage): line.backend for line in self.lines if line.chosen}

    def __str__(self) -> str:
        rows = [("stage", "backend", "runs?", "why")]
        for line in self.lines:
            stage = f"{line.block}.{line.stage}" if line.block else line.stage
            runs = "chosen" if line.chosen else ("yes" if line.runs else "no")
            rows.append((stage, line.backend, runs, line.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        )


def _explain_stage(
    block: str, stage: str, x: torch.Tensor, backend: str, groups: int | None = None
) -> list[Line]:
    lines = []
    free = backend == AUTO
    for candidate in BACKENDS.values():
        reason = candidate.why_not(stage, x, groups, auto=backend == AUTO)
        chosen = reason is None and (free or candidate.name == backend)
        why = reason or ("first that can run, in the order of auto" if free else "asked for")
        if reason is None and not chosen:
            why = "can run, but another is asked for or comes first"
        free = free and not chosen
        lines.append(Line(block, stage, candidate.name, reason is None, chosen, why))
    return lines


def explain(subject: torch.Tensor | nn.Module) -> Explanation:
    """Say which backend runs each stage, and why the others do not.

    Args:
        subject: a map (B, C, H, W) as CIEMA would get it, or a module that is or holds
            FusedCIEMA or FusedMSFF blocks.

    Raises:
        TypeError: neither a tensor nor a module.
        ValueError: a module without such blocks.
    """
    if isinstance(subject, torch.Tensor):
        name = requested(None)
        return Explanation(
            [line for stage in STAGES for line in _explain_stage("", stage, subject, name)]
        )
    if not isinstance(subject, nn.Module):
        raise TypeError(f"explain: expected a tensor or a module, got {type(subject).__name__}")
    lines: list[Line] = []
    for block, module in subject.named_modules():
        # Of the class: a compiled module passes on what the module inside has.
        stages: tuple[str, ...] = getattr(type(module), "fused_stages", ())
        if not stages:
            continue
        reason, name = module.modular_reason(), requested(module.backend)
        if reason is not None:
            refusal = module.refusal(reason)
            runs, why = refusal is None, refusal or f"runs child by child, because {reason}"
            asked = "reference" if name == AUTO else name
            lines += [Line(block, stage, asked, runs, runs, why) for stage in stages]
            continue
        x = module.probe()
        groups = getattr(module, "groups", None)
        found = [line for stage in stages for line in _explain_stage(block, stage, x, name, groups)]
        note = getattr(module, "frozen_note", None)
        if note is not None:
            found = [
                replace(line, reason=note(line.stage, line.backend)) if line.chosen else line
                for line in found
            ]
        lines += found
    if not lines:
        kind = type(subject).__name__
        raise ValueError(f"explain: {kind} holds no FusedCIEMA or FusedMSFF block; see fused.fuse")
    return Explanation(lines)
