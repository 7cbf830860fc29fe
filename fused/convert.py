"""Finding published-style blocks inside a model by their keys, and replacing them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .backends import check_name
from .backends.reference.published import PublishedCIEMA, PublishedMSFF
from .fused_block import has_hooks, own_call
from .modules import FusedCIEMA, FusedMSFF

_OLDER_VARIANT = "cross_spatial_conv"


def _keys(module: nn.Module) -> set[str]:
    """Parameter names; parametrised ones by the name that they replace."""
    names = (name for name, _ in module.named_parameters())
    return {_plain_name(name) for name in names}


def _plain_name(name: str) -> str:
    """`conv.parametrizations.weight.original` → `conv.weight`."""
    head, found, tail = name.partition("parametrizations.")
    return head + tail.split(".")[0] if found else name


_CIEMA_KEYS = _keys(PublishedCIEMA(4, 1, device="meta"))
_CIEMA_PARTS = {part.name: part for part in FusedCIEMA.published_parts}
_CIEMA_CHILDREN = frozenset(p.key for p in _CIEMA_PARTS.values() if p.parent == 0)
_CIEMA_LEAVES = tuple(name for name, part in _CIEMA_PARTS.items() if not part.children)
_MSFF_CHILDREN = frozenset(p.key for p in FusedMSFF.published_parts if p.parent == 0)
# Modules for what the published maths does by a function: a block may hold them anywhere.
_FUNCTIONS = (
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Identity),
    *(nn.ReLU, nn.Sigmoid, nn.Softmax),
)
# The same children called in another order differ by rounding; another formula by far more.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
_SAME_IN_HALF = 5e-2


def is_older_variant(module: nn.Module) -> bool:
    """Whether `module` itself is the earlier form of CIEMA, with the key cross_spatial_conv."""
    names = {name for name, _ in module.named_children()}
    return _OLDER_VARIANT in names


def is_ciema(module: nn.Module) -> bool:
    """Whether `module` has the children of a published CIEMA block."""
    return {name for name, _ in module.named_children()} >= _CIEMA_CHILDREN


def is_msff(module: nn.Module) -> bool:
    """Whether `module` has the one child of a published MSFF block: 1×1 convolution, norm, ReLU."""
    if {name for name, _ in module.named_children()} != _MSFF_CHILDREN:
        return False
    child = module.fusion_conv
    if not isinstance(child, nn.Sequential) or len(child) != 3:
        return False
    conv, norm, activation = child
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (1, 1)
        and conv.bias is None
        and isinstance(norm, _BatchNorm)
        and isinstance(activation, nn.ReLU)
    )


def _refuse_losses(module: nn.Module, kept: Sequence[str]) -> None:
    """Refuse what is not of the `kept` children: hooks, parameters, buffers, children are lost."""
    for name, part in module.named_modules(remove_duplicate=False):
        if any(name == one or name.startswith(f"{one}.") for one in kept):
            continue
        where = name or "the block itself"
        call = own_call(part)
        if call is not None:
            raise ValueError(f"from_module: {where} {call}, which the new block would lose")
        for key, _ in part.named_buffers(recurse=False):
            raise ValueError(
                f"from_module: {where} has the buffer {key}, which the new block would lose"
            )
        own = (f"{name}.{key}".lstrip(".") for key, _ in part.named_parameters(recurse=False))
        for key in set(own) - _CIEMA_KEYS:
            raise ValueError(
                f"from_module: {where} has the parameter {key}, which the new block would lose"
            )
        holder = name.rpartition(".")[0]
        in_chain = holder in _CIEMA_PARTS and _CIEMA_PARTS[holder].kind is nn.Sequential
        if name and name not in _CIEMA_PARTS and (in_chain or type(part) not in _FUNCTIONS):
            raise ValueError(
                f"from_module: {where} is a {type(part).__name__}, which the published block does "
                "not have and the new block would lose"
            )


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` is what `torch.compile` made of another, which it goes on calling."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


@contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[None]:
    """`module` as it infers; each part's own mode is back afterwards, whatever `train` does."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _wave(like: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    """Values that repeat nowhere, without a draw from the user's random numbers."""
    steps = torch.arange(channels * height * width, device=like.device, dtype=torch.float32)
    return (0.7 * steps).sin().add(0.1).to(like.dtype).reshape(1, channels, height, width)


def _refuse_another_forward(module: nn.Module, block: nn.Module, probes: Sequence[Any]) -> None:
    """Refuse a module that calls its children otherwise than the published block does.

    Both are run in evaluation on the first of `probes` that `module` takes. Nothing is run where
    there is nothing to compare: the published classes themselves, no values (meta), and hooks on
    the children, which belong to the user's own calls.
    """
    published: Any = PublishedCIEMA if isinstance(block, PublishedCIEMA) else PublishedMSFF
    tensors = [*module.parameters(), *module.buffers()]
    idle = type(module) is published or any(t.is_meta for t in tensors)
    if idle or any(has_hooks(part) for part in module.modules()):
        return
    kind, problem = type(module).__name__, ""
    with _in_evaluation(module):
        for probe in probes:
            try:
                got = module(probe)
            except Exception as error:  # whatever a stranger's forward raises
                problem = f"{type(error).__name__}: {error}"
                continue
            want = published.forward(block, probe)
            allowed = _SAME.get(want.dtype, _SAME_IN_HALF)
            if not (isinstance(got, torch.Tensor) and got.shape == want.shape):
                raise ValueError(f"from_module: {kind} does not return one map as published does")
            if not torch.allclose(got.to(want), want, allowed, allowed, equal_nan=True):
                apart = float((got.to(want) - want).abs().max())
                raise ValueError(
                    f"from_module: the forward of {kind} computes something else with its children "
                    f"than the published block: its result differs by {apart:.2g}"
                )
            return
    raise ValueError(
        f"from_module: the forward of {kind} does not take what the published block takes, so "
        f"that they cannot be compared: {problem}"
    )


def _weight(module: nn.Module, name: str) -> torch.Tensor:
    """A child's weight, which a parametrisation may compute."""
    child: Any = module.get_submodule(name)
    weight: torch.Tensor = child.weight
    return weight


