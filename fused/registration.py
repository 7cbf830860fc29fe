"""How an op becomes a `torch.library` op: dispatch, fake, autograd, autocast, double backward.

One `StageOp` a stage. Everything is bound by the names in its two schemas: an argument of the
backward is the gradient of an output (`grad_<output>`), a tensor that `contract.SAVED` lists, a
parameter, or a number of the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import backends
from .contract import CHECKS, OUTPUTS, check_map, memory_format

LIBRARY = torch.library.Library("ciema", "DEF")
# The devices that have these ops; on those without kernels of ours the reference runs.
DEVICE_KEYS = ("CPU", "CUDA", "XPU", "MPS")
_AUTOCAST_DEVICES = tuple(key.lower() for key in DEVICE_KEYS)  # not meta, which knows no autocast


def _empty(x: torch.Tensor, spec: Any) -> torch.Tensor:
    empty = x.new_empty(spec.shape, dtype=spec.dtype)
    return empty.contiguous(memory_format=spec.memory_format) if empty.dim() == 4 else empty


def _positional(op: Any) -> tuple[str, ...]:
    return tuple(a.name for a in op._schema.arguments if not a.kwarg_only)


def _unwrap(results: tuple[Any, ...]) -> Any:
    return results[0] if len(results) == 1 else results


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def may_record() -> bool:
    """Whether autograd records; a `torch.jit.trace`, which checks itself without, serves both."""
    return torch.is_grad_enabled() or torch.jit.is_tracing()


def needs_gradient(*values: Any) -> bool:
    """Whether autograd would record a call with these arguments, tensors or not."""
    if not may_record():
        return False
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return any(t.requires_grad for t in _tensors(values))
    return any(_unbatched(t).requires_grad for t in _tensors(values))


def _unbatched(x: torch.Tensor) -> torch.Tensor:
    """What vmap was given, which alone tells whether a gradient is asked for."""
    while torch._C._functorch.is_batchedtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def has_tangent(*values: Any) -> bool:
    """Whether forward-mode differentiation goes through one of these arguments."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in _tensors(values))


def refuse_derivatives(op: str, values: Sequence[Any]) -> None:
    """Refuse the derivatives that an op does not have: forward mode, which would give zero."""
    if has_tangent(*values):
        raise RuntimeError(_NO_DERIVATIVE.format(op=op, what="in forward mode"))
    if torch.compiler.is_compiling():
        return  # the op's node in autograd refuses the rest
    if torch._C._are_functorch_transforms_active() and needs_gradient(*values):
        raise RuntimeError(_NO_DERIVATIVE.format(op=op, what="by torch.func"))


