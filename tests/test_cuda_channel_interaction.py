"""Channel interaction's CUDA kernels under the emulator, against the float64 maths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator import ORDERS, Report, emulate, emulated, missing_tool
from stage_cases import OPS, Sizes, arguments, convert, error, layout_of, require_grad, tolerance

from fused.backends.cuda import product
from fused.backends.cuda.launch import Launch
from fused.contract import memory_format

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)

OP = "channel_interaction"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "transposed")
# One value, a row, a column, tails along every axis, rows of whole vectors.
SIZES = (
    Sizes(1, 1, 1, 1, 1),
    Sizes(2, 12, 1, 9, 1),
    Sizes(9, 10, 6, 1, 1),
    Sizes(2, 70, 7, 5, 1),
    Sizes(1, 40, 8, 16, 1),
)


def outputs(
    sizes: Sizes, dtype: torch.dtype, layout: str, **changes: Any
) -> tuple[list[Any], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Arguments, their float64 outputs, and those of the kernels in whatever order is set."""
    named = arguments(OP, sizes) | changes
    named["x"] = named["x"].to(dtype).double()
    want = OPS[OP](*convert(OP, named, torch.float64, "contiguous"), backend="reference")
    args = convert(OP, named, dtype, layout)
    return args, want, OPS[OP](*args, backend="cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward(sizes: Sizes, dtype: torch.dtype, layout: str) -> None:
    with emulated():
        args, want, got = outputs(sizes, dtype, layout)
    for name, one, exact in zip(OPS[OP].outputs, got, want, strict=True):
        limit = tolerance(dtype)[0] if name == "e" else 1e-5
        assert error(one, exact) <= limit, name
    assert memory_format(got[0]) == memory_format(args[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_in_every_order_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, layout: str
) -> None:
    for tile in range(len(product.TILES)):
        monkeypatch.setattr(product, "choose_tile", lambda *_, tile=tile: tile)
        runs = []
        for order in ORDERS:
            with emulated(order=order):
                _, want, got = outputs(SIZES[3], dtype, layout)
            assert error(got[0], want[0]) <= tolerance(dtype)[0]
            runs.append(got)
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_weights_may_have_the_maps_dtype() -> None:
    """As in a module that is half precision as a whole, not under autocast."""
    for dtype in (torch.float16, torch.bfloat16):
        named = arguments(OP, SIZES[4])
        named = {name: value.to(dtype).double() for name, value in named.items()}
        want = OPS[OP](*convert(OP, named, torch.float64, "contiguous"), backend="reference")
        args = [named[name].to(dtype) for name in named]
        with emulated():
            e, gate, *_ = OPS[OP](*args, backend="cuda")
        assert error(e, want[0]) <= tolerance(dtype)[0]
        assert error(gate, want[1]) <= 1e-5


def test_known_statistics_spare_a_launch() -> None:
    launches: list[str] = []

    def note(launch: Launch, report: Report) -> None:
        assert report.findings == []
        launches.append(launch.entry.rpartition("_")[0])

    with emulated(note):
        args, _, plain = outputs(SIZES[3], torch.float32, "contiguous")
        spared = OPS[OP](*args[:4], *plain[2:], backend="cuda")
    both = ["channel_interaction_gate", "channel_interaction"]
    assert launches == ["channel_statistics", *both, *both]
    assert all(torch.equal(a, b) for a, b in zip(spared, plain, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype: torch.dtype, layout: str) -> None:
    for sizes in SIZES[2:4]:
        named = arguments(OP, sizes)
        named["x"] = named["x"].to(dtype).double()
        exact = convert(OP, named, torch.float64, "contiguous")
        leaves = require_grad(OP, exact)
        seed = torch.randn(exact[0].shape).to(dtype).double()
        (e, *_) = OPS[OP](*exact, backend="reference")
        want = torch.autograd.grad(e, leaves, seed)
        args = convert(OP, named, dtype, layout)
        leaves = require_grad(OP, args)
        with emulated():
            (e, *_) = OPS[OP](*args, backend="cuda")
            got = torch.autograd.grad(e, leaves, layout_of(seed.to(dtype), layout))
        for one, right in zip(got, want, strict=True):
            assert error(one, right) <= tolerance(dtype)[1]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_infinity_propagate_as_in_eager(layout: str) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        named = arguments(OP, SIZES[3])
        named["x"][0, 3, 2, 2] = value
        args = convert(OP, named, torch.float32, layout)
        want = OPS[OP](*args, backend="reference")
        with emulated():
            got = OPS[OP](*args, backend="cuda")
        for one, right in zip(got[:4], want[:4], strict=True):
            torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bytes_are_those_of_one_pass(layout: str) -> None:
    """x is asked for once by a tile of all channels and once by its epilogue, e written once."""
    totals: dict[str, int] = {}

    def note(launch: Launch, report: Report) -> None:
        if launch.entry == "channel_interaction_float16":
            totals.update(report.totals)

    sizes = Sizes(1, 64, 16, 16, 1)
    with emulated(note), pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "choose_tile", lambda *_: 1)
        named = {name: t.half() for name, t in arguments(OP, sizes).items()}
        OPS[OP](*(layout_of(t, layout) if t.dim() == 4 else t for t in named.values()),
                backend="cuda")  # fmt: skip
    size, weight = 2 * 64 * 256, 2 * 64 * 64
    tiles = 256 // 64
    assert totals["global_write_units"] * 32 == size
    assert totals["global_read_units"] * 32 == pytest.approx(2 * size + tiles * weight, rel=0.05)
    for kind in ("read", "write"):
        assert totals[f"shared_{kind}_units"] == totals[f"shared_{kind}_ideal_units"]


# PLANT=n of channel_interaction_gate.cuh: what must be found
PLANTS = {11: "race", 12: "out-of-bounds"}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_is_found(plant: int) -> None:
    launches: dict[str, Launch] = {}
    with emulated(lambda launch, _: launches.update({launch.entry: launch})):
        outputs(SIZES[3], torch.float32, "contiguous")
    gate = launches["channel_interaction_gate_float32"]
    for order in ORDERS:
        assert PLANTS[plant] in emulate(gate, order, plant).kinds
