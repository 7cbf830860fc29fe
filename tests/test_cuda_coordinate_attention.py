"""Coordinate attention's CUDA kernels on the CPU, under the emulator, against the float64 maths."""

from __future__ import annotations

import pytest
import torch
from emulator import ORDERS, Report, emulated, missing_tool
from stage_cases import (
    AWKWARD,
    OPS,
    Sizes,
    arguments,
    convert,
    differentiable,
    error,
    require_grad,
    tolerance,
)

from fused.backends.cuda import coordinate_attention
from fused.backends.cuda.launch import Launch
from fused.contract import LAUNCHES, Problem, cost, memory_format

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)

OP = "coordinate_attention"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Beside the awkward ones: whole vectors in both layouts, and the widest group.
SIZES = (*AWKWARD, Sizes(1, 64, 7, 16, 2), Sizes(1, 64, 3, 8, 1))


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x as the first channels of a wider map, or contiguous."""
    if layout == "contiguous":
        return x.contiguous()
    b, c, h, w = x.shape
    wide = torch.full((b, c + 8, h, w), torch.nan, dtype=x.dtype)
    if layout == "channels_last":
        wide = wide.to(memory_format=torch.channels_last)
    return wide[:, :c].copy_(x)


def outputs_and_gradients(
    named: dict, seeds: list[torch.Tensor], dtype: torch.dtype, layout: str, backend: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    args = convert(OP, named, dtype, "contiguous")
    args[0] = lay_out(args[0], layout)
    leaves = require_grad(OP, args)
    outputs = OPS[OP](*args, backend=backend)
    results = differentiable(OP, outputs)
    upstream = [seed.to(o) for seed, o in zip(seeds, results, strict=True)]
    return list(outputs), list(torch.autograd.grad(results, leaves, upstream))


def compare(sizes: Sizes, dtype: torch.dtype, layout: str) -> None:
    named = arguments(OP, sizes)
    named["e"] = named["e"].to(dtype).double()
    torch.manual_seed(1)
    (b, channels), (h, w) = (sizes.batch, sizes.channels), (sizes.height, sizes.width)
    seeds = [torch.randn(b, channels, n) for n in (h, w)]
    seeds += [torch.randn(b, channels) for _ in range(2)]
    want, want_grads = outputs_and_gradients(named, seeds, torch.float64, "contiguous", "reference")
    got, grads = outputs_and_gradients(named, seeds, dtype, layout, "cuda")
    for name, value, wanted in zip(OPS[OP].outputs, got, want, strict=True):
        assert error(value, wanted) <= tolerance(torch.float32)[0], (name, sizes)
    for index, (value, wanted) in enumerate(zip(grads, want_grads, strict=True)):
        limit = tolerance(dtype if index == 0 else torch.float32)[1]
        assert error(value, wanted) <= limit, (index, sizes)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(dtype: torch.dtype, layout: str) -> None:
    with emulated():
        for sizes in SIZES:
            compare(sizes, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_tables_too_long_for_shared_memory_lie_in_scratch(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(coordinate_attention, "SHARED_TABLES", 100)
    launches: list[Launch] = []

    def check(launch: Launch, report: Report) -> None:
        assert report.findings == []
        launches.append(launch)

    with emulated(check):
        compare(Sizes(2, 12, 9, 7, 2), torch.float32, layout)
    assert ["tables" in launch.scratch for launch in launches] == [True, True, False]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_shared_memory_fits_every_gpu(layout: str) -> None:
    """99 KB a block: the widest group, and the longest tables that are not in scratch."""
    kernel, moments, coefficients = 64 * 68, 3 * 8 * 64, 3 * 64
    limit = coordinate_attention.SHARED_TABLES
    assert 4 * (kernel + moments + coefficients + limit) <= 99 * 1024
    e = lay_out(torch.zeros(1, 64, 40, 40), layout)
    assert coordinate_attention._tables(e, 1, 3) is None
    e = lay_out(torch.zeros(1, 64, 60, 60), layout)
    tables = coordinate_attention._tables(e, 1, 3)
    assert tables is not None
    assert tables.shape[1] > limit


@pytest.mark.parametrize("value", [0.3, -1.7])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_flat_maps_have_no_variance(value: float, layout: str) -> None:
    """u − mean is 0, not rounding that the slope of rstd, 3e7, would lift out of the noise."""
    sizes = Sizes(1, 16, 7, 16, 1)
    named = arguments(OP, sizes)
    named["e"] = torch.full_like(named["e"], value)
    seeds = [torch.zeros(1, 16, 7), torch.zeros(1, 16, 16), torch.zeros(1, 16), torch.ones(1, 16)]
    with emulated():
        got, grads = outputs_and_gradients(named, seeds, torch.float32, layout, "cuda")
    assert torch.equal(got[3], torch.full_like(got[3], 1e-5).rsqrt())
    assert grads[0].abs().max() == 0


def test_same_bits_in_every_order() -> None:
    named = arguments(OP, Sizes(2, 24, 9, 8, 2))
    seeds = [torch.ones(2, 24, 9), torch.ones(2, 24, 8), torch.ones(2, 24), torch.ones(2, 24)]
    runs = []
    for order in ORDERS:
        with emulated(order=order):
            got, grads = outputs_and_gradients(named, seeds, torch.float32, "contiguous", "cuda")
        runs.append([*got, *grads])
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def of_map(report: Report, kind: str, names: tuple[str, ...]) -> tuple[int, int]:
    """Bytes, and bytes of the sectors that they took, of accesses to global memory by 16 bytes."""
    sites = [
        site
        for site in report.sites
        if site["space"] == "global" and site["kind"] == kind and site["bytes_per_lane"] == 16
    ]
    assert all(any(name in site["site"] for name in names) for site in sites)
    return sum(site["bytes"] for site in sites), 32 * sum(site["units"] for site in sites)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_slab_is_read_three_times_and_once_from_device_memory(layout: str) -> None:
    """The contract's pass is that from device memory; the next two find the slab in the cache."""
    sizes, dtype = Sizes(1, 64, 16, 16, 2), torch.float16
    launches: list[tuple[Launch, Report]] = []
    with emulated(lambda launch, report: launches.append((launch, report))):
        compare(sizes, dtype, "contiguous" if layout == "contiguous" else layout)
    assert len(launches) == LAUNCHES["cuda"][OP][0] + LAUNCHES["cuda"][OP][2]
    problem = Problem(sizes.batch, sizes.channels, sizes.height, sizes.width, sizes.groups)
    once = cost(OP, problem, dtype=dtype).bytes
    slab = once // (sizes.batch * sizes.groups)
    assert slab <= 1 << 20, "a slab fits the second-level cache"
    for _, report in launches[:2]:
        assert report.findings == []
        read, sectors = of_map(report, "read", ("coordinate_slab",))
        assert read == 3 * once
        assert sectors <= 1.3 * read
    written, sectors = of_map(launches[1][1], "write", ("coordinate_attention",))
    both = cost(OP, problem, dtype=dtype, direction="backward").bytes
    assert written == sectors == both - once


# PLANT=n of the kernels: what must be found, and the layout
PLANTS = {
    1: ("race", "channels_last"),
    2: ("out-of-bounds", "contiguous"),
    3: ("race", "contiguous"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_is_found(plant: int) -> None:
    kind, layout = PLANTS[plant]
    args = convert(OP, arguments(OP, Sizes(1, 6, 9, 5, 1)), torch.float32, layout)
    for order in ORDERS:
        reports: list[Report] = []
        with emulated(lambda _, r: reports.append(r), order, plant):  # noqa: B023
            OPS[OP](*args, backend="cuda")
        assert kind in reports[0].kinds, reports[0].findings


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_has_the_maps_memory_format(layout: str) -> None:
    named = arguments(OP, Sizes(1, 16, 3, 4, 2))
    args = convert(OP, named, torch.float32, layout)
    require_grad(OP, args)
    with emulated():
        sum(o.sum() for o in OPS[OP](*args, backend="cuda")).backward()
    assert memory_format(args[0].grad) == memory_format(args[0])
