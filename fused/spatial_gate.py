"""Coordinate attention and cross-spatial learning in one call: e → w, in evaluation.

`ciema::spatial_gate` computes what `ciema::coordinate_attention` and then `ciema::cross_spatial`
compute (spec.md 2.2, 2.3), without a gradient. A backend that has a kernel for both runs it; the
others run their two kernels one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import backends, ops
from .contract import CHECKS, OUTPUTS
from .registration import LIBRARY

NAME = "spatial_gate"
LIBRARY.define(
    f"{NAME}(Tensor e, Tensor conv1x1_weight, Tensor conv1x1_bias, float gn_eps,"
    f" {ops.CROSS_PARAMETERS}, *, str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of coordinate attention, and of cross-spatial learning behind its vectors."""
    e, weight, bias, gn_eps, *rest = args
    groups = rest[ops.CROSS_PARAMETERS.split(", ").index("int groups")]
    return (e, weight, bias, groups, gn_eps), tuple(rest)


def _run(*args: Any, backend: str = "auto") -> torch.Tensor:
    first, rest = _split(args)
    e, groups = first[0], first[3]
    CHECKS["coordinate_attention"](dict(zip(ops.coordinate_attention.inputs, first, strict=True)))
    chosen = backends.choose("cross_spatial", e, backend, groups)
    with torch.autocast(e.device.type, enabled=False):
        both: Callable[..., Any] | None = chosen.kernels.get(NAME)
        if both is not None:
            joint: torch.Tensor = both(*args)
            return joint
        one = backends.choose("coordinate_attention", e, backend, groups)
        vectors: Any = one.kernels["coordinate_attention"](*first)
        inputs = (e, *vectors, *rest)
        CHECKS["cross_spatial"](dict(zip(ops.cross_spatial.inputs, inputs, strict=True)))
        results: Any = chosen.kernels["cross_spatial"](*inputs)
    w: torch.Tensor = results[0]
    return w


def _autocast(key: str) -> Callable[..., torch.Tensor]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{key}"))

    def run(e: torch.Tensor, *rest: Any, backend: str = "auto") -> torch.Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if e.dtype != torch.float64:
                e = e.to(torch.get_autocast_dtype(key.lower()))
            out: torch.Tensor = torch.ops.ciema.spatial_gate.default(e, *rest, backend=backend)
            return out

    return run


def _fake(*args: Any, backend: str = "auto") -> torch.Tensor:
    first, rest = _split(args)
    e = first[0]
    named = dict(zip(ops.cross_spatial.inputs[5:], rest, strict=True)) | {"e": e}
    spec = OUTPUTS["cross_spatial"](named)[0]
    return e.new_empty(spec.shape, dtype=spec.dtype)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl(NAME, _run, _key)
    LIBRARY.impl(NAME, _autocast(_key), f"Autocast{_key}")
torch.library.register_fake(f"ciema::{NAME}", _fake, lib=LIBRARY)


def spatial_gate(*args: Any, backend: str | None = None) -> torch.Tensor:
    """The gate w (B, G, H, W), dtype of e; arguments as in the schema, `training` False.

    With `backend="reference"` this is plain PyTorch, as the stages' ops are.
    """
    name = backends.requested(backend)
    if name != "reference":
        w: torch.Tensor = torch.ops.ciema.spatial_gate.default(*args, backend=name)
        return w
    first, rest = _split(args)
    vectors = ops.coordinate_attention(*first, backend=name)
    plain: torch.Tensor = ops.cross_spatial(first[0], *vectors, *rest, backend=name)[0]
    return plain
