"""Arguments of every stage for given sizes: what the stage tests and the op tests run on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import emulator
import pytest
import torch

from fused import backends, ops
from fused.backends import BACKENDS
from fused.backends.triton import INTERPRETER
from fused.contract import EPS, TOLERANCES, statistics_dtype

OPS = {op.name: op for op in ops.STAGE_OPS}
LAYOUTS = ("contiguous", "channels_last", "strided", "transposed")
MODES = [(False, "sequential"), (True, "sequential"), (True, "pooled")]
# float32 means float32: a GPU's convolutions would round to tf32 unless told.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@dataclass(frozen=True)
class Place:
    """Where a test runs: a device, and one backend, or (None) all that can run there."""

    device: str
    backend: str | None = None

    def __str__(self) -> str:
        if self.device == "cpu":
            how = "emulated" if self.backend == "cuda" else "interpreted"
            return "cpu" if self.backend is None else f"{how}-{self.backend}"
        return f"gpu-{self.backend}"


# The kernels of the backend "cuda" run on the CPU too, see tests/emulator.
EMULATED = Place("cpu", "cuda")
GPU = torch.cuda.is_available()
# On a GPU the reference's products are the library's, which rounds z to half precision before the
# ReLU as eager PyTorch does: where that turns a sign, a pixel's gradient is lost or made up. One of
# 18 pixels gave 0.155 on an H100.
LIBRARY_SIGNS = {torch.bfloat16: 0.2, torch.float16: 0.05}
# The same tests run on the GPU where there is one; `-k gpu-triton` takes one backend's.
GPU_BACKENDS = ("reference", "triton", "cuda") if GPU else ()
PLACES = (Place("cpu"), *(Place("cuda", name) for name in GPU_BACKENDS))
if emulator.missing_tool() is None:
    PLACES = (*PLACES, EMULATED)
if INTERPRETER:  # a process of its own, in which nothing else is worth the time
    PLACES = (Place("cpu", "triton"),)
DEVICES = [pytest.param("cpu"), *([pytest.param("cuda", id="gpu")] if GPU else [])]


@contextlib.contextmanager
def chosen(backend: str) -> Iterator[str | None]:
    """The `backend=` under which the ops run this backend's kernels, forward and backward.

    "reference" as an argument would mean its plain maths and PyTorch's own backward; its kernels
    are what auto comes to when there is nothing else.
    """
    with pytest.MonkeyPatch.context() as patch:
        if backend == "reference":
            patch.setattr(backends, "BACKENDS", {"reference": BACKENDS["reference"]})
        yield None if backend == "reference" else backend


def modes(op: str) -> list[tuple[bool, str]]:
    """Training modes that make a difference to an op."""
    if op == "cross_spatial":
        return MODES
    return MODES[:2] if op in ("msff", "gated_fusion") else MODES[:1]


def backends_for(op: str, dtype: torch.dtype, place: Place) -> list[str]:
    """The backends that can run an op here; all must agree."""
    x = torch.zeros(1, 4, 2, 2, dtype=dtype, device=place.device)
    asked = list(BACKENDS) if place.backend is None else [place.backend]
    reasons = {name: BACKENDS[name].why_not(op, x) for name in asked}
    if all(reasons.values()):
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return [name for name, reason in reasons.items() if reason is None]


@dataclass(frozen=True)
class Sizes:
    """Sizes of CIEMA's input."""

    batch: int
    channels: int
    height: int
    width: int
    groups: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.height}x{self.width}g{self.groups}"


# Odd, 1×1, one row, one column, tails, c not a power of two, one group, one sample, c = C.
AWKWARD = (
    Sizes(2, 24, 7, 5, 4),
    Sizes(1, 12, 1, 1, 4),
    Sizes(2, 16, 1, 9, 2),
    Sizes(3, 10, 6, 1, 2),
    Sizes(1, 32, 13, 17, 1),
    Sizes(2, 8, 4, 4, 8),
)


