"""The native products and the stages on them in evaluation, however the maps lie in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stage_cases import AWKWARD, Sizes, arguments, convert, error, tolerance
from test_native import LAYOUTS, ROOT, laid_out

from fused.backends import cpu, cpu_products, cpu_stages, native, reference
from fused.contract import EPS, memory_format

pytestmark = pytest.mark.skipif(
    cpu.LIBRARY.error is not None, reason=f"native CPU library: {cpu.LIBRARY.error}"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (rows, shape of the map): tails of rows, channels and pixels around every panel, 1x1 maps, one
# channel, one row, several tiles and blocks of rows
PRODUCTS = (
    (1, (1, 1, 1, 1)),
    (3, (2, 5, 1, 1)),
    (70, (2, 33, 1, 7)),
    (8, (1, 16, 9, 1)),
    (65, (2, 17, 7, 7)),
    (129, (1, 2, 13, 11)),
    (64, (3, 48, 8, 6)),
    (5, (1, 130, 1, 97)),
)
# Products in Strassen's form: a last span that is no full pair of tiles, odd halves of channels.
LARGE_PRODUCTS = ((256, (2, 256, 23, 23)), (384, (1, 258, 19, 27)))
LARGE = Sizes(1, 1024, 23, 23, 32)
# Sizes of the maps that msff fuses: no ratio, odd ones, the largest height and width in two maps.
FEATURES = (
    ((6, 5, 7),),
    ((6, 5, 7), (9, 3, 7), (4, 5, 2)),
    ((3, 8, 8), (5, 8, 8), (7, 1, 1)),
    ((5, 4, 9), (6, 9, 4)),
    ((2, 12, 20), (17, 6, 10), (33, 3, 5)),
)

op = native.kernel


def weight_of(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randn(rows, columns, generator=generator) / columns**0.5


def vectors(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(size, generator=generator) + 0.5, torch.randn(size, generator=generator)


def check(got: torch.Tensor, want: torch.Tensor, x: torch.Tensor) -> None:
    """Against float64; dtype and memory format are those of x."""
    assert got.dtype == x.dtype
    assert got.shape == want.shape
    assert error(got, want) <= tolerance(x.dtype)[0]
    assert got.is_contiguous(memory_format=memory_format(x))


def pointwise(x: torch.Tensor, weight: torch.Tensor, bfloat16: bool | None = None) -> torch.Tensor:
    scale, shift = vectors(weight.shape[0])
    pairs = x.dtype == torch.bfloat16 if bfloat16 is None else bfloat16
    packed = op("pack_product_weight")(weight, pairs)
    return op("pointwise_packed")(x, packed, scale, shift, True)


def pointwise_oracle(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    scale, shift = (v.double()[:, None, None] for v in vectors(weight.shape[0]))
    product = torch.einsum("mk,bkhw->bmhw", weight.double(), x.double())
    return (product * scale + shift).relu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "shape"), [*PRODUCTS, *LARGE_PRODUCTS], ids=str)
def test_pointwise_equals_float64(rows, shape, layout, dtype):
    x, weight = laid_out(shape, layout, dtype), weight_of(rows, shape[1])
    check(pointwise(x, weight), pointwise_oracle(x, weight), x)


def test_seven_products_are_as_accurate_as_eight_but_for_a_factor_of_two():
    x, weight = laid_out((1, 1024, 23, 23), "contiguous", torch.float32), weight_of(1024, 1024)
    want = torch.einsum("mk,bkhw->bmhw", weight.double(), x.double())
    errors = []
    for plane in (None, 1):  # a weight packed for small maps has the direct form
        packed = op("pack_product_weight")(weight, False, plane)
        errors.append(error(op("pointwise_packed")(x, packed, None, None, False), want))
    seven, eight = errors
    assert eight < seven <= 2.5 * eight
    assert seven <= 2e-6
    parts, whole = (op("pack_product_weight")(weight, False, p).numel() for p in (512, 511))
    assert parts - 64 == 2 * (whole - 64) + 4 * 1024 // 128  # a float a pair of blocks


@pytest.mark.parametrize("base", [1.0, 2.0**86], ids=["one", "squares past float32"])
@pytest.mark.parametrize("scaled", ["pixels", "rows"])
def test_small_pixels_and_rows_keep_their_accuracy_beside_large_ones(scaled, base):
    x, weight = laid_out((1, 256, 23, 23), "contiguous", torch.float32), weight_of(256, 256)
    generator = torch.Generator().manual_seed(3)
    sizes = base * torch.exp2(torch.randint(-20, 20, (23, 23), generator=generator))
    x = x * sizes if scaled == "pixels" else x
    weight = weight * sizes.flatten()[:256, None] if scaled == "rows" else weight
    packed = op("pack_product_weight")(weight, False)
    got = op("pointwise_packed")(x, packed, None, None, False)[0].double()
    want = torch.einsum("mk,khw->mhw", weight.double(), x[0].double())
    dims = 0 if scaled == "pixels" else (1, 2)
    assert ((got - want).norm(dim=dims) <= 1e-4 * want.norm(dim=dims)).all()


def test_small_maps_take_the_direct_form_from_the_parts_of_a_weight():
    x, weight = laid_out((1, 256, 9, 13), "contiguous", torch.float32), weight_of(256, 256)
    run = [
        op("pointwise_packed")(x, op("pack_product_weight")(weight, False, p), None, None, False)
        for p in (None, 9 * 13)
    ]
    assert torch.equal(*run)


def test_plain_product_of_bfloat16_maps_with_float32_words():
    x, weight = laid_out((2, 33, 5, 11), "contiguous", torch.bfloat16), weight_of(40, 33)
    packed = op("pack_product_weight")(weight[:, :, None, None], False)
    got = op("pointwise_packed")(x, packed, None, None, False)
    want = torch.einsum("mk,bkhw->bmhw", weight.double(), x.double())
    assert error(got, want) <= 3e-3  # rounded once
    negative = op("pointwise_packed")(x, packed, None, None, True)
    assert torch.equal(negative, got.relu())


def interaction_arguments(x: torch.Tensor) -> list[torch.Tensor]:
    channels = x.shape[1]
    hidden = max(channels // 4, 1)
    return [weight_of(hidden, channels), weight_of(channels, hidden), weight_of(channels, channels)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 17, 5, 5), (1, 70, 7, 9), (2, 5, 1, 1)], ids=str)
def test_channel_interaction_equals_float64(shape, layout, dtype):
    x = laid_out(shape, layout, dtype)
    squeeze, excite, interaction = interaction_arguments(x)
    interaction = interaction[:, :, None, None]
    got = cpu_products.channel_interaction(x, squeeze, excite, interaction)
    doubles = (v.double() for v in (x, squeeze, excite, interaction))
    want = reference.channel_interaction.forward(*doubles)
    check(got[0], want[0], x)
    for ours, theirs in zip(got[1:4], want[1:4], strict=True):
        assert ours.dtype == torch.float32
        assert error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "transposed"])
@pytest.mark.parametrize("sizes", [*AWKWARD, Sizes(1, 192, 9, 13, 8), LARGE], ids=str)
def test_gated_fusion_equals_float64(sizes, layout, dtype):
    named = arguments("gated_fusion", sizes) | {"save": False}
    args = convert("gated_fusion", named, dtype, layout)
    doubles = [v.double() if isinstance(v, torch.Tensor) else v for v in args]
    want = reference.gated_fusion.forward(*doubles)[0]
    got = cpu_stages.gated_fusion(*args)
    check(got[0], want, args[0])
    assert [o.numel() for o in got[1:]] == [0] * 8
    assert [o.dtype for o in got[1:]] == [dtype] * 2 + [torch.float32] * 6
    mean = op("gated_fusion_packed")(*args[:2], *packed_fusion(args), True)
    assert (mean.shape, mean.dtype) == (want.shape[:2], torch.float32)
    assert error(mean, want.mean((2, 3))) <= tolerance(dtype)[0]


@pytest.mark.parametrize("pruned", ["squeeze", "fusion_of_s", "fusion_of_r"])
def test_weights_of_both_forms_beside_each_other(pruned):
    """A row of zeros is like no other: its weight has the direct form, the others Strassen's."""
    named = arguments("gated_fusion", LARGE) | {"save": False}
    args = convert("gated_fusion", named, torch.float32, "contiguous")
    squeeze, fusion = args[2].clone(), args[12].clone()
    of_s, of_r = fusion.split(1024, 1)
    {"squeeze": squeeze, "fusion_of_s": of_s, "fusion_of_r": of_r}[pruned][7] = 0
    args[2], args[12] = squeeze, fusion
    doubles = [v.double() if isinstance(v, torch.Tensor) else v for v in args]
    want = reference.gated_fusion.forward(*doubles)[0]
    check(cpu_stages.gated_fusion(*args)[0], want, args[0])


