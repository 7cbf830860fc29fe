"""cross_spatial in evaluation on CUDA, emulated: values, findings, traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulator import ORDERS, Report, missing_tool
from emulator.launcher import emulated

from fused.backends.cuda import coordinate_attention, cross_spatial, spatial_gate
from fused.backends.cuda.launch import Launch
from fused.backends.reference import coordinate_attention as reference_coordinate
from fused.backends.reference import cross_spatial as reference

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)

EPS = (1e-5, 1e-3, 1e-4)  # group norm, attention, reduction
LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = tuple(LARGEST_ERROR)
# batch, groups, c, H, W: padded and whole widths of a group, tails, a pixel, a row, a column; with
# bands of a slab of one tile and of several, tiles beside each other and packs of 16 bytes.
SHAPES = [
    (2, 2, 1, 5, 4),
    (1, 2, 6, 5, 7),
    (1, 2, 16, 8, 8),
    (1, 2, 32, 13, 17),
    (1, 1, 32, 1, 1),
    (1, 2, 20, 1, 9),
    (2, 1, 16, 9, 1),
    (1, 1, 64, 4, 6),
    (1, 1, 8, 11, 72),
]
# Every dtype with every shape, in turn in both layouts, float16 always in both.
CASES = [
    (shape, dtype, channels_last)
    for i, shape in enumerate(SHAPES)
    for k, dtype in enumerate(DTYPES)
    for channels_last in (False, True)
    if dtype == torch.float16 or channels_last == ((i + k // 2) % 2 == 1)
]


@dataclass(frozen=True)
class Case:
    """Inputs, and w with the softmax vectors in float64."""

    e: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    gates: tuple[torch.Tensor, ...]
    parameters: dict[str, torch.Tensor]
    groups: int
    expected: tuple[torch.Tensor, ...]
    eager: tuple[torch.Tensor, ...]

    def run(self) -> tuple[torch.Tensor, ...]:
        """The op."""
        return cross_spatial.forward(
            *(self.e, *self.gates, *self.parameters.values()),
            *(self.groups, False, "sequential", *EPS[1:]),
        )


def parameters_of(c: int, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """The op's parameters after rstd, in its order."""

    def kernel(outputs: int, inputs: int, size: int) -> torch.Tensor:
        return random(outputs, inputs, size, size) / (inputs * size * size) ** 0.5

    return {
        **{"gn_weight": 1 + random(c) / 4, "gn_bias": random(c) / 4},
        **{"conv3x3_weight": kernel(c, c, 3), "conv3x3_bias": random(c) / 4},
        "spatial_conv1_weight": kernel(c, c, 1),
        "spatial_conv3_weight": kernel(c, c, 3),
        "spatial_conv5_weight": kernel(c, c, 5),
        "attention_weight": kernel(3 * c, 3 * c, 1),
        **{"attention_bn_weight": 1 + random(3 * c) / 4, "attention_bn_bias": random(3 * c) / 4},
        "attention_running_mean": random(3 * c) / 8,
        "attention_running_var": 0.2 + random(3 * c) ** 2,
        "reduce_weight": kernel(c, 3 * c, 1),
        **{"reduce_bn_weight": 1 + random(c) / 4, "reduce_bn_bias": random(c) / 4},
        **{"reduce_running_mean": random(c) / 8, "reduce_running_var": 0.1 + random(c) ** 2},
        **{"channel_feat_weight": kernel(c, c, 1), "alpha": torch.tensor([0.7])},
    }


def case(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, channels_last: bool = False
) -> Case:
    batch, groups, c, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    e = random(batch, groups * c, height, width).to(dtype)
    if channels_last:
        e = e.to(memory_format=torch.channels_last)
    weight, bias = random(c, c, 1, 1) / c**0.5, random(c) / 4
    parameters = parameters_of(c, random)
    gates = reference_coordinate.forward(e.double(), weight.double(), bias.double(), groups, EPS[0])
    options = (groups, False, "sequential", *EPS[1:])
    exact = (p.double() for p in parameters.values())
    expected = reference.forward(e.double(), *gates, *exact, *options)[:3]
    rounded = tuple(gate.float() for gate in gates)
    eager = reference.forward(e, *rounded, *(p.to(dtype) for p in parameters.values()), *options)[
        :3
    ]
    return Case(e, weight, bias, rounded, parameters, groups, expected, eager)


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def check(out: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, dtype: torch.dtype) -> None:
    assert error(out, exact) <= LARGEST_ERROR[dtype]
    # The roundings of two ways of one computation differ where there are few values.
    assert error(out, exact) <= 2 * error(eager, exact) + LARGEST_ERROR[dtype] / 10


@pytest.mark.parametrize(("shape", "dtype", "channels_last"), CASES)
def test_values(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, channels_last: bool
) -> None:
    """Launches take the four orders in turn; a finding fails."""
    example = case(shape, dtype, channels_last)
    with emulated():
        w, *softmaxes = example.run()[:3]
    assert w.dtype == dtype
    for out, exact, eager in zip((w, *softmaxes), example.expected, example.eager, strict=True):
        check(out, exact, eager, dtype)


def test_the_same_bits_in_every_order() -> None:
    example = case((1, 1, 8, 11, 72), torch.float16)
    results = []
    for order in ORDERS:
        with emulated(order=order):
            results.append(example.run()[:3])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_statistics_of_evaluation_are_empty() -> None:
    example = case((1, 2, 6, 5, 7), torch.float32)
    with emulated():
        statistics = example.run()[3:]
    assert [tuple(s.shape) for s in statistics] == [(0, 18), (0, 18), (0, 6), (0, 6)]