def layout_of(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x in another layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = x.new_zeros(*x.shape[:3], 2 * x.shape[3] + 1)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x.contiguous()


class Draw:
    """Random float64 tensors that float32 can hold."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).double()

    def weight(self, *shape: int) -> torch.Tensor:
        fan_in = max(1, torch.Size(shape[1:]).numel())
        return self.normal(*shape, scale=fan_in**-0.5)

    def norm(self, size: int, training: bool) -> dict[str, torch.Tensor | None]:
        values = {
            "weight": 1 + self.normal(size, scale=0.1),
            "bias": self.normal(size, scale=0.1),
            "mean": self.normal(size, scale=0.1),
            "var": 1 + self.normal(size, scale=0.2).abs(),
        }
        if training:
            values |= {"mean": None, "var": None}
        return values


def _norm(draw: Draw, pattern: str, running: str, size: int, training: bool) -> dict[str, Any]:
    n = draw.norm(size, training)
    return {
        pattern.format("weight"): n["weight"],
        pattern.format("bias"): n["bias"],
        running.format("mean"): n["mean"],
        running.format("var"): n["var"],
    }


def _cross_spatial(draw: Draw, s: Sizes, training: bool, bn_statistics: str) -> dict[str, Any]:
    c = s.channels // s.groups
    e = draw.normal(s.batch, s.channels, s.height, s.width)
    values: dict[str, Any] = {
        "e": e,
        "alpha_h": draw.normal(s.batch, s.channels, s.height).sigmoid(),
        "alpha_w": draw.normal(s.batch, s.channels, s.width).sigmoid(),
        "mean": draw.normal(s.batch, s.channels, scale=0.1),
        "rstd": 1 + draw.normal(s.batch, s.channels).abs(),
        "gn_weight": 1 + draw.normal(c, scale=0.1),
        "gn_bias": draw.normal(c, scale=0.1),
        "conv3x3_weight": draw.weight(c, c, 3, 3),
        "conv3x3_bias": draw.normal(c, scale=0.1),
        "spatial_conv1_weight": draw.weight(c, c, 1, 1),
        "spatial_conv3_weight": draw.weight(c, c, 3, 3),
        "spatial_conv5_weight": draw.weight(c, c, 5, 5),
        "attention_weight": draw.weight(3 * c, 3 * c, 1, 1),
        "reduce_weight": draw.weight(c, 3 * c, 1, 1),
        "channel_feat_weight": draw.weight(c, c, 1, 1),
        "alpha": 1 + draw.normal(1, scale=0.1),
        "groups": s.groups,
        "training": training,
        "bn_statistics": bn_statistics,
        "attention_eps": EPS,
        "reduce_eps": EPS,
    }
    values |= _norm(draw, "attention_bn_{}", "attention_running_{}", 3 * c, training)
    return values | _norm(draw, "reduce_bn_{}", "reduce_running_{}", c, training)


def arguments(
    name: str, s: Sizes, training: bool = False, bn_statistics: str = "sequential", seed: int = 0
) -> dict[str, Any]:
    """Float64 arguments of the op `name`, by name."""
    draw = Draw(seed)
    x = draw.normal(s.batch, s.channels, s.height, s.width)
    if name == "channel_statistics":
        return {"x": x}
    if name == "channel_interaction":
        hidden = max(s.channels // 4, 1)
        return {
            "x": x,
            "squeeze_weight": draw.weight(hidden, s.channels),
            "excite_weight": draw.weight(s.channels, hidden),
            "interaction_weight": draw.weight(s.channels, s.channels, 1, 1),
        }
    c = s.channels // s.groups
    if name == "coordinate_attention":
        weight, bias = draw.weight(c, c, 1, 1), draw.normal(c, scale=0.1)
        return {"e": x, "weight": weight, "bias": bias, "groups": s.groups, "eps": EPS}
    if name == "cross_spatial":
        return _cross_spatial(draw, s, training, bn_statistics)
    if name == "gated_fusion":
        hidden = s.channels // 4
        values: dict[str, Any] = {
            "e": x,
            "w": draw.normal(s.batch, s.groups, s.height, s.width).sigmoid(),
            "squeeze_weight": draw.weight(hidden, s.channels, 1, 1),
            "expand_weight": draw.weight(s.channels, hidden, 1, 1),
            "fusion_weight": draw.weight(s.channels, 2 * s.channels, 1, 1),
            "training": training,
            "save": True,
        }
        for index, size in ((1, hidden), (2, s.channels), (3, s.channels)):
            running = f"running_{{}}{index}"
            values |= _norm(draw, f"bn{index}_{{}}", running, size, training)
            values[f"eps{index}"] = EPS
        return values
    small = draw.normal(s.batch, 6, max(s.height // 2, 1), max(s.width // 3, 1))
    values = {
        "features": [x, small],
        "weight": draw.weight(s.channels, s.channels + 6, 1, 1),
        "training": training,
        "eps": EPS,
    }
    return values | _norm(draw, "bn_{}", "running_{}", s.channels, training)


def convert(
    op: str, named: dict[str, Any], dtype: torch.dtype, layout: str, device: str = "cpu"
) -> list[Any]:
    """Arguments in the op's order: maps in `dtype` and `layout`, the rest as in training."""
    stage, other = OPS[op], statistics_dtype(dtype)

    def one(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [one(name, v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        if name in stage.maps:
            return layout_of(value.to(device, dtype), layout)
        return value.to(device, other)

    values = stage.defaults | named
    return [one(name, values[name]) for name in stage.inputs]


def require_grad(op: str, args: Sequence[Any]) -> list[torch.Tensor]:
    """Turn on gradients of the op's differentiable inputs; return these, lists flattened."""
    leaves: list[torch.Tensor] = []
    for name, value in zip(OPS[op].inputs, args, strict=True):
        if name in OPS[op].gradients:
            leaves += value if isinstance(value, list) else [value]
    for leaf in leaves:
        leaf.requires_grad_()
    return leaves


def differentiable(op: str, outputs: Any) -> list[torch.Tensor]:
    """The outputs that carry a gradient."""
    names = OPS[op].outputs
    return [o for name, o in zip(names, outputs, strict=True) if name in OPS[op].differentiable]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖, against at least 0.1·sqrt(numel) where want vanishes (golden)."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    floor = max(want.norm().item(), 0.1 * want.numel() ** 0.5)
    return (got - want).norm().item() / floor if want.numel() else 0.0


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """(output, gradient) tolerance of goals.md."""
    return TOLERANCES[dtype]
