"""Dtypes, tolerances, saved tensors, and what is refused, with the argument and its value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

STAGES = ("msff", "channel_interaction", "coordinate_attention", "cross_spatial", "gated_fusion")
FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BN_STATISTICS = ("sequential", "pooled")
EPS = 1e-5  # of every batch and group norm of the published network (spec.md, head)

# Largest ‖out − ref‖ / ‖ref‖ against float64, (output, gradients and statistics): goals.md.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-6, 1e-6),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (4e-3, 1e-2),
    torch.bfloat16: (2e-2, 4e-2),
}

# What each op keeps for its backward besides parameters. All backends save the same tensors, so a
# forward of one backend may meet a backward of another.
SAVED: dict[str, tuple[str, ...]] = {
    "channel_statistics": ("x", "argmax"),
    "msff": ("features", "batch_mean", "batch_var"),
    "channel_interaction": ("x", "gate", "mean", "maximum", "argmax"),
    "coordinate_attention": ("e", "alpha_h", "alpha_w", "mean", "rstd"),
    "cross_spatial": (
        *("e", "alpha_h", "alpha_w", "mean", "rstd", "w", "softmax1", "softmax2"),
        *("attention_mean", "attention_var", "reduce_mean", "reduce_var"),
    ),
    "gated_fusion": (
        *("e", "w", "hidden", "gate_logits"),
        *("mean1", "var1", "mean2", "var2", "mean3", "var3"),
    ),
}


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of means, variances, gates and sums of a map of `dtype`: float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype in which the library multiplies maps like `x`, and to which they are rounded before.

    A GPU multiplies half precision on tensor cores and sums in float32. On a CPU the library
    would round every result to half precision, so float32 is used: accuracy before speed there.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and x.device.type == "cpu" else x.dtype


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Memory format of outputs and gradients that belong to the map `x` (B, C, H, W).

    Under transforms of torch.func, some of which know no other, it is the contiguous one.
    """
    if x.is_contiguous() or torch._C._are_functorch_transforms_active():
        return torch.contiguous_format
    fits = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if fits else torch.contiguous_format


# --------------------------------------------------------------------------------------- legality


def _dtypes() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)


def check_dtype(name: str, dtype: object) -> None:
    """Refuse an argument that is neither None nor a dtype of maps and parameters."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}={dtype!r}, supported are None, {_dtypes()}")


def check_map(stage: str, name: str, x: torch.Tensor) -> None:
    """Refuse what no stage takes: not 4-D, not floating, sparse or quantised, empty."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{stage}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{stage}: {name} has dtype {x.dtype}, supported are {_dtypes()}")
    if x.layout != torch.strided:
        raise TypeError(f"{stage}: {name} has layout {x.layout}, only torch.strided is supported")
    if x.dim() != 4:
        raise ValueError(f"{stage}: {name} must be (B, C, H, W), got shape {tuple(x.shape)}")
    if any(size == 0 for size in x.shape):
        raise ValueError(f"{stage}: {name} is empty, shape {tuple(x.shape)}")


def check_tensor(
    stage: str, name: str, value: torch.Tensor, shape: Sequence[int], like: torch.Tensor
) -> None:
    """Refuse a parameter or small tensor of the wrong shape, device or dtype for the map `like`."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{stage}: {name} has shape {tuple(value.shape)}, expected {tuple(shape)} "
            f"for a map of shape {tuple(like.shape)}"
        )
    if value.device != like.device:
        raise ValueError(f"{stage}: {name} is on {value.device}, the map on {like.device}")
    if value.dtype not in (like.dtype, statistics_dtype(like.dtype)):
        wanted = {str(like.dtype), str(statistics_dtype(like.dtype))}
        raise TypeError(
            f"{stage}: {name} has dtype {value.dtype}, expected {' or '.join(sorted(wanted))} "
            f"for a map of {like.dtype}"
        )


def check_whole(name: str, value: Any) -> int:
    """Refuse an argument that is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r}, expected a whole number") from None


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse an argument that is no whole number, or one below `least`."""
    if check_whole(name, value) < least:
        raise ValueError(f"{name}={value}, at least {least} expected")


def check_groups(stage: str, channels: int, groups: int) -> None:
    """Refuse a group count that does not divide the channels."""
    if groups < 1 or channels % groups != 0:
        raise ValueError(
            f"{stage}: groups={groups} does not divide channels={channels} "
            "(the constructor's factor or groups)"
        )


def check_bn_statistics(value: str) -> None:
    """Refuse an unknown form of batch-norm statistics (spec.md section 3)."""
    if value not in BN_STATISTICS:
        raise ValueError(f"bn_statistics={value!r}, expected one of {BN_STATISTICS}")


def check_batch_statistics(stage: str, x: torch.Tensor) -> None:
    """Refuse training on one value a channel, as batch norm does: its variance is undefined."""
    batch, _, height, width = x.shape
    if batch * height * width == 1:
        raise ValueError(
            f"{stage}: training needs more than one value a channel, got input {tuple(x.shape)}"
        )
