"""The frozen blocks: the same children and keys, what is derived from them made once.

A frozen module keeps its weights, so that its state dict is that of the module it came from, and
derives a plan from them: folded and packed weights in the layout of this machine. The plan is not
saved; it is made again when a weight or a child has changed (loading, moving) and after unpickling.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.nn import functional as F

from . import backends, folding
from .backends.cpu_packed import PackedCIEMA, PackedMSFF
from .contract import memory_format, product_dtype, statistics_dtype
from .fused_block import hooks_of
from .modules import FusedCIEMA, FusedMSFF, Statistics
from .registration import autocast_dtype, has_tangent

PACKED = "frozen: weights folded and packed once"
AS_BEFORE = "frozen, but this stage runs as in the unfrozen block"


class FrozenError(RuntimeError):
    """A frozen module was asked to train, to be differentiated, exported or converted."""


def refuse_training(what: str) -> NoReturn:
    """Raise the one error that tells how to train after all."""
    raise FrozenError(
        f"{what}: this is a frozen copy for inference (fused.optimize_for_inference), it cannot "
        "be trained or differentiated; train the model it was made from and freeze that again"
    )


class _Watched(NamedTuple):
    """What tells that a plan is no longer that of its module; looked at in every call.

    The module itself is handed in: held here, it would hold itself, and outlive its last user.
    """

    # Modules are asked for what they hold in each call: an export puts other dictionaries in.
    owners: list[nn.Module]  # of parameters and buffers, among the descendants
    parents: list[nn.Module]
    hooks: list[Mapping[int, Any]]
    eps: list[nn.Module]  # plans are made with it
    descendants: list[nn.Module]  # kept, so that no other child gets the identity of one gone

    @staticmethod
    def of(module: nn.Module) -> _Watched:
        rest = list(module.modules())[1:]
        return _Watched(
            [m for m in rest if m._parameters or m._buffers],
            [m for m in rest if m._modules],
            [hooks for m in rest for hooks in hooks_of(m)],
            [m for m in rest if hasattr(m, "eps")],
            rest,
        )

    def parameters(self, module: nn.Module) -> Iterator[torch.Tensor]:
        return (p for m in (module, *self.owners) for p in m._parameters.values() if p is not None)

    def weights(self, module: nn.Module) -> list[torch.Tensor]:
        return [
            t
            for m in (module, *self.owners)
            for t in (*m._parameters.values(), *m._buffers.values())
            if t is not None
        ]

    def key(self, module: nn.Module, weights: list[torch.Tensor]) -> tuple[Any, ...]:
        """What changes with a weight's value, place or identity, a child's, an eps, a call's."""
        values = tuple(
            (id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in weights
        )
        parents = (module, *self.parents)
        children = tuple(id(child) for m in parents for child in m._modules.values())
        numbers = (getattr(module, "groups", None), *(m.eps for m in self.eps))
        watched = any(self.hooks) or any("forward" in vars(m) for m in self.descendants)
        return values, children, numbers, watched


class _Made(NamedTuple):
    key: tuple[Any, ...]
    plan: Any
    watched: _Watched
    # Weights and their memory, kept so that no other weight gets the identity of one gone.
    weights: list[tuple[torch.Tensor, torch.Tensor]]


class Frozen(nn.Module):
    """What all frozen modules share; put it before the class that is frozen.

    Maps inside are of `map_dtype`. Inputs may be of any floating dtype, outputs are of the
    input's. A subclass makes its plan in `_make_plan` and asks for it with `_plan`.
    """

    map_dtype: torch.dtype
    _made: _Made | None = None

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype | None) -> Any:
        """Freeze `module`, a private copy in evaluation mode, whose children are taken over."""
        own = next(module.parameters()).dtype
        dtype = own if dtype is None else dtype
        if own not in (dtype, statistics_dtype(dtype)):
            module.to(statistics_dtype(dtype))
        frozen = cls.__new__(cls)
        frozen.__dict__.update(module.__dict__)
        for parameter in frozen.parameters():
            parameter.requires_grad = False
        frozen.map_dtype = dtype
        frozen._made = None
        frozen._checked()
        return frozen

    # ------------------------------------------------------------------------------- the plan

    def _make_plan(self) -> Any:
        """What is derived from the weights."""
        raise TypeError(f"{type(self).__name__} does not say what it derives from its weights")

    def _requested(self) -> str | None:
        """The backend that this module was built with."""
        return getattr(self, "backend", None)

    def _runs_on_cpu(self, x: torch.Tensor, groups: int | None) -> bool:
        """Whether the registry gives every stage of this block to the native CPU kernels."""
        name = backends.requested(self._requested())
        stages: tuple[str, ...] = getattr(self, "fused_stages", ())
        return all(backends.choose(s, x, name, groups).name == "cpu" for s in stages)

    def _checked(self) -> _Made:
        """What was made, made anew if it is no longer this module's."""
        # One assignment of key and plan together: two threads may both make it, none sees half.
        made = self._made
        name = backends.requested(self._requested())
        if made is None or made.key != (name, self._key(made.watched)):
            reason = self._why_not_followed()
            if reason is not None:
                raise FrozenError(self.refusal(reason))
            watched = _Watched.of(self)
            weights = watched.weights(self)
            key, device = (name, watched.key(self, weights)), next(self.parameters()).device.type
            with torch.inference_mode(False), torch.no_grad(), _without_autocast([device]):
                kept = [(t, t.detach()) for t in weights]
                self._made = made = _Made(key, self._make_plan(), watched, kept)
        return made

    def _key(self, watched: _Watched) -> tuple[Any, ...]:
        return watched.key(self, watched.weights(self))

    def _plan(self) -> Any:
        """The plan, for a method behind `guarded`, which has checked it."""
        made = self._made
        return (self._checked() if made is None else made).plan

    def _why_not_followed(self) -> str | None:
        """What about the children no plan can hold; None if there is nothing."""
        return None

    def refusal(self, reason: str) -> str:
        """The error of a call for that reason."""
        return (
            f"{type(self).__name__}: {reason}, which weights packed once cannot follow; change the "
            "model it was made from and freeze that again"
        )

    def _load_from_state_dict(self, *args: Any, **named: Any) -> None:
        self._made = None  # weights made in inference mode do not show that they were written to
        super()._load_from_state_dict(*args, **named)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the plan, which another machine would lay out differently."""
        return {**self.__dict__, "_made": None}

    # ------------------------------------------------------------------------------ what it refuses

    def train(self, mode: bool = True) -> Any:
        """Refuse training mode."""
        if mode:
            refuse_training(f"{type(self).__name__}.train()")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Refuse gradients."""
        if requires_grad:
            refuse_training(f"{type(self).__name__}.requires_grad_()")
        return super().requires_grad_(False)

    def check_conversion(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Refuse what `.to`, `.half`, ... would do to every tensor, if it changes dtypes."""
        own = next(self.parameters())
        if fn(own.new_empty(0)).dtype != own.dtype:
            raise FrozenError(
                f"{type(self).__name__} cannot change its dtype; convert the model it was made "
                "from, or name one: fused.optimize_for_inference(model, dtype=...)"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.check_conversion(fn)
        return super()._apply(fn, recurse)

    def guard(self, *inputs: object) -> None:
        """Refuse a call that asks for gradients, or that would be traced for export."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise FrozenError(
                f"{type(self).__name__} holds weights laid out for this machine and cannot be "
                "exported; export the model it was made from"
            )
        if has_tangent(*inputs):
            refuse_training("an input has a tangent")
        watched = self._checked().watched
        if not torch.is_grad_enabled():
            return
        if any(getattr(x, "requires_grad", False) for x in inputs):
            refuse_training("an input requires grad")
        if any(p.requires_grad for p in watched.parameters(self)):
            refuse_training("a parameter requires grad")