@pytest.mark.parametrize("factor", [30.0, 1e3, 1e5])
@pytest.mark.parametrize("large", [slice(128, 256), slice(7, 8), slice(1, 256, 2)], ids=str)
def test_large_channels_whose_weights_are_small(large, factor):
    """Their products are as large as the others', which Strassen's sums would swallow."""
    x, weight = laid_out((2, 256, 23, 23), "contiguous", torch.float32).clone(), weight_of(256, 256)
    x[:, large] *= factor
    weight[:, large] /= factor
    got, want = pointwise(x, weight), pointwise_oracle(x, weight)
    assert error(got, want) <= 1e-5


def packed_fusion(args: list[Any]) -> tuple[torch.Tensor, ...]:
    """The weights of gated fusion as a frozen network would hold them, folded in float64."""
    norms = [cpu_products.folded_norm(*args[at : at + 4], EPS) for at in (3, 8, 13)]
    weights = cpu_products.gated_fusion_weights(args[2], args[7], args[12], norms)
    return weights.packed(args[0])


def msff_arguments(
    sizes: tuple[tuple[int, int, int], ...], rows: int, dtype: torch.dtype, layout: str
) -> list[Any]:
    features = [laid_out((2, *size), layout, dtype) for size in sizes]
    weight = weight_of(rows, sum(size[0] for size in sizes))[:, :, None, None]
    return [features, weight, *vectors(rows), *reversed(vectors(rows)), False, EPS]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", FEATURES, ids=str)
