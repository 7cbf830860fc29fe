"""What the fused layers share: when a block may use its children's parameters without a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import backends
from .backends.reference.published import PublishedCIEMA


def _leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        yield f"{prefix}{name}", child
        yield from _leaves(child, f"{prefix}{name}.")


def has_hooks(module: nn.Module) -> bool:
    """Whether someone wants to see what goes in or comes out of `module`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


_PLAIN = (
    *(nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm, nn.ReLU, nn.Sigmoid, nn.Sequential),
)


def why_called(module: nn.Module, also: tuple[type, ...] = ()) -> str | None:
    """Why the descendants of `module` must be called one by one; None if their parameters suffice.

    `also` are further kinds that only hold others.
    """
    training: bool | None = None
    for name, child in _leaves(module):
        kind = type(child)
        if kind not in (*_PLAIN, *also) and kind.__module__ != PublishedCIEMA.__module__:
            return f"{name} is a {kind.__name__}"
        if has_hooks(child):
            return f"{name} has hooks"
        if kind is nn.GroupNorm and not child.affine:
            return f"{name} has affine=False"
        if kind is nn.BatchNorm2d:
            if not child.affine:
                return f"{name} has affine=False"
            if not child.track_running_stats or child.running_mean is None:
                return f"{name} has track_running_stats=False"
            if training is not None and child.training != training:
                return "some batch norms are in training mode and others are not"
            training = child.training
    return None


class FusedBlock(nn.Module):
    """What both blocks share: the backend's name, and the test for children that need calling."""

    backend: str | None
    fused_stages: tuple[str, ...] = ()

    def _set_backend(self, backend: str | None) -> None:
        self.backend = None if backend is None else backends.check_name(backend)

    def modular_reason(self) -> str | None:
        """Why this block must call its children one by one; None if its parameters suffice."""
        return why_called(self)

    def _frozen_as(self, kind: Any, dtype: torch.dtype | None) -> nn.Module | str:
        """`frozen_for_inference` of both blocks."""
        if has_hooks(self):
            return "it has hooks"
        if type(self) not in kind.__mro__:
            return f"{type(self).__name__} is a subclass, whose own methods would be lost"
        return why_called(self) or kind.of(self, dtype)

    def probe(self) -> torch.Tensor:
        """A map of one pixel with the block's channels, dtype and device, for `explain`."""
        raise TypeError(f"{type(self).__name__} does not define its input")

    def _goes_modular(self) -> bool:
        reason = self.modular_reason()
        if reason is None:
            return False
        name = backends.requested(self.backend)
        if name not in (backends.AUTO, "reference"):
            raise backends.BackendError(
                f"backend={name!r} cannot run {type(self).__name__}: {reason}, so its children "
                "have to be called; use backend='auto' or 'reference'"
            )
        return True
