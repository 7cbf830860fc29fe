"""The inputs' and outputs' shapes of every op, in one table each; arguments come by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .legality import (
    check_batch_statistics,
    check_bn_statistics,
    check_groups,
    check_map,
    check_tensor,
    memory_format,
    statistics_dtype,
)

Arguments = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


class TensorSpec(NamedTuple):
    """Shape, dtype and memory format of an output."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory_format: torch.memory_format = torch.contiguous_format


def _require(stage: str, a: Arguments, x: torch.Tensor, shapes: Shapes) -> None:
    for name, shape in shapes.items():
        value = a[name]
        if not isinstance(value, torch.Tensor):
            what = "None" if value is None else type(value).__name__
            hint = ", evaluation needs running statistics" if value is None else ""
            raise TypeError(f"{stage}: {name} must be a tensor, got {what}{hint}")
        check_tensor(stage, name, value, shape, x)


def _rows(stage: str, a: Arguments, name: str) -> int:
    """First size of a weight that decides on others."""
    weight = a[name]
    if not isinstance(weight, torch.Tensor) or weight.dim() == 0:
        raise TypeError(f"{stage}: {name} must be a tensor of a weight, got {weight!r:.60}")
    return weight.shape[0]


def _running(a: Arguments, shapes: Shapes) -> Shapes:
    """Running buffers are looked at in evaluation only."""
    return {} if a["training"] else shapes


# ------------------------------------------------------------------------------------------- msff


def _check_msff(a: Arguments) -> None:
    stage, features = "msff", a["features"]
    if len(features) == 0:
        raise ValueError("msff: features is empty, at least one map is needed")
    first = features[0]
    for index, feature in enumerate(features):
        check_map(stage, f"features[{index}]", feature)
        for what in ("dtype", "device"):
            if getattr(feature, what) != getattr(first, what):
                raise TypeError(
                    f"msff: features[{index}] has {what} {getattr(feature, what)}, "
                    f"features[0] has {getattr(first, what)}"
                )
        if feature.shape[0] != first.shape[0]:
            raise ValueError(
                f"msff: features[{index}] has batch {feature.shape[0]}, "
                f"features[0] has {first.shape[0]}"
            )
    out = _rows(stage, a, "weight")
    shapes: dict[str, tuple[int, ...]] = {"weight": (out, sum(f.shape[1] for f in features), 1, 1)}
    shapes |= {"bn_weight": (out,), "bn_bias": (out,)}
    shapes |= dict(_running(a, {"running_mean": (out,), "running_var": (out,)}))
    _require(stage, a, first, shapes)
    if a["training"]:
        batch, _, height, width = _msff_shape(a)
        if batch * height * width == 1:
            check_batch_statistics(stage, first)


def _msff_shape(a: Arguments) -> tuple[int, int, int, int]:
    features = a["features"]
    height, width = max(f.shape[2] for f in features), max(f.shape[3] for f in features)
    return features[0].shape[0], a["weight"].shape[0], height, width


def _outputs_msff(a: Arguments) -> tuple[TensorSpec, ...]:
    first, shape = a["features"][0], _msff_shape(a)
    dtype = statistics_dtype(first.dtype)
    of_batch = TensorSpec((shape[1] if a["training"] else 0,), dtype)
    size = shape[:2] if a["statistics"] else (0,)
    of_channel = TensorSpec(size, dtype), TensorSpec(size, dtype), TensorSpec(size, torch.int64)
    return TensorSpec(shape, first.dtype, memory_format(first)), of_batch, of_batch, *of_channel


# ---------------------------------------------------------------------------- channel_interaction


def _check_channel_statistics(a: Arguments) -> None:
    check_map("channel_statistics", "x", a["x"])


def _outputs_channel_statistics(a: Arguments) -> tuple[TensorSpec, ...]:
    x = a["x"]
    value = TensorSpec(tuple(x.shape[:2]), statistics_dtype(x.dtype))
    return value, value, TensorSpec(tuple(x.shape[:2]), torch.int64)


