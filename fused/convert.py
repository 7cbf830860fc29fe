"""Finding published-style blocks inside a model by their keys, and replacing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .backends.reference.published import PublishedCIEMA, PublishedMSFF
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


_CIEMA_CHILDREN = frozenset(
    name for name, _ in PublishedCIEMA(4, 1, device="meta").named_children()
)
_CIEMA_LEAVES = tuple(
    name
    for name, child in PublishedCIEMA(4, 1, device="meta").named_modules()
    if next(child.parameters(recurse=False), None) is not None and name != "cross_spatial_learning"
)
_MSFF_CHILDREN = frozenset(name for name, _ in PublishedMSFF((1,), device="meta").named_children())


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
    conv, _, activation = child
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (1, 1)
        and conv.bias is None
        and isinstance(activation, nn.ReLU)
    )


def _refuse_hooks(module: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        part = module.get_submodule(name)
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
            where = name or "the block itself"
            raise ValueError(f"from_module: {where} has hooks, which the new block would lose")


def ciema_from_module(module: nn.Module, backend: str | None = None) -> FusedCIEMA:
    """Build a FusedCIEMA around the leaf children of `module`; parameters are shared, not copied.

    Raises:
        ValueError: not a CIEMA block (missing keys are named), the older variant, or hooks on
            the block itself, which would be lost.
    """
    if is_older_variant(module):
        raise ValueError(
            "from_module: this block has the child cross_spatial_conv: it is the older variant of "
            "CIEMA, without channel_feat and alpha, and computes something else; use the variant "
            "with the keys channel_feat, alpha and ms_reduce"
        )
    missing = sorted(_keys(PublishedCIEMA(4, 1, device="meta")) - _keys(module))
    if missing:
        raise ValueError(f"from_module: {type(module).__name__} is no CIEMA block, lacks {missing}")
    _refuse_hooks(module, ("", "channel_interaction", "cross_spatial_learning"))
    width = module.get_submodule("conv1x1").get_parameter("weight").shape[0]
    squeeze = module.get_submodule("channel_interaction.fc.0").get_parameter("weight")
    hidden, channels = squeeze.shape
    # The constructor's reduction is not stored; this one gives the same hidden width.
    block = FusedCIEMA(
        *(channels, channels // width, max(channels // hidden, 1)),
        bn_statistics=getattr(module, "bn_statistics", "sequential"),
        backend=backend,
        device="meta",
    )
    for name in _CIEMA_LEAVES:
        parent, _, leaf = name.rpartition(".")
        owner = block.get_submodule(parent)
        setattr(owner, leaf, module.get_submodule(name))
    learning = module.get_submodule("cross_spatial_learning")
    block.cross_spatial_learning.alpha = learning.get_parameter("alpha")
    block.training = module.training
    return block


def msff_from_module(
    module: nn.Module, stage_channels: Sequence[int] | None = None, backend: str | None = None
) -> FusedMSFF:
    """Build a FusedMSFF around `module.fusion_conv`.

    `stage_channels` is taken from the block where it says them; else any maps whose channels add
    up are accepted.

    Raises:
        ValueError: not an MSFF block.
    """
    if not is_msff(module):
        raise ValueError(f"from_module: {type(module).__name__} is no MSFF block (fusion_conv)")
    _refuse_hooks(module, ("",))
    fusion_conv: Any = module.fusion_conv
    weight: torch.Tensor = fusion_conv[0].weight
    known = stage_channels or getattr(module, "stage_channels", None)
    total = weight.shape[1]
    if known is not None and sum(known) != total:
        raise ValueError(f"stage_channels={list(known)} add up to {sum(known)}, not to {total}")
    block = FusedMSFF(known or (total,), weight.shape[0], backend=backend, device="meta")
    block.stage_channels = None if known is None else tuple(known)
    block.fusion_conv = fusion_conv
    block.training = module.training
    return block


def fuse(model: nn.Module, backend: str | None = None) -> nn.Module:
    """Replace every published-style CIEMA and MSFF block of `model`, in place, by its fused form.

    Blocks are found by their keys, whatever their class is called. Parameters stay the same
    objects, so an optimiser that holds them goes on working.

    Args:
        model: changed in place; if it is itself such a block, only the result is the fused one.
        backend: given to every new block.

    Returns:
        The model.

    Raises:
        ValueError: nothing to replace, or a block of the older variant.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, (FusedCIEMA, FusedMSFF)):
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
    if not replaced and not any(isinstance(m, (FusedCIEMA, FusedMSFF)) for m in model.modules()):
        raise ValueError(f"fuse: {type(model).__name__} holds no CIEMA or MSFF block")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replaced:
                setattr(parent, name, replaced[child])
    return model
