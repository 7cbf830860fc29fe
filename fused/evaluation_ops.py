"""Ops of evaluation, without a gradient: what several stages, or a stage and its reader, do in one.

`spatial_gate` is coordinate attention and cross-spatial learning (spec.md 2.2, 2.3), e → w;
`gated_fusion_mean` is gated fusion reduced to the means that a classifier's head reads (spec.md
5.6), without its map. A backend that has a kernel runs it; the others run the stages' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import backends, ops
from .contract import CHECKS, OUTPUTS, check_cross_spatial_parameters, statistics_dtype
from .registration import DEVICE_KEYS, LIBRARY, refuse_derivatives


class EvaluationOp:
    """`ciema::<name>`; call it as a function of its arguments in the schema's order.

    Attributes:
        name: the op, and the key of a backend's kernel.
        maps: how many of the first arguments are maps; autocast casts these and nothing else.
        plain: the same by the stages' ops on backend "reference", plain PyTorch.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        maps: int,
        run: Callable[..., torch.Tensor],
        fake: Callable[..., torch.Tensor],
        plain: Callable[..., torch.Tensor],
    ) -> None:
        """Define and register it; `run` and `fake` take the arguments, `run` `backend` too."""
        self.name, self.maps, self.plain = name, maps, plain
        self._run = run
        tags = (torch.Tag.pt2_compliant_tag,)
        LIBRARY.define(f"{name}({arguments}, *, str backend='auto') -> Tensor", tags=tags)
        self.op = getattr(torch.ops.ciema, name).default
        for key in DEVICE_KEYS:
            LIBRARY.impl(name, self._without_autocast, key)
            LIBRARY.impl(name, self._autocast(key), f"Autocast{key}")
        torch.library.register_fake(
            f"ciema::{name}", lambda *args, backend="auto": fake(*args), lib=LIBRARY
        )
        # Without it a backward would give zeros and a warning of torch's.
        torch.library.register_autograd(
            f"ciema::{name}",
            self._refuse_gradient,
            setup_context=self._refuse_gradient,
            lib=LIBRARY,
        )

    def __call__(self, *args: Any, backend: str | None = None) -> torch.Tensor:
        """The result; with `backend="reference"` in plain PyTorch, as the stages' ops are."""
        name = backends.requested(backend)
        if name == "reference":
            return self.plain(*args)
        refuse_derivatives(self.name, args)
        out: torch.Tensor = self.op(*args, backend=name)
        return out

    def _refuse_gradient(self, *args: Any, **named: Any) -> None:
        raise RuntimeError(
            f"ciema::{self.name} has no gradient, but one is asked for; it is for evaluation, the "
            "stages' own ops have one"
        )

    def _without_autocast(self, *args: Any, backend: str = "auto") -> torch.Tensor:
        with torch.autocast(args[0].device.type, enabled=False):
            return self._run(*args, backend=backend)

    def _autocast(self, key: str) -> Callable[..., torch.Tensor]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{key}"))

        def run(*args: Any, backend: str = "auto") -> torch.Tensor:
            dtype = torch.get_autocast_dtype(key.lower())
            with torch._C._ExcludeDispatchKeyGuard(keys):
                maps = (m if m.dtype == torch.float64 else m.to(dtype) for m in args[: self.maps])
                out: torch.Tensor = self.op(*maps, *args[self.maps :], backend=backend)
                return out

        return run


def _check(stage: ops.StageOp, args: tuple[Any, ...]) -> None:
    CHECKS[stage.name](dict(zip(stage.inputs, args, strict=True)))


# ------------------------------------------------------------------------------------ spatial_gate


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of coordinate attention, and of cross-spatial learning behind its vectors."""
    e, weight, bias, gn_eps, *rest = args
    groups = rest[ops.CROSS_PARAMETERS.split(", ").index("int groups")]
    return (e, weight, bias, groups, gn_eps), tuple(rest)


def _named(e: torch.Tensor, rest: tuple[Any, ...]) -> dict[str, Any]:
    """Cross-spatial learning's arguments by name, without the vectors."""
    return dict(zip(ops.cross_spatial.inputs[5:], rest, strict=True)) | {"e": e}


