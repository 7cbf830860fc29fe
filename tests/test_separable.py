"""The native backbone kernels against float64: sizes, strides, dtypes, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stage_cases import error, tolerance
from torch.nn import functional as F

from fused.backends import cpu, native
from fused.folding import Product
from fused.separable import Relus, separable, stem

pytestmark = pytest.mark.skipif(
    cpu.LIBRARY.error is not None, reason=f"native CPU library: {cpu.LIBRARY.error}"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (B, C, H, W, N): 1×1, one row, one column, odd, tails of every vector width, tiles of many rows
SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 3, 1, 9, 5),
    (1, 16, 8, 1, 33),
    (3, 7, 5, 6, 31),
    (1, 33, 11, 13, 70),
    (2, 40, 9, 30, 16),
    (1, 8, 2, 3, 64),
    (2, 256, 28, 28, 48),
)
LAYOUTS = ("contiguous", "channels_last", "channel slice", "every second", "expanded")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A map of x's shape in this layout."""
    if layout == "contiguous":
        return x
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "channel slice":
        wide = torch.cat([x, x, x], 1).contiguous(memory_format=torch.channels_last)
        return wide[:, x.shape[1] : 2 * x.shape[1]]
    if layout == "every second":
        large = x.repeat_interleave(2, 3).contiguous(memory_format=torch.channels_last)
        return large[..., ::2]
    return x[:1, :, :1].expand(x.shape)


def convolved(
    x: torch.Tensor, depthwise: Product, pointwise: Product, stride: int, relus: Relus
) -> torch.Tensor:
    y = F.conv2d(x.double(), *depthwise, stride, 1, groups=x.shape[1])
    y = F.conv2d(y.relu() if relus[0] else y, *pointwise)
    return y.relu() if relus[1] else y


def products(channels: int, out: int, biased: bool) -> tuple[Product, Product]:
    bias = torch.randn(channels).double() if biased else None
    depthwise = Product(torch.randn(channels, 1, 3, 3).double() / 3, bias)
    weight = torch.randn(out, channels, 1, 1).double() / channels**0.5
    return depthwise, Product(weight, torch.randn(out).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("relus", [(False, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_separable(shape: tuple[int, ...], relus: Relus, stride: int, dtype: torch.dtype) -> None:
    *size, out = shape
    depthwise, pointwise = products(size[1], out, relus[0])
    layer = separable(depthwise, pointwise, stride, relus, dtype, natively=True)
    for layout in LAYOUTS:
        x = laid_out(torch.randn(size).to(dtype), layout)
        got, want = layer(x), convolved(x, depthwise, pointwise, stride, relus)
        assert got.shape == want.shape
        assert got.dtype == dtype
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert error(got, want) <= tolerance(dtype)[0], layout


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("in_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 30, 33, 32), (2, 1, 1, 1, 5), (1, 5, 7, 2, 40)], ids=str)
def test_stem(shape: tuple[int, ...], in_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    *size, out = shape
    product = Product(torch.randn(out, size[1], 3, 3).double() / 3, torch.randn(out).double())
    layer = stem(product, out_dtype, natively=True)
    for layout in LAYOUTS:
        x = laid_out(torch.randn(size).to(in_dtype), layout)
        want = F.conv2d(x.double(), *product, 2, 1).relu()
        got = layer(x)
        assert got.dtype == out_dtype
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert error(got, want) <= tolerance(out_dtype)[0], layout


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_reach_what_they_touch_and_no_more(dtype: torch.dtype) -> None:
    depthwise, pointwise = products(20, 40, True)
    layer = separable(depthwise, pointwise, 1, (True, True), dtype, natively=True)
    for value in (torch.nan, torch.inf):
        x = torch.randn(2, 20, 9, 30).to(dtype)
        clean = layer(x)
        x[1, 3, 4, 17] = value
        got = layer(x)
        want = convolved(x, depthwise, pointwise, 1, (True, True))
        assert torch.equal(got.isnan(), want.isnan())
        untouched = torch.ones_like(got, dtype=torch.bool)
        untouched[1, :, 3:6, 16:19] = False
        assert torch.equal(got[untouched], clean[untouched])


def test_wrong_arguments_are_refused() -> None:
    kernel, pack = native.kernel("separable_block"), native.kernel("separable_pack")
    x, weights = torch.randn(1, 4, 5, 5), (torch.randn(9, 4), torch.zeros(4))
    packed, bias = pack(torch.randn(6, 4), False), torch.zeros(6)
    kernel(x, *weights, packed, bias, 1, False, False)
    for arguments, message in (
        ((x[0], *weights, packed, bias, 1, False, False), "4 dimensions"),
        ((x.double(), *weights, packed, bias, 1, False, False), "float32, bfloat16 or float16"),
        ((x, *weights, packed, bias, 3, False, False), "stride must be 1 or 2"),
        ((x, torch.randn(8, 4), weights[1], packed, bias, 1, False, False), "depthwise must be 36"),
        (
            (x, weights[0], torch.zeros(5), packed, bias, 1, False, False),
            "depthwise_bias must be 4",
        ),
        ((x, *weights, packed[:, 1:], bias, 1, False, False), "not made by separable_pack"),
        ((x, *weights, packed, torch.zeros(600), 1, False, False), "not made by separable_pack"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernel(*arguments)
    with pytest.raises(RuntimeError, match=r"float32 \(N, K\)"):
        pack(torch.randn(2, 3, 4), False)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "portable"])
def test_every_instruction_set_passes_this_file(isa: str) -> None:
    if os.environ.get("FUSED_CPU_ISA"):
        pytest.skip("FUSED_CPU_ISA is set already")
    if isa not in native.kernel("cpu_isa_available")().split(", "):
        pytest.skip(f"this CPU has no {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run(
        [*command, str(Path(__file__)), str(Path(__file__).with_name("test_inference.py"))],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "FUSED_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
