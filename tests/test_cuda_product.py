"""The product that all 1×1 convolutions of the CUDA backend share, alone, under the emulator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from emulator import ORDERS, Report, Session, build, missing_tool

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)

KERNELS = Path(__file__).parent / "emulator" / "product_kernels.cu"
NARROW, MEDIUM, WIDE = range(3)
PIXELS = {NARROW: 32, MEDIUM: 64, WIDE: 128}
LAYOUTS = ("rows", "channels_last")
EPS = 1e-5
# Of the results' dtype, with operands that it holds exactly.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Sizes:
    """Of one product: samples, output channels, channels of both operands, pixels, groups of w."""

    batch: int
    rows: int
    channels: int
    channels1: int
    pixels: int
    groups: int = 1

    def __str__(self) -> str:
        return f"{self.batch}x{self.rows}x{self.channels}+{self.channels1}x{self.pixels}"


# One value, tails along every axis, several steps, several tiles, groups of one and of eight.
SHAPES = [
    Sizes(1, 1, 1, 1, 1),
    Sizes(2, 33, 40, 7, 35, 8),
    Sizes(1, 40, 64, 72, 64, 8),
    Sizes(3, 70, 24, 8, 9, 24),
    Sizes(2, 130, 96, 16, 136, 12),
]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return build(KERNELS)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lay_out(x: torch.Tensor, layout: str, gap: int = 0) -> torch.Tensor:
    """(B, C, S) with pixels or channels as neighbours, and `gap` elements between lines."""
    b, c, s = x.shape
    lines, length = (c, s) if layout == "rows" else (s, c)
    storage = torch.full((b, lines, length + gap), torch.nan, dtype=x.dtype)[..., :length]
    view = storage if layout == "rows" else storage.transpose(1, 2)
    return view.copy_(x)


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    return {f"{name}_stride_{axis}": x.stride(i) for i, axis in enumerate("bcs")}


class Case:
    """Random operands of one product, and what their results must be."""

    def __init__(self, s: Sizes, dtype: torch.dtype, layout: str, gap: int = 0) -> None:
        draw = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw).to(dtype)

        depth = s.channels + s.channels1
        self.sizes, self.dtype, self.layout = s, dtype, layout
        self.weight = (normal(s.rows, depth) / depth**0.5).to(dtype)
        self.maps = {
            "x": lay_out(normal(s.batch, s.channels, s.pixels), layout, gap),
            "r": lay_out(normal(s.batch, s.channels1, s.pixels), layout, gap),
            "w": lay_out(normal(s.batch, s.groups, s.pixels).sigmoid(), layout, gap),
        }
        self.norm = {
            name: normal(s.rows).float().abs() + shift
            for name, shift in (("gamma", 0.5), ("beta", -0.5), ("mean", -0.5), ("var", 0.5))
        }

    def normed(self, z: torch.Tensor) -> torch.Tensor:
        gamma, beta, mean, var = (v.double()[:, None] for v in self.norm.values())
        return (z - mean) / (var + EPS).sqrt() * gamma + beta

    def expected(self, entry: str) -> torch.Tensor:
        """Results of an entry in float64, s rounded as the kernel rounds it."""
        x, r, w = (m.double() for m in self.maps.values())
        weight = self.weight.double()
        if entry == "plain":
            return weight[:, : x.shape[1]] @ x
        s = (x * w.repeat_interleave(x.shape[1] // w.shape[1], 1)).to(self.dtype).double()
        if entry == "scaled_relu":
            return self.normed(weight[:, : x.shape[1]] @ s).relu()
        phi = self.normed(weight @ torch.cat([s, r], 1)).sigmoid()
        exact = x * w.repeat_interleave(x.shape[1] // w.shape[1], 1)
        return phi * x + (1 - phi) * exact

    def run(
        self,
        module: ModuleType,
        entry: str,
        tile: int,
        order: str = "shuffled",
        *,
        weight_dtype: torch.dtype | None = None,
        tf32: bool = False,
        gap: int = 0,
        plant: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, Report]:
        s = self.sizes
        session = Session(module, order, 3, plant)
        dtype = torch.float32 if entry == "plain" else self.dtype
        out = lay_out(torch.zeros(s.batch, s.rows, s.pixels, dtype=dtype), self.layout, gap)
        parts = s.batch * -(-s.pixels // PIXELS[tile])
        partials = torch.zeros((parts, 2, s.rows) if entry == "scaled_relu" else (parts, s.rows))
        weight = self.weight.to(weight_dtype or self.dtype)
        integers = {
            **{"batch": s.batch, "rows": s.rows, "pixels": s.pixels, "channels": s.channels},
            **{"channels1": s.channels1, "width": s.channels // s.groups},
            **{"weight_stride": weight.stride(0), "weight1_stride": weight.stride(0)},
            **{"tile": tile, "tf32": int(tf32), "channels_last": int(self.layout != "rows")},
            "weight_is_float": int(weight.dtype == torch.float32),
            **strides("out", out),
        }
        addresses: dict[str, int] = {"out": session.output("out", out)}
        base = session.input("weight", weight)
        addresses["weight"] = base
        if entry != "plain":
            addresses["partials"] = session.output("partials", partials)
        if entry == "fusion":
            addresses["weight1"] = session.input("weight1", weight[:, s.channels :])
            integers["weight1_stride"] = weight.stride(0)
        for name in {"plain": "x", "scaled_relu": "xw", "fusion": "xwr"}[entry]:
            addresses[name] = session.input(name, self.maps[name])
            integers |= strides(name, self.maps[name])
        if entry != "plain":
            addresses |= {n: session.input(n, value) for n, value in self.norm.items()}
        arguments: dict[str, Any] = {**integers, **addresses}
        session.launch(f"{entry}_{name_of(self.dtype)}", reals={"eps": EPS}, **arguments)
        return out, partials, session.finish()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(0.1 * want.numel() ** 0.5)).item()


def check_reduction(entry: str, case: Case, tile: int, partials: torch.Tensor) -> None:
    """Partials are the sums, or means and squared deviations, of the results of each tile."""
    want = case.expected(entry)
    part, size, limit = 0, PIXELS[tile], 4 * TOLERANCES[case.dtype]
    for sample in want:
        for start in range(0, want.shape[2], size):
            pixels = sample[:, start : start + size]
            if entry == "fusion":
                assert error(partials[part], pixels.sum(1)) <= limit
            else:
                assert error(partials[part, 0], pixels.mean(1)) <= limit
                spread = (pixels - pixels.mean(1, keepdim=True)).square().sum(1)
                assert error(partials[part, 1], spread) <= limit
            part += 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("entry", "dtype"),
    [
        *(("plain", dtype) for dtype in TOLERANCES),
        *(("scaled_relu", torch.float32), ("scaled_relu", torch.float16)),
        *(("fusion", dtype) for dtype in TOLERANCES),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_reductions(
    kernels: ModuleType, shape: Sizes, entry: str, dtype: torch.dtype, layout: str
) -> None:
    turn = SHAPES.index(shape) + list(TOLERANCES).index(dtype)
    if entry == "fusion":  # its epilogue reads x at the results' channels
        shape = replace(shape, rows=shape.channels)
    for tile in (NARROW, MEDIUM, WIDE) if shape.pixels < 100 else (WIDE,):
        gap = (turn + tile) % 3 * 4  # rows of any alignment
        case = Case(shape, dtype, layout, gap)
        order = ORDERS[(turn + tile) % len(ORDERS)]
        out, partials, report = case.run(kernels, entry, tile, order, gap=gap)
        assert report.findings == []
        assert error(out, case.expected(entry)) <= TOLERANCES[dtype]
        if entry != "plain":
            check_reduction(entry, case, tile, partials)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_weights_of_half_precision_maps_are_rounded(
    kernels: ModuleType, layout: str
) -> None:
    for shape in SHAPES[1:4]:
        case = Case(shape, torch.bfloat16, layout)
        out, _, report = case.run(kernels, "plain", NARROW, weight_dtype=torch.float32)
        assert report.findings == []
        want, _, _ = case.run(kernels, "plain", NARROW)
        assert torch.equal(out, want)


def test_tf32_rounds_and_float32_does_not(kernels: ModuleType) -> None:
    case = Case(SHAPES[2], torch.float32, "rows")
    want = case.expected("plain")
    exact, rounded = (case.run(kernels, "plain", WIDE, tf32=tf32)[0] for tf32 in (False, True))
    assert error(exact, want) <= 1e-6
    assert 1e-5 <= error(rounded, want) <= 2e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=name_of)
def test_no_bank_conflicts_and_whole_sectors(
    kernels: ModuleType, dtype: torch.dtype, layout: str
) -> None:
    shape = Sizes(1, 128, 128, 64, 128, 4)
    case = Case(shape, dtype, layout)
    for tile in (NARROW, MEDIUM, WIDE):
        totals = case.run(kernels, "fusion", tile)[2].totals
        for kind in ("read", "write"):
            units, ideal = (totals[f"shared_{kind}_{what}units"] for what in ("", "ideal_"))
            assert units == ideal, (tile, kind)
        assert totals["global_write_units"] == totals["global_write_ideal_units"]
    # The wide tile is the whole map: all is read once, x also by the epilogue.
    size = case.weight.element_size()
    weight, x, r, w = 128 * 192, 128 * 128, 64 * 128, 4 * 128
    read = totals["global_read_units"] * 32 / (size * (weight + 2 * x + r + w))
    # In rows each of a group's 32 channels asks for w again, in the loader and in the epilogue.
    assert read <= (1.55 if layout == "rows" else 1.1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_in_every_order(kernels: ModuleType, layout: str) -> None:
    case = Case(SHAPES[1], torch.float16, layout)
    runs = [case.run(kernels, "scaled_relu", NARROW, order)[:2] for order in ORDERS]
    for out, partials in runs[1:]:
        assert torch.equal(out, runs[0][0])
        assert torch.equal(partials, runs[0][1])


def test_nan_and_infinity_stay_in_their_pixel(kernels: ModuleType) -> None:
    case = Case(SHAPES[1], torch.float32, "rows")
    case.maps["x"][0, 3, 5] = torch.nan
    case.maps["x"][1, 39, 34] = torch.inf
    out = case.run(kernels, "plain", NARROW)[0]
    assert out[0, :, 5].isnan().all()
    assert torch.equal(out[1, :, 34], case.weight[:, 39].sign() * torch.inf)
    out[0, :, 5] = out[1, :, 34] = 0
    assert out.isfinite().all()


# PLANT=n of product_loop.cuh and product.cuh: what must be found
PLANTS = {1: "race", 2: "unwaited", 3: "out-of-bounds"}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_is_found(kernels: ModuleType, plant: int) -> None:
    shape = SHAPES[1 if plant == 3 else 2]  # 3: a tail of pixels
    case = Case(replace(shape, rows=shape.channels), torch.float16, "rows")
    for order in ORDERS:
        report = case.run(kernels, "fusion", NARROW, order, plant=plant)[2]
        assert PLANTS[plant] in report.kinds, report.findings


def test_groups_are_found_by_a_product_instead_of_a_division() -> None:
    """The arithmetic of `group_of` in product_copies.cuh, at and beside multiples of the width."""
    largest = 2**22
    for width in (*range(1, 130), 1000, 4095, 65537, largest - 1):
        multiples = np.arange(0, largest, max(width, largest // 4096 // width * width))
        channels = np.unique(np.clip(multiples[:, None] + [-1, 0, 1], 0, largest - 1))
        inverse = np.float32(1) / np.float32(width)
        found = ((channels.astype(np.float32) + np.float32(0.5)) * inverse).astype(np.int32)
        assert np.array_equal(found, channels // width), width