def test_msff_equals_float64(sizes, layout, dtype):
    for rows in (1, 70):
        args = msff_arguments(sizes, rows, dtype, layout)
        features, *rest = args
        doubles = [v.double() if isinstance(v, torch.Tensor) else v for v in rest]
        want = reference.msff.forward([f.double() for f in features], *doubles)[0]
        out, *statistics = cpu_stages.msff(*args)
        check(out, want, features[0])
        dtypes = [torch.float32] * 4 + [torch.int64]
        assert [(s.numel(), s.dtype) for s in statistics] == [(0, kind) for kind in dtypes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("rows", "shape"), [(21, (2, 19, 9, 13)), LARGE_PRODUCTS[0]], ids=str)
def test_not_a_number_and_infinity_reach_their_pixels_and_no_others(rows, shape, layout, dtype):
    x = laid_out(shape, layout, dtype).clone(memory_format=torch.preserve_format)
    x[0, 3, 2, 2], x[1, 18, 8, 12] = float("nan"), float("inf")
    weight = weight_of(rows, shape[1])
    got, want = pointwise(x, weight), pointwise_oracle(x, weight)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert got.isnan().sum() == rows
    finite = want.isfinite()
    assert error(got[finite], want[finite]) <= tolerance(dtype)[0]


def test_sums_of_products_that_overflow_are_made_without_them():
    x = laid_out((1, 256, 23, 23), "contiguous", torch.float32) * 1e-3
    x[0, :, 0, :4], x[0, :, 2, 2:6] = 3e38, -3e38  # of both tiles of a span: 6e38 is infinite
    weight = weight_of(256, 256) * 1e-3
    got, want = pointwise(x, weight), pointwise_oracle(x, weight)
    assert got.isfinite().all()
    small = want < 1e3
    assert 0 < small.sum() < want.numel()
    assert error(got[small], want[small]) <= 1e-5
    assert error(got, want) <= 1e-5


