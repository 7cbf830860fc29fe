"""The CUDA kernels of the channel statistics under the emulator, in every order."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from emulator import CSRC, ORDERS, Report, Session, build, missing_tool

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)

KERNEL = CSRC / "cuda" / "channel_statistics.cu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (B, C, H, W): a pixel, a row, odd sizes with tails, one plane, several blocks, the paper's map.
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 1, 9),
    (3, 7, 5, 3),
    (1, 1, 13, 17),
    (2, 40, 7, 7),
    (1, 72, 3, 11),
    (1, 2, 56, 56),
]
LAYOUTS = ("contiguous", "channels_last", "strided", "offset", "channels_last_strided")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return build(KERNEL)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x in a layout that the launcher gives to a kernel without a copy."""
    b, c, h, w = x.shape
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "channels_last_strided":  # the first channels of a map with more
        wide = torch.full((b, 2 * c, h, w), torch.nan, dtype=x.dtype)
        return wide.to(memory_format=torch.channels_last)[:, :c].copy_(x)
    if layout == "strided":  # every other plane of a larger map
        return torch.full((b, 2 * c, h, w), torch.nan, dtype=x.dtype)[:, ::2].copy_(x)
    if layout == "offset":  # a view that starts one element past an aligned address
        return torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    return x.contiguous()


def geometry(x: torch.Tensor, layout: str) -> dict[str, int]:
    """The sizes of x that the entries ask for."""
    b, c, h, w = x.shape
    last = layout.startswith("channels_last") or (h * w == 1 and x.stride(1) == 1)
    return {
        "batch": b,
        "channels": c,
        "pixels": h * w,
        "stride_b": x.stride(0),
        "stride_c": x.stride(1),
        "stride_s": x.stride(3) if w > 1 or h == 1 else x.stride(2),
        "channels_last": int(last),
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forward(
    module: ModuleType, x: torch.Tensor, layout: str, order: str, warps: int = 0, plant: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Report]:
    planes = x.shape[:2]
    mean, maximum = torch.zeros(planes), torch.zeros(planes)
    argmax = torch.zeros(planes, dtype=torch.int64)
    session = Session(module, order, seed=11, plant=plant)
    session.launch(
        f"channel_statistics_{name_of(x.dtype)}",
        x=session.input("x", x),
        mean=session.output("mean", mean),
        maximum=session.output("maximum", maximum),
        argmax=session.output("argmax", argmax),
        warps_per_plane=warps,
        **geometry(x, layout),
    )
    return mean, maximum, argmax, session.finish()


def backward(
    module: ModuleType,
    grads: tuple[torch.Tensor, torch.Tensor],
    argmax: torch.Tensor,
    grad_x: torch.Tensor,
    layout: str,
    order: str,
    warps: int = 0,
    plant: int = 0,
) -> Report:
    session = Session(module, order, seed=11, plant=plant)
    session.launch(
        f"channel_statistics_backward_{name_of(grad_x.dtype)}",
        grad_x=session.output("grad_x", grad_x),
        grad_mean=session.input("grad_mean", grads[0]),
        grad_maximum=session.input("grad_maximum", grads[1]),
        saved_argmax=session.input("saved_argmax", argmax),
        warps_per_plane=warps,
        **geometry(grad_x, layout),
    )
    return session.finish()


def pictures(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values on a coarse grid, so that the maximum often occurs more than once."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 4).round().to(
        dtype
    ) / 4


def check_forward(module: ModuleType, x: torch.Tensor, layout: str, order: str, warps: int) -> None:
    mean, maximum, argmax, report = forward(module, x, layout, order, warps)
    assert report.findings == []
    exact = x.double().flatten(2)
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=1e-6, atol=1e-6)
    expected, _ = exact.max(2)
    assert torch.equal(maximum.double(), expected)
    assert torch.equal(argmax, (exact == expected[..., None]).int().argmax(2))