def _check_spatial_gate(first: tuple[Any, ...], rest: tuple[Any, ...]) -> None:
    if _named(first[0], rest)["training"]:
        raise ValueError("spatial_gate: training=True, it is for evaluation")
    _check(ops.coordinate_attention, first)
    check_cross_spatial_parameters(_named(first[0], rest))


def _spatial_gate(*args: Any, backend: str) -> torch.Tensor:
    first, rest = _split(args)
    e, groups = first[0], first[3]
    _check_spatial_gate(first, rest)
    chosen = backends.choose("cross_spatial", e, backend, groups)
    both: Callable[..., Any] | None = chosen.kernels.get("spatial_gate")
    if both is not None:
        joint: torch.Tensor = both(*args)
        return joint
    one = backends.choose("coordinate_attention", e, backend, groups)
    vectors: Any = one.kernels["coordinate_attention"](*first)
    results: Any = chosen.kernels["cross_spatial"](e, *vectors, *rest)
    w: torch.Tensor = results[0]
    return w


def _fake_spatial_gate(*args: Any) -> torch.Tensor:
    first, rest = _split(args)
    e = first[0]
    _check_spatial_gate(first, rest)
    spec = OUTPUTS["cross_spatial"](_named(e, rest))[0]
    return e.new_empty(spec.shape, dtype=spec.dtype)


def _plain_spatial_gate(*args: Any) -> torch.Tensor:
    first, rest = _split(args)
    vectors = ops.coordinate_attention(*first, backend="reference")
    w: torch.Tensor = ops.cross_spatial(first[0], *vectors, *rest, backend="reference")[0]
    return w


# The gate w (B, G, H, W), dtype of e; `training` must be False.
spatial_gate = EvaluationOp(
    "spatial_gate",
    f"Tensor e, Tensor conv1x1_weight, Tensor conv1x1_bias, float gn_eps, {ops.CROSS_PARAMETERS}",
    maps=1,
    run=_spatial_gate,
    fake=_fake_spatial_gate,
    plain=_plain_spatial_gate,
)

# ------------------------------------------------------------------------------- gated_fusion_mean


def _with_flags(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of gated fusion: neither `training` nor `save`."""
    return (*args[:-3], False, *args[-3:], False)


def _gated_fusion_mean(*args: Any, backend: str) -> torch.Tensor:
    e, w, *_ = args
    whole = _with_flags(args)
    _check(ops.gated_fusion, whole)
    chosen = backends.choose("gated_fusion", e, backend, w.shape[1])
    reduced: Callable[..., Any] | None = chosen.kernels.get("gated_fusion_mean")
    if reduced is not None:
        means: torch.Tensor = reduced(*args)
        return means
    results: Any = chosen.kernels["gated_fusion"](*whole)
    return _means(results[0])


def _means(out: torch.Tensor) -> torch.Tensor:
    return out.mean((2, 3), dtype=statistics_dtype(out.dtype))


def _fake_gated_fusion_mean(*args: Any) -> torch.Tensor:
    e: torch.Tensor = args[0]
    _check(ops.gated_fusion, _with_flags(args))
    return e.new_empty(e.shape[:2], dtype=statistics_dtype(e.dtype))


def _plain_gated_fusion_mean(*args: Any) -> torch.Tensor:
    return _means(ops.gated_fusion(*_with_flags(args), backend="reference")[0])


# The means of evaluation's out over H×W, (B, C), float32, or float64 of float64 maps.
gated_fusion_mean = EvaluationOp(
    "gated_fusion_mean",
    f"Tensor e, Tensor w, {ops.FUSION_PARAMETERS.replace(' bool training,', '')}",
    maps=2,
    run=_gated_fusion_mean,
    fake=_fake_gated_fusion_mean,
    plain=_plain_gated_fusion_mean,
)