def ciema_from_module(module: nn.Module, backend: str | None = None) -> FusedCIEMA:
    """Build a FusedCIEMA around the leaf children of `module`; parameters are shared, not copied.

    Raises:
        ValueError: not a CIEMA block (missing keys are named), the older variant, or hooks,
            parameters or children that would be lost, or another forward than the published one.
    """
    if is_older_variant(module):
        raise ValueError(
            "from_module: this block has the child cross_spatial_conv: it is the older variant of "
            "CIEMA, without channel_feat and alpha, and computes something else; use the variant "
            "with the keys channel_feat, alpha and ms_reduce"
        )
    missing = sorted(_CIEMA_KEYS - _keys(module))
    for key in missing:  # pruning's and the older weight_norm's names
        if {f"{key}_orig", f"{key}_g"} & _keys(module):
            raise ValueError(
                f"from_module: {key} is computed by a hook of its module (pruning, or the older "
                "weight_norm): make it a parameter first (torch.nn.utils.prune.remove, "
                "torch.nn.utils.remove_weight_norm), or use torch.nn.utils.parametrizations"
            )
    if missing:
        raise ValueError(f"from_module: {type(module).__name__} is no CIEMA block, lacks {missing}")
    _refuse_losses(module, _CIEMA_LEAVES)
    width = _weight(module, "conv1x1").shape[0]
    hidden, channels = _weight(module, "channel_interaction.fc.0").shape
    # The constructor's reduction is not stored; this one gives the same hidden width.
    block = FusedCIEMA(
        *(channels, channels // width, max(channels // hidden, 1)),
        bn_statistics=getattr(module, "bn_statistics", "sequential"),
        backend=backend,
        device="meta",
    )
    block.train(module.training)  # before it has children of `module`, which keep their own mode
    present = dict(module.named_modules(remove_duplicate=False))
    for name in _CIEMA_LEAVES:
        if name in present:  # an activation may be a function there
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, present[name])
    learning = module.get_submodule("cross_spatial_learning")
    block.cross_spatial_learning.alpha = learning.get_parameter("alpha")
    _refuse_another_forward(module, block, [_wave(block.conv1x1.weight, channels, 4, 3)])
    return block


