"""What a backend is: a name, its kernels, and an honest answer to "can you run this?"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


class BackendError(RuntimeError):
    """An explicitly requested backend is unknown or cannot run what was asked of it."""


@dataclass(frozen=True)
class Backend:
    """One way to run the ops.

    Attributes:
        name: as users write it in `backend=`.
        kernels: op name, as `channel_interaction` or `channel_interaction_backward`, to the
            function that runs it; arguments as in the op's schema, without `backend`.
        can_run: (op name, the stage's main input) → None, or the reason why not, in words.
        takes_groups: (op name, main input, G), asked where a stage cuts its map into groups → None,
            or why it cannot run this many.
        passed_over: (op name, main input) → None, or why "auto" does not take it although it can
            run.
    """

    name: str
    kernels: Mapping[str, Callable[..., object]]
    can_run: Callable[[str, torch.Tensor], str | None]
    takes_groups: Callable[[str, torch.Tensor, int], str | None] = lambda op, x, groups: None
    passed_over: Callable[[str, torch.Tensor], str | None] = lambda op, x: None

    def why_not(
        self, op: str, x: torch.Tensor, groups: int | None = None, *, auto: bool = False
    ) -> str | None:
        """None if this backend can run `op` on `x`, else the reason; `auto`: and may be taken."""
        reason = self.can_run(op, x)
        if reason is None and groups is not None:
            reason = self.takes_groups(op, x, groups)
        if reason is None and auto:
            reason = self.passed_over(op, x)
        if reason is None and op not in self.kernels:
            return f"no {self.name} kernel for {op}"
        return reason