def _check_channel_interaction(a: Arguments) -> None:
    stage, x = "channel_interaction", a["x"]
    check_map(stage, "x", x)
    channels, hidden = x.shape[1], _rows(stage, a, "squeeze_weight")
    shapes: dict[str, tuple[int, ...]] = {
        "interaction_weight": (channels, channels, 1, 1),
        "squeeze_weight": (hidden, channels),
        "excite_weight": (channels, hidden),
    }
    known = ("x_mean", "x_maximum", "x_argmax")
    if any(a[name] is not None for name in known):
        shapes |= dict.fromkeys(known[:2], tuple(x.shape[:2]))
        argmax = a["x_argmax"]
        if argmax is None or argmax.dtype != torch.int64 or argmax.shape != x.shape[:2]:
            got = argmax if argmax is None else f"{argmax.dtype} {tuple(argmax.shape)}"
            raise ValueError(f"{stage}: x_argmax is {got}, expected int64 {tuple(x.shape[:2])}")
    _require(stage, a, x, shapes)


def _outputs_channel_interaction(a: Arguments) -> tuple[TensorSpec, ...]:
    x = a["x"]
    vector = TensorSpec(tuple(x.shape[:2]), statistics_dtype(x.dtype))
    e = TensorSpec(tuple(x.shape), x.dtype, memory_format(x))
    return e, vector, vector, vector, TensorSpec(tuple(x.shape[:2]), torch.int64)


# --------------------------------------------------------------------------- coordinate_attention


def _check_coordinate_attention(a: Arguments) -> None:
    stage, e = "coordinate_attention", a["e"]
    check_map(stage, "e", e)
    check_groups(stage, e.shape[1], a["groups"])
    width = e.shape[1] // a["groups"]
    _require(stage, a, e, {"weight": (width, width, 1, 1), "bias": (width,)})


def _outputs_coordinate_attention(a: Arguments) -> tuple[TensorSpec, ...]:
    e = a["e"]
    dtype, (batch, channels, height, width) = statistics_dtype(e.dtype), e.shape
    vector = TensorSpec((batch, channels), dtype)
    gates = (TensorSpec((batch, channels, size), dtype) for size in (height, width))
    return (*gates, vector, vector)


# ---------------------------------------------------------------------------------- cross_spatial


def _check_cross_spatial(a: Arguments) -> None:
    check_cross_spatial_parameters(a)
    e = a["e"]
    batch, channels, height, width = e.shape
    vectors: dict[str, tuple[int, ...]] = {
        "alpha_h": (batch, channels, height),
        "alpha_w": (batch, channels, width),
        "mean": (batch, channels),
        "rstd": (batch, channels),
    }
    _require("cross_spatial", a, e, vectors)


def check_cross_spatial_parameters(a: Arguments) -> None:
    """Refuse what `cross_spatial` does, but for the vectors of coordinate attention."""
    stage, e = "cross_spatial", a["e"]
    check_map(stage, "e", e)
    check_groups(stage, e.shape[1], a["groups"])
    check_bn_statistics(a["bn_statistics"])
    c = e.shape[1] // a["groups"]
    shapes: dict[str, tuple[int, ...]] = {
        "gn_weight": (c,),
        "gn_bias": (c,),
        "conv3x3_weight": (c, c, 3, 3),
        "conv3x3_bias": (c,),
        "spatial_conv1_weight": (c, c, 1, 1),
        "spatial_conv3_weight": (c, c, 3, 3),
        "spatial_conv5_weight": (c, c, 5, 5),
        "attention_weight": (3 * c, 3 * c, 1, 1),
        "attention_bn_weight": (3 * c,),
        "attention_bn_bias": (3 * c,),
        "reduce_weight": (c, 3 * c, 1, 1),
        "reduce_bn_weight": (c,),
        "reduce_bn_bias": (c,),
        "channel_feat_weight": (c, c, 1, 1),
        "alpha": (1,),
    }
    running: dict[str, tuple[int, ...]] = {
        f"attention_running_{name}": (3 * c,) for name in ("mean", "var")
    }
    running |= {f"reduce_running_{name}": (c,) for name in ("mean", "var")}
    _require(stage, a, e, {**shapes, **_running(a, running)})
    if a["training"]:
        check_batch_statistics(stage, e)