def msff_from_module(
    module: nn.Module, stage_channels: Sequence[int] | None = None, backend: str | None = None
) -> FusedMSFF:
    """Build a FusedMSFF around `module.fusion_conv`.

    `stage_channels` is taken from the block where it says them; else any maps whose channels add
    up are accepted.

    Raises:
        ValueError: not an MSFF block, or another forward than the published one.
    """
    if not is_msff(module):
        raise ValueError(f"from_module: {type(module).__name__} is no MSFF block (fusion_conv)")
    _refuse_losses(module, tuple(_MSFF_CHILDREN))
    fusion_conv: Any = module.fusion_conv
    weight: torch.Tensor = fusion_conv[0].weight
    known = stage_channels or getattr(module, "stage_channels", None)
    total = weight.shape[1]
    if known is not None and sum(known) != total:
        raise ValueError(f"stage_channels={list(known)} add up to {sum(known)}, not to {total}")
    block = FusedMSFF(known or (total,), weight.shape[0], backend=backend, device="meta")
    block.stage_channels = None if known is None else tuple(known)
    block.train(module.training)
    block.fusion_conv = fusion_conv
    # Where the block does not say how many maps it takes, one to five are tried.
    splits = [known] if known else [_split(total, count) for count in range(1, min(total, 5) + 1)]
    probes = [
        [_wave(weight, c, 4 if i == 0 else 2, 3) for i, c in enumerate(split)] for split in splits
    ]
    _refuse_another_forward(module, block, probes)
    return block


def _split(total: int, count: int) -> list[int]:
    """`total` channels in `count` maps: one each, the rest in the last."""
    return [1] * (count - 1) + [total - count + 1]


def fuse(model: nn.Module, backend: str | None = None) -> nn.Module:
    """Replace every published-style CIEMA and MSFF block of `model`, in place, by its fused form.

    Blocks are found by their keys, whatever their class is called; one of a class of its own is
    run once on a small map in evaluation, to see that it computes what the published block does.
    Parameters stay the same objects, so an optimiser that holds them goes on working.

    Args:
        model: changed in place; if it is itself such a block, only the result is the fused one.
        backend: given to every block; None leaves it of those that were fused before.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing to replace, or a block that has the keys but is of the older variant,
            has more than the published one, computes something else, or is compiled.
        BackendError: `backend` is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a module, got {type(model).__name__}")
    if backend is not None:
        check_name(backend)
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, (FusedCIEMA, FusedMSFF)):
            module.backend = module.backend if backend is None else backend
            continue
        if is_older_variant(module):
            ciema_from_module(module)  # raises, and says which variant it is
        if is_ciema(module):
            replaced[module] = ciema_from_module(module, backend)
        elif is_msff(module):
            replaced[module] = msff_from_module(module, None, backend)
        else:
            continue
        if not name:
            return replaced[module]
    for name, module in model.named_modules():
        if is_compiled(module) and module._modules["_orig_mod"] in replaced:
            raise ValueError(
                f"fuse: {name or 'the model'} is a compiled block, which would go on calling the "
                "old one: fuse the block it was made from, then call torch.compile"
            )
    if not replaced and not any(isinstance(m, (FusedCIEMA, FusedMSFF)) for m in model.modules()):
        raise ValueError(f"fuse: {type(model).__name__} holds no CIEMA or MSFF block")
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # a block may stand there twice
            if child in replaced:
                setattr(parent, name, replaced[child])
    return model