def test_parameters_of_the_maps_dtype() -> None:
    example = case((1, 2, 6, 5, 7), torch.float16)
    halves = {name: t.half() for name, t in example.parameters.items()}
    rounded = Case(**{**vars(example), "parameters": halves})
    with emulated():
        check(rounded.run()[0], example.expected[0], example.eager[0], torch.float16)


def test_tf32_where_torch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_spatial, "takes_tf32", lambda: 1)
    example = case((1, 1, 32, 5, 9), torch.float32)
    with emulated():
        found = error(example.run()[0], example.expected[0])
    assert 1e-6 < found < 2e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_poisoned_sample_leaves_the_others_alone(value: float) -> None:
    example = case((2, 1, 6, 5, 7), torch.float32)
    example.e[1, 2, 3, 4] = value
    with emulated():
        w, softmax1 = example.run()[:2]
    assert all(poisoned.isnan().all() for poisoned in (w[1], softmax1[1]))
    check(w[:1], example.expected[0][:1], example.eager[0][:1], torch.float32)


def reports_of(run: Callable[[], Any], **options: Any) -> dict[str, tuple[Launch, Report]]:
    """Of every launch, by its entry without the dtype."""
    found: dict[str, tuple[Launch, Report]] = {}

    def keep(launch: Launch, report: Report) -> None:
        found[launch.entry.rpartition("_")[0]] = launch, report

    with emulated(keep, **options):
        run()
    return found


def test_launches_and_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches whatever the number of bands, which is that of blocks over slabs."""
    example = case((1, 2, 8, 11, 72), torch.float16)
    for multiprocessors, several in ((1, False), (16, True)):
        monkeypatch.setattr(cross_spatial, "_EMULATED_MULTIPROCESSORS", multiprocessors)
        reports = reports_of(example.run)
        assert list(reports) == ["cross_spatial_pack", "cross_spatial"]
        report = reports["cross_spatial"][1]
        assert report.findings == []
        # Only arrive_last, of several bands, is atomic.
        assert (report.totals.get("global_atomic_requests", 0) > 0) == several


@pytest.mark.parametrize(
    ("shape", "dtype", "halves", "tf32"),
    [
        ((1, 2, 6, 5, 7), torch.float32, False, 0),
        ((1, 1, 20, 3, 9), torch.float32, False, 1),
        ((1, 1, 64, 4, 6), torch.float32, False, 0),
        ((1, 2, 16, 8, 8), torch.float16, False, 0),
        ((2, 1, 6, 5, 7), torch.float16, True, 0),
        ((1, 1, 32, 5, 6), torch.bfloat16, False, 0),
        ((1, 1, 64, 4, 6), torch.bfloat16, False, 0),
    ],
)
def test_few_slabs_pack_weights_beside_coordinate_attention(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    halves: bool,
    tf32: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two launches, and the very bits of coordinate attention, packing and learning in three."""
    monkeypatch.setattr(cross_spatial, "takes_tf32", lambda: tf32)
    for channels_last in (False, True):
        example = case(shape, dtype, channels_last)
        e, groups = example.e, example.groups
        own = {name: t.half() if halves else t for name, t in example.parameters.items()}
        first = (example.weight, example.bias)
        rest = (*own.values(), groups, False, "sequential", *EPS[1:])
        together: list[torch.Tensor] = []
        reports = reports_of(
            lambda e=e, first=first, rest=rest, w=together: w.append(
                spatial_gate.forward(e, *first, EPS[0], *rest)
            )
        )
        assert list(reports) == ["coordinate_attention", "cross_spatial"]
        assert all(report.findings == [] for _, report in reports.values())
        with emulated():
            vectors = coordinate_attention.forward(e, *first, groups, EPS[0])
            apart = cross_spatial.forward(e, *vectors, *rest)[0]
        assert torch.equal(together[0], apart)


@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
def test_traffic(channels_last: bool) -> None:
    """Products load without bank conflicts, 16 bytes a lane; e is read as the head comment says."""
    example = case((1, 1, 32, 16, 56), torch.float16, channels_last)
    _, report = reports_of(example.run)["cross_spatial"]

    def sites(file: str, space: str) -> list[dict[str, Any]]:
        return [
            site
            for site in report.sites
            if file in site["site"] and (site["space"], site["kind"]) == (space, "read")
        ]

    pixels = sites("cross_spatial_tiles.cuh", "shared")
    assert {site["bytes_per_lane"] for site in pixels} == {16}
    assert all(site["units"] == site["ideal_units"] for site in pixels)
    weights = max(sites("cross_spatial_tiles.cuh", "global"), key=lambda site: site["bytes"])
    assert weights["bytes_per_lane"] == 16
    assert weights["units"] == weights["ideal_units"]
    loads = [s for s in sites("cross_spatial_branches.cuh", "global") if s["bytes_per_lane"] == 16]
    pixels_read = sum(site["bytes"] for site in loads) // (32 * 2)
    # Four tiles of 8×32 and 8×24 with their halo of 3 inside the map; "rows" in whole packs of 8.
    assert pixels_read == (11 + 11) * ((35 + 27) if channels_last else (40 + 32))


PLANTS = {2: "race", 3: "race", 4: "unwaited"}  # bug → kind of finding


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bugs_are_found(plant: int) -> None:
    example = case((1, 1, 8, 5, 7), torch.float16, channels_last=True)
    _, report = reports_of(example.run, plant=plant)["cross_spatial"]
    assert PLANTS[plant] in report.kinds, report.findings