_NO_DERIVATIVE = (
    "ciema::{op} cannot be differentiated {what}; backend='reference' can "
    "(FusedCIEMA(..., backend='reference') or fused.set_backend('reference'))"
)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast gives to maps on this type of device; None where it is off."""
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class StageOp:
    """A forward op and its backward op; call it as a function of the forward's arguments.

    Attributes:
        name: the op, `ciema::<name>`; its backward is `ciema::<name>_backward`.
        maps: the inputs that are maps.
        cast: those that autocast casts, all unless told otherwise; nothing else is cast.
        differentiable: the outputs that carry a gradient.
        gradients: the inputs whose gradients the backward returns, in its order.
        inputs: names of the forward's arguments, `backend` not counted.
        defaults: their values where the schema has them.
        outputs: names of its results.
        backward_inputs: names of the backward's arguments.
    """

    def __init__(
        self,
        name: str,
        forward: str,
        backward: str,
        maps: tuple[str, ...],
        differentiable: tuple[str, ...],
        gradients: tuple[str, ...],
        cast: tuple[str, ...] | None = None,
    ) -> None:
        """Define and register both ops; `forward` and `backward` are their schemas."""
        self.name, self.maps = name, maps
        self.cast = maps if cast is None else cast
        self.differentiable, self.gradients = differentiable, gradients
        tags = (torch.Tag.pt2_compliant_tag,)
        LIBRARY.define(name + forward, tags=tags)
        LIBRARY.define(f"{name}_backward{backward}", tags=tags)
        self.op = getattr(torch.ops.ciema, name).default
        self.backward_op = getattr(torch.ops.ciema, f"{name}_backward").default
        self.inputs = _positional(self.op)
        self.defaults = {
            a.name: a.default_value for a in self.op._schema.arguments if a.has_default_value()
        }
        self.outputs = tuple(r.name for r in self.op._schema.returns)
        self.backward_inputs = _positional(self.backward_op)
        self._register()

    # ------------------------------------------------------------------------------------- calls

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Run the stage; arguments as in the op's schema.

        With `backend="reference"` this is plain PyTorch, differentiable any number of times.
        """
        for key, value in zip(self.inputs, args, strict=False):
            if key in self.maps:
                for one in value if isinstance(value, (list, tuple)) else (value,):
                    check_map(self.name, key, one)  # what the dispatcher would refuse in its words
        args = self._kept_for_backward(self._complete(args))
        name = backends.requested(backend)
        if name != "reference":
            refuse_derivatives(self.name, args)
            return self.op(*args, backend=name)
        device = self._main(args).device.type
        dtype = autocast_dtype(device)
        if dtype is not None:
            args = self._cast(args, dtype)
            with torch.autocast(device, enabled=False):
                return self._plain(args)
        return self._plain(args)

    def _complete(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with the defaults of those left out; the dispatcher leaves defaults out."""
        rest = self.inputs[len(args) :]
        return (*args, *(self.defaults[name] for name in rest if name in self.defaults))

    def _kept_for_backward(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Running buffers by value where a backward needs them: training writes over them."""
        names = zip(self.inputs, args, strict=True)
        places = [i for i, (key, x) in enumerate(names) if "running_" in key and x is not None]
        if not places or torch.compiler.is_exporting() or not needs_gradient(*args):
            return args
        buffers = [args[i] for i in places]
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            kept = [buffer.clone() for buffer in buffers]  # vmap knows no other
        else:
            kept = list(torch._foreach_mul(buffers, 1.0))  # all in one launch on a GPU
        return tuple(kept[places.index(i)] if i in places else x for i, x in enumerate(args))

    def _plain(self, args: Sequence[Any]) -> Any:
        self._check(args)
        return backends.REFERENCE.kernels[self.name](*args)

    def _check(self, args: Sequence[Any]) -> None:
        CHECKS[self.name](dict(zip(self.inputs, args, strict=True)))
        self._check_devices(self.inputs, args, self._main(args))

    def _check_devices(self, names: Sequence[str], args: Sequence[Any], x: torch.Tensor) -> None:
        """Refuse a tensor elsewhere: of one on meta the dispatcher would make all a fake's."""
        for name, value in zip(names, args, strict=True):
            for tensor in _tensors((value,)):
                if tensor.device != x.device:
                    where = f"{name} is on {tensor.device}, the map on {x.device}"
                    raise ValueError(f"{self.name}: {where}")

    def _main(self, args: Sequence[Any]) -> torch.Tensor:
        return self._main_of(dict(zip(self.inputs, args, strict=False)))

    def _main_of(self, named: dict[str, Any]) -> torch.Tensor:
        value = named[self.maps[0]]
        return value[0] if isinstance(value, (list, tuple)) else value

    def _groups(self, named: dict[str, Any]) -> int | None:
        """G, where the stage cuts its map into groups."""
        groups: int | None = named["w"].shape[1] if "w" in self.maps else named.get("groups")
        return groups

    def _cast(self, args: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
        """Maps to the autocast dtype; float64 stays, as torch's own autocast leaves it."""

        def cast(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [cast(v) for v in value]
            eligible = value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if eligible else value

        pairs = zip(self.inputs, args, strict=True)
        return tuple(cast(value) if name in self.cast else value for name, value in pairs)

    # ------------------------------------------------------------------------------ registration

    def _register(self) -> None:
        name, backward_name = f"ciema::{self.name}", f"ciema::{self.name}_backward"
        for key in DEVICE_KEYS:
            LIBRARY.impl(self.name, self._run_forward, key)
            LIBRARY.impl(f"{self.name}_backward", self._run_backward, key)
            LIBRARY.impl(self.name, self._autocast(key), f"Autocast{key}")
        torch.library.register_fake(name, self._fake_forward, lib=LIBRARY)
        torch.library.register_fake(backward_name, self._fake_backward, lib=LIBRARY)
        torch.library.register_autograd(
            name, self._autograd_backward, setup_context=self._setup_context, lib=LIBRARY
        )
        torch.library.register_autograd(backward_name, self._double_backward, lib=LIBRARY)

    def _run_forward(self, *args: Any, backend: str = "auto") -> Any:
        args = self._complete(args)
        self._check(args)
        x = self._main(args)
        groups = self._groups(dict(zip(self.inputs, args, strict=True)))
        kernel = backends.choose(self.name, x, backend, groups).kernels[self.name]
        with torch.autocast(x.device.type, enabled=False):
            return kernel(*args)

    def _run_backward(self, *args: Any, backend: str = "auto") -> Any:
        named = dict(zip(self.backward_inputs, args, strict=True))
        x = self._main_of(named)
        self._check_devices(self.backward_inputs, args, x)
        name = f"{self.name}_backward"
        chosen = backends.choose(name, x, backend, self._groups(named))
        kernel: Callable[..., Any] = chosen.kernels[name]
        with torch.autocast(x.device.type, enabled=False):
            results = kernel(*args)
        if isinstance(results, torch.Tensor):
            return results
        pairs = zip(self.gradients, results, strict=True)
        return tuple(r if key in self.maps else r.contiguous() for key, r in pairs)

    def _autocast(self, key: str) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{key}"))
        device = key.lower()

        def run(*args: Any, backend: str = "auto") -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                cast = self._cast(self._complete(args), torch.get_autocast_dtype(device))
                return self.op(*cast, backend=backend)

        return run

    def _fake_forward(self, *args: Any, backend: str = "auto") -> Any:
        args = self._complete(args)
        self._check(args)
        named = dict(zip(self.inputs, args, strict=True))
        x = self._main(args)
        return _unwrap(tuple(_empty(x, spec) for spec in OUTPUTS[self.name](named)))

    def _fake_backward(self, *args: Any, backend: str = "auto") -> Any:
        named = dict(zip(self.backward_inputs, args, strict=True))
        self._check_devices(self.backward_inputs, args, self._main_of(named))

        def like(value: Any, is_map: bool) -> Any:
            if isinstance(value, (list, tuple)):
                return [like(v, is_map) for v in value]
            fmt = memory_format(value) if is_map else torch.contiguous_format
            return torch.empty_like(value, memory_format=fmt)

        return _unwrap(tuple(like(named[key], key in self.maps) for key in self.gradients))

    # ---------------------------------------------------------------------------------- autograd

    def _setup_context(
        self, ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        outputs = output if isinstance(output, (list, tuple)) else (output,)
        inputs = self._complete(inputs)
        named = dict(zip(self.inputs, inputs, strict=True))
        named |= dict(zip(self.outputs, outputs, strict=True))
        if named.get("save") is False:
            raise ValueError(f"{self.name}: save=False, but a gradient is asked for")
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(named[key] for key in self.outputs if key not in self.differentiable)
        )
        x = self._main(inputs)
        # The choice of the forward's moment holds for the backward, whatever is set in between.
        backend = keyword_only_inputs["backend"]
        name, groups = f"{self.name}_backward", self._groups(named)
        ctx.backend = backend if x.is_meta else backends.choose(name, x, backend, groups).name
        ctx.absent = {
            f"grad_{key}": (named[key].shape, named[key].dtype, named[key].device)
            for key in self.differentiable
        }
        tensors: list[torch.Tensor | None] = []
        ctx.layout = []
        for key in self.backward_inputs:
            if key in ctx.absent:
                continue
            value = named[key]
            if isinstance(value, (list, tuple)):
                ctx.layout.append((key, len(value)))
                tensors.extend(value)
            elif value is None or isinstance(value, torch.Tensor):
                ctx.layout.append((key, None))
                tensors.append(value)
            else:
                ctx.layout.append((key, (value,)))
        ctx.save_for_backward(*tensors)

    def _autograd_backward(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        given = {f"grad_{key}": grad for key, grad in zip(self.outputs, grads, strict=True)}
        named: dict[str, Any] = {}
        for key, (shape, dtype, device) in ctx.absent.items():
            grad = given[key]
            named[key] = torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        saved = iter(ctx.saved_tensors)
        for key, what in ctx.layout:
            if isinstance(what, tuple):
                named[key] = what[0]
            elif what is None:
                named[key] = next(saved)
            else:
                named[key] = [next(saved) for _ in range(what)]
        args = [named[key] for key in self.backward_inputs]
        results = self.backward_op(*args, backend=ctx.backend)
        results = (results,) if isinstance(results, torch.Tensor) else results
        by_name = dict(zip(self.gradients, results, strict=True))
        # torch 2.10 to 2.13 refuse a place for the defaults that the dispatcher left out.
        passed = self.inputs[: len(ctx.needs_input_grad)]
        return tuple(by_name.get(key) for key in passed)

    def _double_backward(self, ctx: Any, *grads: Any) -> None:
        raise RuntimeError(_NO_DERIVATIVE.format(op=self.name, what="twice"))