@contextlib.contextmanager
def _without_autocast(devices: Iterable[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in devices:
            if autocast_dtype(device) is not None:
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """A public method of a map or list: guarded, untraced, without gradients and autocast."""
    first = list(inspect.signature(method).parameters)[1]

    @torch.compiler.disable
    @functools.wraps(method)
    def call(self: Frozen, *args: Any, **named: Any) -> Any:
        if not args and first not in named:
            return method(self, **named)  # Python says what is missing
        x, *rest = args or (named.pop(first),)
        if not isinstance(x, torch.Tensor) and isinstance(x, Iterable):
            x = list(x)  # looked at here and used there
        inputs = x if isinstance(x, list) else (x,)
        self.guard(*inputs)
        devices = {one.device.type for one in inputs if isinstance(one, torch.Tensor)}
        with torch.no_grad(), _without_autocast(devices):
            return method(self, x, *rest, **named)

    return call


# ------------------------------------------------------------------------------------------ blocks


class FrozenCIEMA(Frozen, FusedCIEMA):
    """CIEMA, frozen: see `fused.optimize_for_inference`."""

    def _make_plan(self) -> PackedCIEMA | folding.Fusion:
        probe = self.probe()
        if self._runs_on_cpu(probe, self.groups):
            return PackedCIEMA(self, probe)
        return folding.fold_fusion(self).to(product_dtype(probe))

    @guarded
    def forward(self, x: torch.Tensor, statistics: Statistics | None = None) -> torch.Tensor:
        """(B, C, H, W) → (B, C, H, W), of x's dtype; `statistics` are found anew."""
        plan = self._plan()
        e = self._first_stage(plan, x)
        return self._out(plan, e, self._gate(plan, e)).to(x.dtype)

    @guarded
    def spatial_gate(self, x: torch.Tensor) -> torch.Tensor:
        """The gate w (B, G, H, W) in (0, 1) that this block draws over x."""
        plan = self._plan()
        return self._gate(plan, self._first_stage(plan, x)).to(x.dtype)

    @guarded
    def interact(self, x: torch.Tensor, statistics: Statistics | None = None) -> torch.Tensor:
        """x → e of channel interaction, for `mean_after`; `statistics` are found anew."""
        return self._first_stage(self._plan(), x)

    @guarded
    def mean_after(self, e: torch.Tensor) -> torch.Tensor:
        """The mean of `forward(x)` over H×W, (B, C) in float32 or better, from `interact(x)`."""
        self._check_channels(e)
        plan = self._plan()
        w = self._gate(plan, e)
        if isinstance(plan, PackedCIEMA):
            return plan.fuse(e, w, mean_only=True)
        out = self._out(plan, e, w)
        return out.mean((2, 3), dtype=statistics_dtype(out.dtype))

    def _first_stage(self, plan: PackedCIEMA | folding.Fusion, x: torch.Tensor) -> torch.Tensor:
        self._check_channels(x)
        x = x.to(self.map_dtype)
        return plan.interact(x) if isinstance(plan, PackedCIEMA) else self._interact(x)

    def _gate(self, plan: PackedCIEMA | folding.Fusion, e: torch.Tensor) -> torch.Tensor:
        return plan.gate(e) if isinstance(plan, PackedCIEMA) else self._cross(e, update=False)

    def _out(
        self, plan: PackedCIEMA | folding.Fusion, e: torch.Tensor, w: torch.Tensor
    ) -> torch.Tensor:
        if isinstance(plan, PackedCIEMA):
            return plan.fuse(e, w, mean_only=False)
        name = backends.requested(self.backend)
        if backends.choose("gated_fusion", e, name, self.groups).name != "reference":
            return self._fuse(e, w)
        return run_fusion(plan, e, w)

    def _why_not_followed(self) -> str | None:
        return self.modular_reason()

    def probe(self) -> torch.Tensor:
        """A map of one pixel with the block's channels, maps' dtype and device, for `explain`."""
        return super().probe().to(self.map_dtype)

    def frozen_note(self, stage: str, backend: str) -> str:
        """What the frozen form does in a stage that runs on `backend`, for `explain`."""
        if isinstance(self._checked().plan, PackedCIEMA):
            return PACKED
        if stage == "gated_fusion" and backend == "reference":
            return "frozen: norms and second product folded once"
        return AS_BEFORE


class FrozenMSFF(Frozen, FusedMSFF):
    """MSFF, frozen: see `fused.optimize_for_inference`."""

    def _make_plan(self) -> PackedMSFF | None:
        probe = self.probe()
        return PackedMSFF(self, probe) if self._runs_on_cpu(probe, None) else None

    def _why_not_followed(self) -> str | None:
        return self.modular_reason()

    @guarded
    def forward(self, features: Iterable[torch.Tensor]) -> torch.Tensor:
        """Maps (B, C_i, H_i, W_i) → (B, C_out, max H_i, max W_i), in the first map's format."""
        given = self._checked_maps(features)
        plan, maps = self._plan(), [f.to(self.map_dtype) for f in given]
        out: torch.Tensor = super().forward(maps) if plan is None else plan(maps)
        return out.to(given[0].dtype)

    def with_statistics(self, features: Iterable[torch.Tensor]) -> tuple[torch.Tensor, None]:
        """As `forward`; what the unfrozen form finds out beside, the frozen CIEMA finds anew."""
        return self.forward(features), None

    def probe(self) -> torch.Tensor:
        """A map of one pixel with the block's channels, maps' dtype and device, for `explain`."""
        return super().probe().to(self.map_dtype)

    def frozen_note(self, stage: str, backend: str) -> str:
        """What the frozen form does in a stage that runs on `backend`, for `explain`."""
        return AS_BEFORE if self._checked().plan is None else PACKED


def run_fusion(fusion: folding.Fusion, e: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Gated fusion in plain PyTorch with folded products: e (B, C, H, W), w (B, G, H, W) → out."""
    slabs = e.unflatten(1, (w.shape[1], -1))
    s = (slabs * w[:, :, None]).to(product_dtype(e)).reshape(e.shape)
    r = F.conv2d(s, *fusion.squeeze).relu()
    logits = F.conv2d(s, fusion.of_s[:, :, None, None], fusion.bias)
    phi = (logits + F.conv2d(r, fusion.of_r[:, :, None, None])).sigmoid()
    # Identity 5.2: out = e ⊙ (w + φ (1 − w)).
    gate = w[:, :, None].to(phi.dtype)
    out = slabs * torch.addcmul(gate, phi.unflatten(1, slabs.shape[1:3]), 1 - gate)
    return out.reshape(e.shape).to(e.dtype).contiguous(memory_format=memory_format(e))
