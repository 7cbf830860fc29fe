"""`optimize_for_inference`: a frozen copy of a model, its fastest form.

A model takes part by the method `frozen_for_inference(dtype)`, called on a private copy of it in
evaluation mode: it returns its frozen form, which may take over the copy's children, or a text that
says why it has none. The two blocks have it, and so has MobileSteelNet; a model without it is kept,
and its children are asked.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .contract import check_dtype
from .convert import (
    ciema_from_module,
    is_ciema,
    is_compiled,
    is_msff,
    is_older_variant,
    msff_from_module,
)
from .frozen import Frozen, refuse_training

_logger = logging.getLogger("fused")


class NothingToFreezeError(ValueError):
    """A model holds nothing that has a frozen form."""


def optimize_for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A frozen copy of `model` for inference; `model` itself is not changed.

    Every FusedCIEMA, FusedMSFF, published-style block and MobileSteelNet in it takes its frozen
    form: batch norms and the second product of gated fusion are folded, weights are packed once for
    this machine, a network's last map is only averaged. Whatever else the model holds is copied as
    it is. The copy has the model's keys: its state dict is the model's, loading one makes the
    folded weights again, and so do `.to(device)`, deepcopy, pickle, a replaced child and whatever
    writes to a weight but through `.data`, which nothing shows. Calls from several threads do not
    disturb each other. Autocast does not reach inside.

    The copy refuses training mode, gradients, export, another dtype and hooks on its children with
    a `FrozenError`.
    A block whose children have to be called (hooks, parametrisations, ...) stays as it is, with a
    warning in the log `fused` and the reason in `fused.explain`.

    Args:
        model: a module in evaluation mode, on any device. The native kernels are for the CPU;
            elsewhere the blocks run the ops of the unfrozen form.
        dtype: of the maps inside the frozen forms: torch.float32, bfloat16, float16 or float64;
            None keeps that of each one's parameters. Inputs may be of any floating dtype, outputs
            are of the input's.

    Raises:
        TypeError: `model` is not a module, or `dtype` no floating dtype.
        ValueError: `model` is in training mode or compiled.
        NothingToFreezeError: a ValueError too, nothing in it can be frozen; the message says why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize_for_inference: model is a {type(model).__name__}, not a module")
    check_dtype("optimize_for_inference: dtype", dtype)
    for name, module in model.named_modules():
        what = f"model.{name}" if name else "model"
        if isinstance(module, Frozen):
            raise ValueError(f"optimize_for_inference: {what} is frozen already")
        if module.training:
            raise ValueError(
                f"optimize_for_inference: {what} is in training mode, and batch norms can only be "
                "folded in evaluation mode: call model.eval() first"
            )
    freezer = _Freezer(dtype)
    # A copy made in inference mode would not show that its weights were written to.
    with torch.inference_mode(False), torch.no_grad():
        frozen = freezer.freeze(copy.deepcopy(model), "")
    kind = type(model).__name__
    if not any(isinstance(module, Frozen) for module in frozen.modules()):
        why = "; ".join(freezer.reasons) or "it holds no CIEMA or MSFF block (see fused.fuse)"
        raise NothingToFreezeError(
            f"optimize_for_inference: nothing in {kind} can be frozen: {why}"
        )
    for reason in freezer.reasons:
        _logger.warning("optimize_for_inference: %s stays as it is", reason)
    for parameter in frozen.parameters():
        parameter.requires_grad = False
    for module in frozen.modules():
        if not isinstance(module, Frozen):
            # A parent would train or convert half of its children before one refuses.
            module.train = _Instead(_refuse_training, module)  # type: ignore[method-assign]
            module.requires_grad_ = _Instead(_refuse_gradients, module)  # type: ignore[method-assign]
            module._apply = _Instead(_refuse_conversion, module)  # type: ignore[method-assign]
    return frozen


class _Instead:
    """A function in the place of one module's method; it does not keep the module alive."""

    def __init__(self, function: Callable[..., nn.Module], module: nn.Module) -> None:
        self._function, self._module = function, weakref.ref(module)

    def __call__(self, *args: Any, **named: Any) -> nn.Module:
        return self._function(self._module(), *args, **named)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Instead, (self._function, self._module())  # a copy's is the copy's


def _refuse_training(module: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        refuse_training(f"{type(module).__name__}.train()")
    return nn.Module.train(module, False)


def _refuse_gradients(module: nn.Module, requires_grad: bool = True) -> nn.Module:
    if requires_grad:
        refuse_training(f"{type(module).__name__}.requires_grad_()")
    return nn.Module.requires_grad_(module, False)


def _refuse_conversion(
    module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    for part in module.modules():
        if isinstance(part, Frozen):
            part.check_conversion(fn)
    return type(module)._apply(module, fn, recurse)


class _Freezer:
    """Walks a private copy and replaces what has a frozen form."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.reasons: list[str] = []
        self.done: dict[nn.Module, nn.Module] = {}  # a module may have several parents

    def freeze(self, module: nn.Module, name: str) -> nn.Module:
        """The frozen form of `module`, or `module` with its children frozen."""
        if module not in self.done:
            self.done[module] = self._freeze(module, name)
        return self.done[module]

    def _freeze(self, module: nn.Module, name: str) -> nn.Module:
        if isinstance(module, Frozen):
            return module
        result = self._own_form(module)
        if isinstance(result, nn.Module):
            return result
        if result is not None:
            self.reasons.append(f"{name or type(module).__name__}: {result}")
        for key, child in list(module._modules.items()):
            if child is not None:
                new = self.freeze(child, f"{name}.{key}" if name else key)
                if new is not child:
                    if is_compiled(module):
                        raise ValueError(
                            f"optimize_for_inference: {name or 'model'} is compiled and would go "
                            "on calling what is not frozen: freeze the module it was made from, "
                            "then call torch.compile"
                        )
                    module._modules[key] = new
        return module

    def _own_form(self, module: nn.Module) -> nn.Module | str | None:
        own: Any = None
        if hasattr(type(module), "frozen_for_inference"):  # not what a compiled one passes on
            own = module.frozen_for_inference
        else:
            try:
                if is_ciema(module) or is_older_variant(module):
                    own = ciema_from_module(module).frozen_for_inference
                elif is_msff(module):
                    own = msff_from_module(module).frozen_for_inference
            except ValueError as error:
                return str(error)
        if own is None:
            return None
        result: nn.Module | str = own(self.dtype)
        return result
