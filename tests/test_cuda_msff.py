"""Multi-scale fusion's CUDA kernels under the emulator, against the float64 maths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulator import ORDERS, Report, emulate, emulated, missing_tool
from stage_cases import OPS, Draw, convert, error, layout_of, require_grad, tolerance

from fused.backends.cuda import msff, product
from fused.backends.cuda.launch import Launch
from fused.contract import EPS, memory_format

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)

OP = "msff"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Samples, C_out and the maps' (C, H, W): sizes that divide and that do not, lines shorter than a
# run, a target size that no map has, two maps of the target size, one map, maps of one pixel.
CASES: list[tuple[int, int, list[tuple[int, int, int]]]] = [
    (2, 24, [(6, 8, 16), (10, 4, 8), (3, 2, 4)]),
    (1, 40, [(5, 3, 4), (9, 7, 11), (12, 5, 2)]),
    (3, 7, [(4, 9, 2), (8, 3, 5)]),
    (2, 16, [(8, 5, 7), (3, 5, 7), (4, 1, 1)]),
    (1, 33, [(20, 6, 6)]),
    (2, 5, [(3, 1, 1), (2, 1, 1)]),
]


def arguments(case: int, training: bool) -> dict[str, Any]:
    """Float64 arguments by name."""
    batch, rows, maps = CASES[case]
    draw = Draw(case)
    norm = draw.norm(rows, training)
    return {
        "features": [draw.normal(batch, *size) for size in maps],
        "weight": draw.weight(rows, sum(c for c, _, _ in maps), 1, 1),
        **{"bn_weight": norm["weight"], "bn_bias": norm["bias"]},
        **{"running_mean": norm["mean"], "running_var": norm["var"]},
        **{"training": training, "eps": EPS},
    }


def rounded(named: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return named | {"features": [f.to(dtype).double() for f in named["features"]]}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_forward(case: int, dtype: torch.dtype, layout: str) -> None:
    for training in (False, True):
        named = rounded(arguments(case, training), dtype) | {"statistics": True}
        want = OPS[OP](*convert(OP, named, torch.float64, "contiguous"), backend="reference")
        args = convert(OP, named, dtype, layout)
        with emulated():
            got = OPS[OP](*args, backend="cuda")
        for name, one, exact in zip(OPS[OP].outputs, got, want, strict=True):
            limit = tolerance(dtype)[0]
            if name == "argmax":  # of out as it was rounded
                exact = got[0].flatten(2).max(2)[1]
            assert error(one, exact) <= limit, (name, training)
        assert memory_format(got[0]) == memory_format(args[0][0])


def test_resize_is_exactly_pytorchs() -> None:
    """With W = 1 a map of one channel is itself, and out is its resized sum."""
    sizes = [(56, 56), (14, 14), (28, 7), (1, 3), (55, 56), (13, 41)]
    draw = Draw(3)
    maps = [draw.normal(1, 1, *size) for size in sizes]
    ones = torch.ones(1)
    norm = [ones, ones * 100, ones * 0, ones * (1 - EPS)]
    args = [maps, torch.ones(1, len(maps), 1, 1), *norm, False, EPS]
    want = OPS[OP](*(a.double() if isinstance(a, torch.Tensor) else a for a in args),
                   backend="reference")[0]  # fmt: skip
    for layout in ("contiguous", "channels_last"):
        args[0] = [layout_of(m.float(), layout) for m in maps]
        with emulated():
            got = OPS[OP](*args, backend="cuda")[0]
        torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [False, True])
def test_every_tile_in_every_order_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, training: bool, layout: str
) -> None:
    for tile in range(len(product.TILES)):
        dtype = DTYPES[tile]
        monkeypatch.setattr(product, "choose_tile", lambda *_, tile=tile: tile)
        named = rounded(arguments(1, training), dtype)
        want = OPS[OP](*convert(OP, named, torch.float64, "contiguous"), backend="reference")
        runs = []
        for order in ORDERS:
            with emulated(order=order):
                runs.append(OPS[OP](*convert(OP, named, dtype, layout), backend="cuda"))
        assert error(runs[0][0], want[0]) <= tolerance(dtype)[0]
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients(training: bool, layout: str) -> None:
    named, dtype = arguments(0, training), torch.float32
    exact = convert(OP, named, torch.float64, "contiguous")
    leaves = require_grad(OP, exact)
    out = OPS[OP](*exact, backend="reference")[0]
    seed = torch.randn_like(out)
    want = torch.autograd.grad(out, leaves, seed)
    args = convert(OP, named, dtype, layout)
    leaves = require_grad(OP, args)
    with emulated():
        out = OPS[OP](*args, backend="cuda")[0]
        got = torch.autograd.grad(out, leaves, seed.to(dtype))
    for one, right in zip(got, want, strict=True):
        assert error(one, right) <= tolerance(dtype)[1]


def test_batch_statistics_do_not_lose_a_large_mean() -> None:
    """Variance of z around a mean a thousand times its deviation."""
    draw = Draw(1)
    x = 1000 + draw.normal(3, 1, 40, 9)
    args = [[x.float()], torch.ones(1, 1, 1, 1), torch.ones(1), torch.zeros(1), None, None, True]
    with emulated():
        _, mean, var, *_ = OPS[OP](*args, EPS, backend="cuda")
    exact = x.float().double()
    assert abs(mean.item() / exact.mean().item() - 1) <= 1e-6
    assert abs(var.item() / exact.var(correction=0).item() - 1) <= 1e-4


def counted(
    call: Callable[[], object], keep: Callable[[Launch], bool] = lambda _: True
) -> tuple[list[str], dict[str, int]]:
    """The launches' names, and the counters of those that are kept, added up."""
    names: list[str] = []
    totals: dict[str, int] = {}

    def note(launch: Launch, report: Report) -> None:
        assert report.findings == []
        names.append(launch.entry.rpartition("_")[0])
        if keep(launch):
            for key, value in report.totals.items():
                totals[key] = totals.get(key, 0) + value

    with emulated(note):
        call()
    return names, totals


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channel_statistics_are_those_of_out(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, layout: str
) -> None:
    for case, tile in ((1, 0), (0, 2), (2, 1), (3, 0)):
        monkeypatch.setattr(product, "choose_tile", lambda *_, tile=tile: tile)
        named = arguments(case, False) | {"statistics": True}
        named["bn_bias"][0] = torch.nan
        named["bn_bias"][1] = -100  # a channel of zeros: its maximum is everywhere
        with emulated():
            out, _, _, *got = OPS[OP](*convert(OP, named, dtype, layout), backend="cuda")
            mean, maximum, argmax = OPS["channel_statistics"](out, backend="cuda")
        torch.testing.assert_close(got[0], mean, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(got[1], maximum, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got[2], argmax)


def test_launches() -> None:
    fused, joined = ["msff"] * 3, ["product_moments", "msff"]
    for training, statistics, want in (
        (False, False, fused),
        (False, True, [*fused, "product_extremes"]),
        (True, True, [*fused, *joined, "product_extremes"]),
    ):
        named = arguments(0, training) | {"statistics": statistics}
        args = convert(OP, named, torch.float32, "contiguous")
        names, _ = counted(lambda args=args: OPS[OP](*args, backend="cuda"))
        assert names == want


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bytes_of_the_last_launch(layout: str) -> None:
    """The map of target size is read once, out written once, in whole sectors."""
    draw = Draw(0)
    maps = [draw.normal(1, 32, 16, 16).half(), draw.normal(1, 8, 8, 8).half()]
    maps = [layout_of(m, layout) for m in maps]
    norm = [torch.ones(64), torch.zeros(64), torch.zeros(64), torch.ones(64)]
    weight = draw.weight(64, 40, 1, 1).half()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "choose_tile", lambda *_: 1)
        _, totals = counted(
            lambda: OPS[OP](maps, weight, *norm, False, EPS, backend="cuda"),
            lambda launch: "out" in launch.writes,
        )
    assert totals["global_write_units"] * 32 == 2 * 64 * 256
    for kind in ("read", "write"):
        assert totals[f"shared_{kind}_units"] == totals[f"shared_{kind}_ideal_units"]
    # The map, its weights once a tile, and four neighbours a result from the first-level cache.
    x, weights, neighbours = 2 * 32 * 256, 4 * 2 * 64 * 32, 4 * 4 * 64 * 256
    assert totals["global_read_units"] * 32 <= x + weights + 1.35 * neighbours


def test_many_maps_go_to_the_reference() -> None:
    draw = Draw(2)
    maps = [draw.normal(1, 2, 3, 4).float() for _ in range(msff.MOST_PRODUCTS + 1)]
    weight = draw.weight(4, 2 * len(maps), 1, 1).float()
    args = [maps, weight, torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4), False, EPS]
    names, _ = counted(lambda: OPS[OP](*args, True, backend="cuda"))
    assert names == ["channel_statistics"]


# PLANT=n of msff.cuh and product_moments.cuh: what must be found
PLANTS = {
    21: ("product_moments_float32", "race"),
    22: ("product_moments_float32", "out-of-bounds"),
    23: ("product_extremes_float32", "race"),
    31: ("msff_float32", "out-of-bounds"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_is_found(plant: int) -> None:
    launches: dict[str, Launch] = {}
    with emulated(lambda launch, _: launches.update({launch.entry: launch})):  # keeps the last
        named = arguments(1, True) | {"statistics": True}
        OPS[OP](*convert(OP, named, torch.float32, "contiguous"), backend="cuda")
    entry, kind = PLANTS[plant]
    for order in ORDERS:
        assert kind in emulate(launches[entry], order, plant).kinds
