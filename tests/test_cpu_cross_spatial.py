"""Native slab kernels of coordinate_attention and cross_spatial: tails, layouts, bits, limits."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_cases import LAYOUTS, OPS, Sizes, arguments, convert, error, layout_of, tolerance

from fused.backends import cpu, cpu_slabs, native, reference
from fused.backends.reference.published import PublishedCIEMA

if cpu.LIBRARY.error is not None:
    pytest.skip(cpu.LIBRARY.error, allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STAGES = ("coordinate_attention", "cross_spatial")
# Channels a group: one lane, tails, one vector, several panels of each width.
CHANNELS = (1, 2, 3, 8, 20, 32, 48, 64, 128)
# Direct form: one pixel, one row, one column, few pixels; Winograd: tails of 4x4 and 6x6 tiles.
MAPS = ((1, 1), (1, 37), (6, 1), (2, 5), (5, 5), (3, 9), (7, 7), (12, 24), (13, 29))
# Measured at most 6e-7 (w) and 3e-7 (softmax) where the convolutions are Winograd's.
WINOGRAD_TOLERANCE = 2e-6


def oracle(op: str, named: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return reference.KERNELS[op](*(named[k] for k in OPS[op].inputs))


def rounded(named: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return named | {"e": named["e"].to(dtype).double()}


def compare(op: str, sizes: Sizes, dtype: torch.dtype, layout: str, limit: float) -> None:
    named = rounded(arguments(op, sizes), dtype)
    outputs = cpu.KERNELS[op](*convert(op, named, dtype, layout))
    for got, want in zip(outputs, oracle(op, named), strict=True):
        assert got.shape == want.shape
        assert got.is_contiguous()
        assert error(got, want) <= limit, (op, sizes, layout)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("op", STAGES)
def test_every_number_of_channels_and_size_of_map(op, channels):
    for height, width in MAPS:
        groups = 1 if channels > 32 else 2
        sizes = Sizes(2, channels * groups, height, width, groups)
        compare(op, sizes, torch.float32, "contiguous", WINOGRAD_TOLERANCE)


@pytest.mark.parametrize("layout", [*LAYOUTS, "channel_slice", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", STAGES)
def test_every_layout_gives_the_same_bits(op, dtype, layout):
    for sizes in (Sizes(2, 40, 9, 14, 2), Sizes(1, 6, 5, 1, 2), Sizes(3, 1, 4, 18, 1)):
        args = convert(op, rounded(arguments(op, sizes), dtype), dtype, "contiguous")
        if layout == "expanded":
            args[0] = args[0][:, :, :, :1].expand(args[0].shape)
        plain = args[0].contiguous()
        if layout == "channel_slice":
            wide = torch.zeros(sizes.batch, sizes.height, sizes.width, sizes.channels + 3)
            wide[..., 1:-2] = plain.permute(0, 2, 3, 1)
            args[0] = wide.to(dtype).permute(0, 3, 1, 2)[:, 1:-2]
        elif layout != "expanded":
            args[0] = layout_of(plain, layout)
        got = cpu.KERNELS[op](*args)
        want = cpu.KERNELS[op](plain, *args[1:])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("op", STAGES)
def test_half_precision_maps(op, dtype):
    for sizes in (Sizes(1, 64, 14, 19, 2), Sizes(2, 10, 2, 3, 2)):
        for layout in ("contiguous", "channels_last"):
            compare(op, sizes, dtype, layout, tolerance(dtype)[0])


def test_half_precision_parameters():
    """As in a module that was converted whole."""
    sizes = Sizes(1, 32, 9, 9, 2)
    for op in STAGES:
        named = arguments(op, sizes)
        args = convert(op, named, torch.bfloat16, "contiguous")
        halved = [a.bfloat16() if isinstance(a, torch.Tensor) else a for a in args]
        widened = [a.float() if isinstance(a, torch.Tensor) else a for a in halved]
        got = cpu.KERNELS[op](*halved)
        want = cpu.KERNELS[op](halved[0], *widened[1:])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_one_pass_over_both_stages_equals_two():
    for sizes in (Sizes(2, 64, 13, 10, 2), Sizes(1, 6, 1, 5, 3)):
        for dtype, layout in ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last")):
            gate_args = convert("coordinate_attention", arguments(STAGES[0], sizes), dtype, layout)
            e, weight, bias, groups, eps = gate_args
            args = convert("cross_spatial", arguments("cross_spatial", sizes), dtype, layout)
            vectors = cpu.KERNELS["coordinate_attention"](*gate_args)
            want = cpu.KERNELS["cross_spatial"](e, *vectors, *args[5:])[0]
            packed = cpu_slabs.pack_cross_spatial(args[5:24], *args[27:])
            gate = cpu_slabs.pack_coordinate_attention(weight, bias)
            assert torch.equal(cpu_slabs.both_stages(e, gate, eps, packed, groups), want)


@pytest.mark.parametrize("op", STAGES)
def test_same_bits_with_any_number_of_threads(op):
    before = torch.get_num_threads()
    try:
        for sizes in (Sizes(2, 96, 15, 14, 3), Sizes(1, 16, 3, 3, 1)):
            args = convert(op, arguments(op, sizes), torch.float32, "contiguous")
            runs = []
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                runs.append(cpu.KERNELS[op](*args))
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 5, 7, 5), (1, 32, 9, 11), (1, 3, 1, 1), (1, 1, 4, 9)])
def test_nothing_is_read_before_or_behind_the_map(shape, layout, dtype):
    if not sys.platform.startswith("linux"):
        pytest.skip("page protection is set through libc's mprotect")
    page = mmap.PAGESIZE
    batch, channels, height, width = shape
    sizes = Sizes(*shape, 1)
    size = batch * channels * height * width * dtype.itemsize
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    guards = (start, start + (pages + 1) * page)
    for guard in guards:
        assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
    for op in STAGES:
        args = convert(op, arguments(op, sizes), dtype, layout)
        want = cpu.KERNELS[op](*args)
        for offset in (page, (pages + 1) * page - size):  # at the first page's start, at the end
            flat = torch.frombuffer(memory, dtype=dtype, count=args[0].numel(), offset=offset)
            x = flat.as_strided(args[0].shape, args[0].stride())
            x.copy_(args[0])
            got = cpu.KERNELS[op](x, *args[1:])
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for guard in guards:
        assert libc.mprotect(ctypes.c_void_p(guard), page, 3) == 0


@pytest.mark.parametrize("size", [(2, 6), (9, 10)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_and_infinity_as_in_eager(value, size):
    published = PublishedCIEMA(48, 2).eval()
    named = arguments("cross_spatial", Sizes(2, 48, *size, 2))
    args = convert("cross_spatial", named, torch.float32, "contiguous")
    args[0][1, 30, 1, 5] = value
    gates = published.conv1x1
    vectors = cpu.KERNELS["coordinate_attention"](args[0], gates.weight, gates.bias, 2, 1e-5)
    want_vectors = reference.KERNELS["coordinate_attention"](
        args[0], gates.weight, gates.bias, 2, 1e-5
    )
    for mine, its in zip(vectors, want_vectors, strict=True):
        # a gate at infinity is 6e-39 here and 0 there: infinity times it is infinity or NaN
        assert torch.equal(mine.isfinite(), its.isfinite())
    got = cpu.KERNELS["cross_spatial"](args[0], *want_vectors, *args[5:])
    want = reference.KERNELS["cross_spatial"](args[0], *want_vectors, *args[5:])
    for mine, its in zip(got[:3], want[:3], strict=True):
        assert torch.equal(mine.isnan(), its.isnan())
    assert got[0][1, 1].isnan().all()
    assert got[0][0].isfinite().all()


def test_large_offsets_do_not_spoil_the_variance():
    args = convert(
        "coordinate_attention",
        arguments("coordinate_attention", Sizes(1, 32, 40, 40, 1)),
        torch.float64,
        "contiguous",
    )
    args[0] = (args[0] + 100).float().double()
    want = reference.KERNELS["coordinate_attention"](*args)
    floats = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
    got = cpu.KERNELS["coordinate_attention"](*floats)
    for mine, its in zip(got, want, strict=True):
        assert error(mine, its) <= 1e-5


def test_bad_input_is_refused_by_name():
    sizes = Sizes(1, 32, 9, 9, 2)
    args = convert("cross_spatial", arguments("cross_spatial", sizes), torch.float32, "contiguous")
    e, vectors, groups = args[0], args[1:5], args[24]
    run = native.kernel("cross_spatial_packed")
    packed = cpu_slabs.pack_cross_spatial(args[5:24], 1e-5, 1e-5)
    direct_only = cpu_slabs.pack_cross_spatial(args[5:24], 1e-5, 1e-5, (1, 1))
    for wrong in (packed[:-1].clone(), torch.zeros_like(packed), torch.zeros(3), direct_only):
        with pytest.raises(RuntimeError, match="packed does not hold weights"):
            run(e, *vectors, wrong, groups)
    with pytest.raises(RuntimeError, match="for 32 channels a group"):
        run(e, *vectors, packed, 1)
    with pytest.raises(RuntimeError, match="groups = 5 does not divide"):
        run(e, *vectors, packed, 5)
    with pytest.raises(RuntimeError, match="alpha_h must have 288 values"):
        run(e, vectors[0][:, 1:].contiguous(), *vectors[1:], packed, groups)
    with pytest.raises(RuntimeError, match="rstd must be float32 and contiguous"):
        run(e, *vectors[:3], vectors[3].double(), packed, groups)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        run(e.double(), *vectors, packed, groups)
    with pytest.raises(RuntimeError, match="gate must have"):
        native.kernel("coordinate_attention_packed")(e, torch.zeros(5), groups, 1e-5)


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "portable"])
def test_these_stages_with_each_instruction_set_forced(isa):
    if os.environ.get("FUSED_CPU_ISA"):
        pytest.skip("runs inside itself otherwise")
    available = native.kernel("cpu_isa_available")().split(", ")
    if isa not in available:
        pytest.skip(f"this processor and build have only {available}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    files = [__file__, str(ROOT / "tests" / "test_cpu_slab_gradients.py")]
    done = subprocess.run(
        [*command, "-k", "not forced", *files],
        cwd=ROOT,
        env={**os.environ, "FUSED_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
