"""cross_spatial's CUDA kernels for training on the CPU, under the emulator, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator import ORDERS, Report, emulated, missing_tool
from stage_cases import OPS, Sizes, arguments, convert, error, require_grad, tolerance

from fused.backends.cuda import cross_spatial_backward, cross_spatial_training
from fused.backends.cuda.launch import Launch

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)

OP = "cross_spatial"
FEW_CHANNELS = 0.2  # see test_stages.py
OPTION_NAMES = ("attention_running_mean", "attention_running_var", "training")
OPTION_NAMES += ("reduce_running_mean", "reduce_running_var")


def rounded(named: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The map rounded to `dtype`: that is not the op's error."""
    return named | {"e": named["e"].to(dtype).double()}


def named_arguments(named: dict[str, Any], dtype: torch.dtype, layout: str) -> dict[str, Any]:
    """Converted arguments of the forward, by name."""
    values = convert(OP, named, dtype, layout)
    return dict(zip(OPS[OP].inputs, values, strict=True))


def run_forward(named: dict[str, Any], dtype: torch.dtype, layout: str) -> dict[str, torch.Tensor]:
    given = named_arguments(named, dtype, layout)
    given = {name: value for name, value in given.items() if name not in OPTION_NAMES}
    return dict(zip(OPS[OP].outputs, cross_spatial_training.forward(**given), strict=True))


def compare_forward(sizes: Sizes, bn_statistics: str, dtype: torch.dtype, layout: str) -> None:
    named = rounded(arguments(OP, sizes, True, bn_statistics), dtype)
    args = convert(OP, named, torch.float64, "contiguous")
    want = dict(zip(OPS[OP].outputs, OPS[OP](*args, backend="reference"), strict=True))
    got = run_forward(named, dtype, layout)
    for name, value in want.items():
        assert error(got[name], value) <= tolerance(dtype)[0], (name, sizes)


def compare_backward(
    sizes: Sizes, training: bool, bn_statistics: str, dtype: torch.dtype, layout: str
) -> None:
    """Gradients from the float64 outputs, so that a backward's error is its own."""
    named = rounded(arguments(OP, sizes, training, bn_statistics), dtype)
    args = convert(OP, named, torch.float64, "contiguous")
    leaves = require_grad(OP, args)
    outputs = OPS[OP](*args, backend="reference")
    torch.manual_seed(2)
    grad_w = torch.randn_like(outputs[0]).to(dtype).double()
    want = torch.autograd.grad(outputs[0], leaves, grad_w)
    saved = dict(zip(OPS[OP].outputs, outputs, strict=True))
    small = {name: value.detach().float() for name, value in saved.items() if name != "w"}
    given = named_arguments(named, dtype, layout)
    w = saved["w"].detach().to(dtype)
    got = cross_spatial_backward.backward(grad_w=grad_w.to(dtype), **given, w=w, **small)
    # As in test_stages: a gradient of a few channels may nearly cancel over the pixels.
    for index, (value, wanted) in enumerate(zip(got, want, strict=True)):
        limit = tolerance(dtype)[1]
        if wanted.numel() < 8 and dtype == torch.bfloat16:
            limit = FEW_CHANNELS
        assert error(value, wanted) <= limit, (OPS[OP].gradients[index], sizes, training)


# Tails of tiles, a row, a column, c = 1, 6, 16 and 32, several samples; c = 40 in the widest form.
SIZES = (
    *(Sizes(2, 12, 9, 17, 2), Sizes(2, 2, 1, 9, 2), Sizes(3, 16, 6, 1, 1)),
    *(Sizes(1, 64, 8, 18, 2), Sizes(1, 40, 5, 3, 1)),
)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_forward(dtype: torch.dtype, layout: str) -> None:
    with emulated():
        for index, sizes in enumerate(SIZES):
            compare_forward(sizes, ("sequential", "pooled")[index % 2], dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype, layout: str) -> None:
    modes = ((True, "sequential"), (True, "pooled"), (False, "sequential"))
    with emulated():
        for index, sizes in enumerate(SIZES):
            compare_backward(sizes, *modes[index % 3], dtype, layout)
