"""What the fused layers share: when a block may use its children's parameters without a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from . import backends
from .registration import autocast_dtype


def hooks_of(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """The hooks that see what goes in or comes out of `module`, by kind."""
    return (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether someone wants to see what goes in or comes out of `module`."""
    return any(hooks_of(module))


def own_call(module: nn.Module) -> str | None:
    """What makes a call of `module` more than its class's forward; None if nothing does."""
    if has_hooks(module):
        return "has hooks"
    return "has a forward of its own" if "forward" in vars(module) else None


# What decides a child's function beside its parameters and buffers; eps and momentum are asked for.
_SETTINGS: dict[type, tuple[str, ...]] = {
    nn.Conv2d: ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    nn.GroupNorm: ("affine",),
    nn.BatchNorm2d: ("affine", "track_running_stats"),
}
_NORMS = (nn.GroupNorm, nn.BatchNorm2d)


class Part(NamedTuple):
    """A descendant as its parent's maths needs it, for `why_called`.

    Attributes:
        name: with dots, from the outermost module.
        parent: index of the part that holds it, counted from 1; 0 is the outermost module.
        key: its name in the parent.
        kind: its exact type.
        settings: attributes and their values.
        bias: whether it has one; None for a kind that cannot choose.
        children: their names, in order.
    """

    name: str
    parent: int
    key: str
    kind: type
    settings: tuple[tuple[str, Any], ...]
    bias: bool | None
    children: tuple[str, ...]


def parts_of(template: nn.Module) -> tuple[Part, ...]:
    """The descendants of a freshly built module, parents before children."""
    modules = dict(template.named_modules())
    index = {name: i for i, name in enumerate(modules)}
    parts = []
    for name, module in list(modules.items())[1:]:
        parent, _, key = name.rpartition(".")
        settings = tuple((what, getattr(module, what)) for what in _SETTINGS.get(type(module), ()))
        bias = _has(module, "bias") if isinstance(module, (nn.Conv2d, nn.Linear)) else None
        children = tuple(child for child, _ in module.named_children())
        parts.append(Part(name, index[parent], key, type(module), settings, bias, children))
    return tuple(parts)


def _has(module: nn.Module, parameter: str) -> bool:
    # A plain tensor may stand in a parameter's place.
    held = module._parameters.get(parameter)
    return held is not None or module.__dict__.get(parameter) is not None


def _difference(module: nn.Module, part: Part) -> str | None:
    """What makes `module` compute something else than `part`, or be seen computing it."""
    if type(module) is not part.kind:
        return f"is a {type(module).__name__}"
    own = own_call(module)
    if own is not None:
        return own
    for what, value in part.settings:
        found = getattr(module, what)
        if found != value:
            return f"has {what}={found!r}"
    kind = part.kind
    if part.bias is not None and _has(module, "bias") != part.bias:
        return "has no bias" if part.bias else "has a bias"
    if kind in _NORMS:
        for name in ("weight", "bias"):
            if not _has(module, name):
                return f"has no {name}"
    if kind is nn.Sequential and tuple(module._modules) != part.children:
        return f"has the children {list(module._modules)}, not {list(part.children)}"
    if kind is nn.BatchNorm2d and module.running_mean is None:
        return "has no running_mean"
    if kind is nn.GroupNorm and module.num_groups != module.num_channels:
        return f"has num_groups={module.num_groups} for {module.num_channels} channels"
    return None


def why_called(module: nn.Module, parts: tuple[Part, ...]) -> str | None:
    """Why the descendants of `module` must be called one by one; None if their parameters suffice.

    `parts` are those of the published form. A child that was taken out, None, is not missed.
    """
    training: bool | None = None
    found: list[nn.Module | None] = [module]
    for part in parts:
        parent = found[part.parent]
        child = None if parent is None else parent._modules.get(part.key)
        found.append(child)
        if child is None:
            continue
        difference = _difference(child, part)
        if difference is not None:
            return f"{part.name} {difference}"
        if part.kind is nn.BatchNorm2d:
            if training is not None and child.training != training:
                return "some batch norms are in training mode and others are not"
            training = child.training
    return None


def is_cast(x: torch.Tensor) -> bool:
    """Whether the ops would take `x` in another dtype, that of an autocast."""
    dtype = autocast_dtype(x.device.type)
    return dtype is not None and x.dtype not in (dtype, torch.float64)


def in_autocast_dtype(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A result of children called one by one, in the dtype that the ops would give it for `x`."""
    dtype = autocast_dtype(x.device.type)
    return out if dtype is None or x.dtype == torch.float64 else out.to(dtype)


class FusedBlock(nn.Module):
    """What both blocks share: the backend's name, and the test for children that need calling."""

    backend: str | None
    fused_stages: tuple[str, ...] = ()
    published_parts: tuple[Part, ...]

    def _set_backend(self, backend: str | None) -> None:
        self.backend = None if backend is None else backends.check_name(backend)

    def modular_reason(self) -> str | None:
        """Why this block must call its children one by one; None if its parameters suffice."""
        return why_called(self, self.published_parts)

    def _frozen_as(self, kind: Any, dtype: torch.dtype | None) -> nn.Module | str:
        """`frozen_for_inference` of both blocks."""
        own = own_call(self)
        if own is not None:
            return f"it {own}"
        if type(self) not in kind.__mro__:
            return f"{type(self).__name__} is a subclass, whose own methods would be lost"
        return self.modular_reason() or kind.of(self, dtype)

    def probe(self) -> torch.Tensor:
        """A map of one pixel with the block's channels, dtype and device, for `explain`."""
        raise TypeError(f"{type(self).__name__} does not define its input")

    def refusal(self, reason: str) -> str | None:
        """Why this block does not call its children although, for that reason, it would have to."""
        name = backends.requested(self.backend)
        if name in (backends.AUTO, "reference"):
            return None
        return (
            f"backend={name!r} cannot run {type(self).__name__}: {reason}, so its children "
            "have to be called; use backend='auto' or 'reference'"
        )

    def _goes_modular(self) -> bool:
        reason = self.modular_reason()
        if reason is None:
            return False
        refusal = self.refusal(reason)
        if refusal is not None:
            raise backends.BackendError(refusal)
        return True