def _outputs_cross_spatial(a: Arguments) -> tuple[TensorSpec, ...]:
    e, groups = a["e"], a["groups"]
    dtype, (batch, channels, height, width) = statistics_dtype(e.dtype), e.shape
    c = channels // groups
    sets = 0
    if a["training"]:
        sets = 2 * groups if a["bn_statistics"] == "sequential" else 1
    vector = TensorSpec((batch, groups, c), dtype)
    wide, narrow = TensorSpec((sets, 3 * c), dtype), TensorSpec((sets, c), dtype)
    w = TensorSpec((batch, groups, height, width), e.dtype)
    return w, vector, vector, wide, wide, narrow, narrow


# ----------------------------------------------------------------------------------- gated_fusion


def _check_gated_fusion(a: Arguments) -> None:
    stage, e, w = "gated_fusion", a["e"], a["w"]
    check_map(stage, "e", e)
    check_map(stage, "w", w)
    batch, channels, height, width = e.shape
    check_groups(stage, channels, w.shape[1])
    hidden = channels // 4
    shapes: dict[str, tuple[int, ...]] = {
        "w": (batch, w.shape[1], height, width),
        "squeeze_weight": (hidden, channels, 1, 1),
        "expand_weight": (channels, hidden, 1, 1),
        "fusion_weight": (channels, 2 * channels, 1, 1),
    }
    running: dict[str, tuple[int, ...]] = {}
    for index, size in ((1, hidden), (2, channels), (3, channels)):
        shapes |= {f"bn{index}_weight": (size,), f"bn{index}_bias": (size,)}
        running |= {f"running_mean{index}": (size,), f"running_var{index}": (size,)}
    _require(stage, a, e, {**shapes, **_running(a, running)})
    if a["training"]:
        check_batch_statistics(stage, e)


def _outputs_gated_fusion(a: Arguments) -> tuple[TensorSpec, ...]:
    e = a["e"]
    dtype, (batch, channels, height, width) = statistics_dtype(e.dtype), e.shape
    hidden, fmt = channels // 4, memory_format(e)
    kept: tuple[TensorSpec, ...] = (TensorSpec((0,), e.dtype), TensorSpec((0,), e.dtype))
    if a["save"]:
        sizes = (hidden, channels)
        kept = tuple(TensorSpec((batch, size, height, width), e.dtype, fmt) for size in sizes)
    counts = (hidden, channels, channels) if a["training"] else (0, 0, 0)
    statistics = tuple(TensorSpec((size,), dtype) for size in counts for _ in ("mean", "var"))
    return (TensorSpec(tuple(e.shape), e.dtype, fmt), *kept, *statistics)


CHECKS: Mapping[str, Callable[[Arguments], None]] = {
    "channel_statistics": _check_channel_statistics,
    "msff": _check_msff,
    "channel_interaction": _check_channel_interaction,
    "coordinate_attention": _check_coordinate_attention,
    "cross_spatial": _check_cross_spatial,
    "gated_fusion": _check_gated_fusion,
}
OUTPUTS: Mapping[str, Callable[[Arguments], tuple[TensorSpec, ...]]] = {
    "channel_statistics": _outputs_channel_statistics,
    "msff": _outputs_msff,
    "channel_interaction": _outputs_channel_interaction,
    "coordinate_attention": _outputs_coordinate_attention,
    "cross_spatial": _outputs_cross_spatial,
    "gated_fusion": _outputs_gated_fusion,
}