def everything(dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs of every op on maps of several tiles and blocks."""
    x = laid_out((2, 140, 13, 17), "contiguous", dtype)
    args = convert("gated_fusion", arguments("gated_fusion", Sizes(2, 144, 13, 17, 8)), dtype, "")
    packed = packed_fusion(args)
    squeeze, excite, interaction = interaction_arguments(x)
    large = laid_out(LARGE_PRODUCTS[0][1], "contiguous", dtype)
    return [
        pointwise(x, weight_of(130, 140)),
        pointwise(large, weight_of(256, 256)),
        *cpu_products.channel_interaction(x, squeeze, excite, interaction),
        op("gated_fusion_packed")(*args[:2], *packed, False),
        op("gated_fusion_packed")(*args[:2], *packed, True),
        cpu_stages.msff(*msff_arguments(FEATURES[4], 130, dtype, "contiguous"))[0],
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_with_any_number_of_threads(dtype):
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            runs.append(everything(dtype))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def guarded(x: torch.Tensor, run: Callable[[torch.Tensor], None]) -> None:
    """Run on copies of x, one at the start of readable memory and one at its end."""
    page, size = mmap.PAGESIZE, x.numel() * x.dtype.itemsize
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
    last = memory_format(x) == torch.channels_last
    for offset in (page, (pages + 1) * page - size):
        copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset)
        b, c, h, w = x.shape
        copy = copy.reshape(b, h, w, c).permute(0, 3, 1, 2) if last else copy.reshape(x.shape)
        run(copy.copy_(x))
    for guard in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(guard), page, 3) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_maps_at_the_edge_of_readable_memory(layout, dtype):
    if not sys.platform.startswith("linux"):
        pytest.skip("page protection is set through libc's mprotect")
    for rows, shape in ((65, (2, 17, 7, 7)), (3, (1, 33, 1, 5)), (9, (1, 3, 1, 1))):
        weight = weight_of(rows, shape[1])
        x = laid_out(shape, layout, dtype)
        guarded(
            x, lambda copy, w=weight: check(pointwise(copy, w), pointwise_oracle(copy, w), copy)
        )
        square = interaction_arguments(x)
        want = cpu_products.channel_interaction(x, *square)
        guarded(
            x,
            lambda copy, args=square, want=want: torch.testing.assert_close(
                cpu_products.channel_interaction(copy, *args), want, rtol=0, atol=0
            ),
        )


def test_what_was_not_packed_here_is_refused():
    x, packed = torch.zeros(1, 6, 2, 2), op("pack_product_weight")(weight_of(4, 6), False)
    run = op("pointwise_packed")
    with pytest.raises(RuntimeError, match="takes 6 channels, got 5"):
        run(x[:, :5], packed, None, None, False)
    for bad in (weight_of(4, 6), packed[:-1], packed[:32], packed[::2], torch.zeros_like(packed)):
        with pytest.raises(RuntimeError, match=r"pack_product_weight|another instruction set"):
            run(x, bad, None, None, False)
    other = packed.clone()
    other.view(torch.int64)[2] = 1000  # rows of a panel
    with pytest.raises(RuntimeError, match="another instruction set"):
        run(x, other, None, None, False)
    with pytest.raises(RuntimeError, match="scale must be float32 of 4 elements, got 3"):
        run(x, packed, torch.ones(3), None, False)
    pairs = op("pack_product_weight")(weight_of(4, 6), True)
    if pairs.numel() != packed.numel():
        with pytest.raises(RuntimeError, match="packed for bfloat16 maps"):
            run(x, pairs, None, None, False)
    with pytest.raises(RuntimeError, match="weight must be float32"):
        op("pack_product_weight")(weight_of(4, 6).double(), False)
    with pytest.raises(RuntimeError, match="a packed weight for each"):
        op("msff_packed")([x], [], torch.ones(4), torch.ones(4))
    args = convert("gated_fusion", arguments("gated_fusion", Sizes(1, 8, 2, 2, 2)), x.dtype, "")
    with pytest.raises(RuntimeError, match="G a divisor of C"):
        op("gated_fusion_packed")(args[0], torch.ones(1, 3, 2, 2), *packed_fusion(args), False)


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "portable"])
def test_this_file_with_each_instruction_set_forced(isa):
    if os.environ.get("FUSED_CPU_ISA"):
        pytest.skip("runs inside itself otherwise")
    available = op("cpu_isa_available")().split(", ")
    if isa not in available:
        pytest.skip(f"this processor and build have only {available}")
    environment = {**os.environ, "FUSED_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", "not forced", __file__],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
