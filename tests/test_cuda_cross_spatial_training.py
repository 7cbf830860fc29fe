"""cross_spatial's CUDA kernels for gradients on the CPU, under the emulator, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator import ORDERS, Report, emulate, emulated, missing_tool
from stage_cases import (
    OPS,
    Sizes,
    arguments,
    convert,
    error,
    layout_of,
    require_grad,
    tolerance,
)

from fused.backends import cuda
from fused.backends.cuda.launch import Launch, intercept
from fused.contract import memory_format

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)

OP = OPS["cross_spatial"]
FEW_CHANNELS = 0.2  # of a gradient that nearly cancels: see test_stages.py
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "sliced")
# Sizes, whether the batch's statistics are taken, and how they are shared: two groups of two
# samples, c = 6; a row, c = 1; a column of two tiles, c = 16; two tiles, c = 32; the wide form,
# c = 40; a pixel.
CASES = (
    (Sizes(2, 12, 3, 7, 2), True, "sequential"),
    (Sizes(2, 2, 1, 9, 2), True, "pooled"),
    (Sizes(1, 16, 9, 1, 1), False, "sequential"),
    (Sizes(1, 64, 2, 18, 2), True, "pooled"),
    (Sizes(1, 40, 5, 3, 1), True, "sequential"),
    (Sizes(1, 4, 1, 1, 2), False, "pooled"),
)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x in a layout; "sliced": the first channels of a wider channels_last map."""
    if layout != "sliced":
        return layout_of(x, layout)
    b, c, h, w = x.shape
    wide = torch.full((b, c + 8, h, w), torch.nan, dtype=x.dtype)
    return wide.to(memory_format=torch.channels_last)[:, :c].copy_(x)


def run(
    named: dict[str, Any], grad_w: torch.Tensor, dtype: torch.dtype, layout: str, backend: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and gradients, in the op's order."""
    args = convert("cross_spatial", named, dtype, "contiguous")
    args[0] = lay_out(args[0], layout)
    leaves = require_grad("cross_spatial", args)
    outputs = OP(*args, backend=backend)
    grads = torch.autograd.grad(outputs[0], leaves, grad_w.to(dtype))
    if backend == "cuda":
        assert memory_format(grads[0]) == memory_format(args[0])
    return [o.detach() for o in outputs], list(grads)


def rounded(case: tuple[Sizes, bool, str], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments with the map rounded to `dtype`: that is not the op's error."""
    sizes, training, bn_statistics = case
    named = arguments("cross_spatial", sizes, training, bn_statistics)
    return named | {"e": named["e"].to(dtype).double()}


def gradient_of(sizes: Sizes, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    shape = (sizes.batch, sizes.groups, sizes.height, sizes.width)
    return torch.randn(shape, generator=draw).to(dtype).double()


def compare(case: tuple[Sizes, bool, str], dtype: torch.dtype, layout: str) -> None:
    named, grad_w = rounded(case, dtype), gradient_of(case[0], dtype)
    want, want_grads = run(named, grad_w, torch.float64, "contiguous", "reference")
    got, grads = run(named, grad_w, dtype, layout, "cuda")
    for name, value, wanted in zip(OP.outputs, got, want, strict=True):
        assert error(value, wanted) <= tolerance(dtype)[0], (name, case)
    for name, value, wanted in zip(OP.gradients, grads, want_grads, strict=True):
        few = dtype == torch.bfloat16 and wanted.numel() < 8
        limit = FEW_CHANNELS if few else tolerance(dtype)[1]
        assert error(value, wanted) <= limit, (name, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_statistics_and_gradients(dtype: torch.dtype, layout: str) -> None:
    """Every dtype sees all cases, in layouts that differ from dtype to dtype."""
    first = 2 * (LAYOUTS.index(layout) + DTYPES.index(dtype))
    with emulated():
        for index in (first, first + 1):
            compare(CASES[index % len(CASES)], dtype, layout)


def test_parameters_of_the_maps_dtype() -> None:
    """Half precision without autocast: gradients come in the parameters' dtype."""
    dtype = torch.float16
    named = {
        name: value.to(dtype).double() if isinstance(value, torch.Tensor) else value
        for name, value in rounded((Sizes(1, 4, 3, 5, 2), True, "sequential"), dtype).items()
    }
    grad_w = gradient_of(Sizes(1, 4, 3, 5, 2), dtype)
    _, want = run(named, grad_w, torch.float64, "contiguous", "reference")
    statistics = {"alpha_h", "alpha_w", "mean", "rstd"}
    args = convert("cross_spatial", named, dtype, "contiguous")
    for index, name in enumerate(OP.inputs):
        if isinstance(args[index], torch.Tensor) and name not in statistics:
            args[index] = args[index].to(dtype)
    leaves = require_grad("cross_spatial", args)
    with emulated():
        w = OP(*args, backend="cuda")[0]
        grads = torch.autograd.grad(w, leaves, grad_w.to(dtype))
    for name, leaf, value, wanted in zip(OP.gradients, leaves, grads, want, strict=True):
        assert value.dtype == leaf.dtype
        assert error(value, wanted) <= tolerance(dtype)[1], name


def test_same_bits_in_every_order_and_eighteen_launches() -> None:
    case = (Sizes(2, 2, 2, 17, 1), True, "sequential")
    named, grad_w = rounded(case, torch.float16), gradient_of(case[0], torch.float16)
    runs, launches = [], []

    def check(launch: Launch, report: Report) -> None:
        assert report.findings == []
        launches.append(launch.entry)

    for order in ORDERS:
        launches.clear()
        with emulated(check, order):
            got, grads = run(named, grad_w, torch.float16, "contiguous", "cuda")
        runs.append([*got, *grads])
        assert len(launches) <= 18
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(other, runs[0], strict=True))


# The entries in which a barrier is missing with PLANT=1.
PLANTED = (
    "cross_spatial_recompute_float16",
    "cross_spatial_attention_backward_float16",
    "cross_spatial_features_backward_float16",
)


def test_planted_barriers_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one training step, whose other launches are sound."""
    case = (Sizes(1, 4, 3, 17, 1), True, "sequential")
    found: dict[str, set[str]] = {}

    def check(launch: Launch) -> None:
        plant = 1 if launch.entry in PLANTED else 0
        report = emulate(launch, ORDERS[len(found) % len(ORDERS)], plant)
        found[launch.entry] = found.get(launch.entry, set()) | report.kinds

    monkeypatch.setattr(cuda, "emulated", True)
    with intercept(check):
        named, grad_w = rounded(case, torch.float16), gradient_of(case[0], torch.float16)
        run(named, grad_w, torch.float16, "contiguous", "cuda")
    for entry in PLANTED:
        assert "race" in found[entry], entry
    assert not set().union(*(found[entry] for entry in found.keys() - set(PLANTED)))