def check_backward(
    module: ModuleType, x: torch.Tensor, layout: str, order: str, warps: int
) -> None:
    draw = torch.Generator().manual_seed(9)
    grads = (
        torch.randn(x.shape[:2], generator=draw),
        torch.randn(x.shape[:2], generator=draw),
    )
    argmax = torch.randint(x[0, 0].numel(), x.shape[:2], generator=draw)
    grad_x = torch.zeros_like(x)
    report = backward(module, grads, argmax, grad_x, layout, order, warps)
    assert report.findings == []
    plane = x[0, 0].numel()
    exact = (grads[0].double() / plane)[..., None].expand(*x.shape[:2], plane).clone()
    exact.scatter_add_(2, argmax[..., None], grads[1].double()[..., None])
    torch.testing.assert_close(
        grad_x.double().flatten(2),
        exact,
        rtol={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[x.dtype],
        atol=1e-6,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_in_every_order(
    kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    x = lay_out(pictures(shape, dtype), layout)
    for order in ORDERS:
        for warps in (0,) if layout.startswith("channels_last") else (1, 8):
            check_forward(kernels, x, layout, order, warps)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_in_every_order(
    kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    x = lay_out(pictures(shape, dtype), layout)
    for order in ORDERS:
        for warps in (0,) if layout == "channels_last" else (1, 8):
            check_backward(kernels, x, layout, order, warps)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_nan_is_the_maximum_and_infinities_stand(kernels: ModuleType, layout: str) -> None:
    x = torch.zeros(1, 8, 6, 11)
    x[0, 0].flatten()[[40, 13, 61]] = torch.nan
    x[0, 1] = -torch.inf
    x[0, 2, 3, 3] = torch.inf
    x[0, 3, 0, 0] = torch.nan
    x[0, 4, 5, 10] = torch.nan
    _, maximum, argmax, report = forward(kernels, lay_out(x, layout), layout, "shuffled")
    assert report.findings == []
    assert argmax[0, :5].tolist() == [13, 0, 36, 0, 65]
    assert maximum[0, [0, 3, 4]].isnan().all()
    assert maximum[0, 1] == -torch.inf
    assert maximum[0, 2] == torch.inf


def test_same_bits_in_every_order(kernels: ModuleType) -> None:
    x = torch.randn(2, 3, 47, 45, generator=torch.Generator().manual_seed(1))
    results = [forward(kernels, x, "contiguous", order)[0] for order in ORDERS]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bytes_are_those_of_one_pass(kernels: ModuleType, dtype: torch.dtype, layout: str) -> None:
    shape = (2, 32, 28, 28)
    x = lay_out(pictures(shape, dtype), layout)
    size, planes = x.numel() * x.element_size(), shape[0] * shape[1]
    *_, argmax, report = forward(kernels, x, layout, "forward")
    totals = report.totals
    assert totals["global_read_bytes"] == pytest.approx(size, rel=0.1)
    assert totals["global_write_bytes"] == pytest.approx(planes * 16, rel=0.1)
    # Nothing is fetched to be thrown away: sectors of 32 bytes carry what was asked for.
    assert totals["global_read_units"] * 32 == pytest.approx(size, rel=0.1)
    assert totals["shared_read_units"] <= 1.1 * totals["shared_read_ideal_units"]
    grads = (torch.ones(shape[:2]), torch.ones(shape[:2]))
    totals = backward(kernels, grads, argmax, torch.zeros_like(x), layout, "forward").totals
    assert totals["global_write_bytes"] == pytest.approx(size, rel=0.1)
    assert totals["global_write_units"] * 32 == pytest.approx(size, rel=0.1)


# PLANT=n of channel_statistics.cuh: what must be found, with which shape and layout
PLANTS = {
    1: ("race", (1, 2, 56, 56), "contiguous"),
    2: ("race", (1, 40, 7, 7), "channels_last"),
    3: ("out-of-bounds", (1, 1, 7, 7), "contiguous"),
    4: ("misaligned", (1, 3, 7, 7), "contiguous"),
    5: ("out-of-bounds", (1, 40, 7, 7), "channels_last"),
    6: ("unwritten", (1, 3, 7, 7), "contiguous"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_in_the_real_kernel_is_found(kernels: ModuleType, plant: int) -> None:
    kind, shape, layout = PLANTS[plant]
    x = lay_out(pictures(shape, torch.float32), layout)
    for order in ORDERS:
        argmax, report = forward(kernels, x, layout, order, plant=plant)[2:]
        if kind == "unwritten":
            grads = (torch.ones(shape[:2]), torch.ones(shape[:2]))
            grad_x = torch.zeros_like(x)
            report = backward(kernels, grads, argmax, grad_x, layout, order, plant=plant)
        assert kind in report.kinds, report.findings


def test_vector_loads_are_used(kernels: ModuleType) -> None:
    report = forward(kernels, pictures((1, 2, 56, 56), torch.float16), "contiguous", "forward")[3]
    reads = [site for site in report.sites if site["space"] == "global" and site["kind"] == "read"]
    vectors = sum(site["bytes"] for site in reads if site["bytes_per_lane"] == 16)
    assert vectors == 2 * 56 * 56 * 2
    assert all("channel_statistics.cuh:" in site["site"] for site in reads)
