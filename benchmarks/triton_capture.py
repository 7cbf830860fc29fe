"""The launches that the triton backend's ops make at the paper's size, without making them.

Arguments are fake tensors on "cuda", so nothing is allocated or computed and the host code takes
the decisions that it takes on a GPU. Evaluation has its parameters in the maps' dtype, as after
`.half()`, and passes channel statistics from MSFF on; training has float32, as under autocast.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.stages import ARGUMENT_KEYS, OPS
from benchmarks.triton_compile import Target
from fused import FusedCIEMA, FusedMSFF
from fused.backends.triton import KERNELS, configs
from fused.backends.triton.launch import Launch, intercept, multiprocessors
from fused.contract import BN_STATISTICS, EPS, OUTPUTS, memory_format, statistics_dtype

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CHANNELS, GROUPS, SIZE = 1024, 32, 56
# (C_i, H_i = W_i) of the maps that go into MSFF.
FEATURES = ((128, 56), (512, 28), (1024, 14))

_MSFF_KEYS = {
    "weight": "fusion_conv.0.weight",
    "bn_weight": "fusion_conv.1.weight",
    "bn_bias": "fusion_conv.1.bias",
    "running_mean": "fusion_conv.1.running_mean",
    "running_var": "fusion_conv.1.running_var",
}


# One mode for all: fake tensors of different modes do not mix.
FAKE = FakeTensorMode()


@dataclass(frozen=True)
class Call:
    """One way to call a launcher: its name, and the mode that the arguments say."""

    op: str
    training: bool
    bn_statistics: str = BN_STATISTICS[0]
    layout: str = "contiguous"
    batch: int = 1

    @property
    def stage(self) -> str:
        """The stage that it belongs to."""
        return self.op.removesuffix("_backward").removesuffix("_mean")

    @property
    def is_backward(self) -> bool:
        """Whether it is a stage's backward."""
        return self.op.endswith("_backward")

    def __str__(self) -> str:
        mode = "training" if self.training else "frozen" if self.is_backward else "evaluation"
        if self.training and self.stage == "cross_spatial":
            mode += f" {self.bn_statistics}"
        return f"{self.op} {mode} {self.layout}"


def calls(ops: Iterable[str], layouts: Iterable[str]) -> list[Call]:
    """The launchers `ops` in every mode that they have and these layouts."""
    return [Call(op, *mode, layout) for op in ops for mode in _modes(op) for layout in layouts]


def _modes(op: str) -> list[tuple[bool, str]]:
    stage = op.removesuffix("_backward")
    usual = BN_STATISTICS[0]
    if op == "gated_fusion_mean":
        return [(False, usual)]
    modes = [(True, form) for form in BN_STATISTICS if form == usual or stage == "cross_spatial"]
    if op == stage or "training" in OPS[stage].inputs:
        modes.append((False, usual))
    return modes


def arguments(call: Call, dtype: torch.dtype) -> list[Any]:
    """Fake arguments of a call, in the order of the op's schema; inside the fake mode."""
    keeps_gradient = call.training or call.is_backward
    other = statistics_dtype(dtype) if keeps_gradient else dtype
    named = _forward_arguments(call, dtype, other, keeps_gradient)
    op = OPS[call.stage]
    if not call.is_backward:
        absent = ("training", "save") if call.op == "gated_fusion_mean" else ()
        return [named[name] for name in op.inputs if name not in absent]
    outputs = [
        torch.empty(spec.shape, dtype=spec.dtype, device="cuda")
        if len(spec.shape) != 4
        else _map(spec.shape, spec.dtype, spec.memory_format)
        for spec in OUTPUTS[call.stage](named)
    ]
    named |= dict(zip(op.outputs, outputs, strict=True))
    for name in op.differentiable:
        named[f"grad_{name}"] = torch.empty_like(named[name])
    return [named[name] for name in op.backward_inputs]


def _map(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", memory_format=layout)


def _forward_arguments(
    call: Call, dtype: torch.dtype, other: torch.dtype, keeps_gradient: bool
) -> dict[str, Any]:
    """Arguments of the forward by name; parameters in the dtype `other`."""
    layout = LAYOUTS[call.layout]
    x = _map((call.batch, CHANNELS, SIZE, SIZE), dtype, layout)
    named: dict[str, Any] = {
        "x": x,
        "e": x,
        "groups": GROUPS,
        "training": call.training,
        "bn_statistics": call.bn_statistics,
        "save": keeps_gradient,
    }
    named |= {name: EPS for name in OPS[call.stage].inputs if "eps" in name}
    named |= OPS[call.stage].defaults
    if not call.training:  # as in the network, where MSFF leaves statistics; training: alone
        specs = OUTPUTS["channel_statistics"]({"x": x})
        named |= {
            name: torch.empty(spec.shape, dtype=spec.dtype, device="cuda")
            for name, spec in zip(("x_mean", "x_maximum", "x_argmax"), specs, strict=True)
        }
        named["statistics"] = True
    if call.stage == "msff":
        named["features"] = [_map((call.batch, c, s, s), dtype, layout) for c, s in FEATURES]
    else:
        vectors = ("alpha_h", "alpha_w", "mean", "rstd")
        specs = OUTPUTS["coordinate_attention"]({"e": x, "groups": GROUPS})
        for name, spec in zip(vectors, specs, strict=True):
            named[name] = torch.empty(spec.shape, dtype=spec.dtype, device="cuda")
        named["w"] = _map((call.batch, GROUPS, SIZE, SIZE), dtype, memory_format(x))
    keys: Mapping[str, str] = ARGUMENT_KEYS.get(call.stage, {})
    tensors = module_tensors(call.stage == "msff", other)
    for name, key in (_MSFF_KEYS if call.stage == "msff" else keys).items():
        named[name] = None if call.training and "running" in name else tensors[key]
    return named


@functools.cache
def module_tensors(of_msff: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters and buffers of MSFF or CIEMA."""
    if of_msff:
        module: torch.nn.Module = FusedMSFF([c for c, _ in FEATURES], device="cuda", dtype=dtype)
    else:
        module = FusedCIEMA(CHANNELS, GROUPS, device="cuda", dtype=dtype)
    both = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.detach() for name, tensor in both}


@contextlib.contextmanager
def device(target: Target) -> Iterator[None]:
    """Let the launchers' host code see a GPU of `target`."""
    properties = SimpleNamespace(
        name=target.name,
        shared_memory_per_block_optin=target.shared_bytes,
        multi_processor_count=target.multiprocessors,
    )
    remembered = (configs.shared_bytes, multiprocessors)
    hip = None if target.is_nvidia else "7.0"
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.version, "hip", hip),
    ):
        for function in remembered:
            function.cache_clear()
        try:
            yield
        finally:
            for function in remembered:
                function.cache_clear()


def capture(
    call: Call, dtype: torch.dtype, target: Target, candidate: int | None = None
) -> list[Launch]:
    """The launches of one call on `target`, none of which is made.

    Args:
        call: what to call.
        dtype: of the maps.
        target: decides which configurations fit.
        candidate: take this configuration of every kernel (modulo their number); None: as a user
            would get them.
    """
    found: list[Launch] = []
    kernel = KERNELS[call.op]
    forced = contextlib.nullcontext() if candidate is None else configs.forced(candidate)
    with FAKE, device(target), forced, intercept(found.append), torch.no_grad():
        kernel(*arguments(call, dtype))
    return found
