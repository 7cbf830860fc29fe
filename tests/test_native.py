"""The native channel statistics (CPU) against float64, in every way that a tensor can lie."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused.backends import cpu, cuda, native

pytestmark = pytest.mark.skipif(
    cpu.LIBRARY.error is not None, reason=f"native CPU library: {cpu.LIBRARY.error}"
)

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 1x1, 1xW, Hx1, odd, tails around every vector width and block, the paper's maps
SHAPES = (
    (1, 1, 1, 1),
    (2, 70, 1, 1),
    (1, 3, 1, 7),
    (2, 5, 9, 1),
    (3, 17, 5, 5),
    (2, 16, 3, 5),
    (1, 33, 4, 4),
    (1, 31, 1, 17),
    (2, 64, 7, 9),
    (1, 65, 8, 8),
    (1, 2, 23, 23),
    (1, 7, 32, 16),
    (1, 130, 3, 171),
    (2, 64, 56, 56),
)
LAYOUTS = ("contiguous", "channels_last", "channel_slice", "strided", "transposed", "expanded")
MEAN_TOLERANCE = 1e-5  # of the mean of |x|


def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.ciema_native.channel_statistics(x)


def backward(
    grad_mean: torch.Tensor, grad_max: torch.Tensor, argmax: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    return torch.ops.ciema_native.channel_statistics_backward(grad_mean, grad_max, argmax, x)


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> torch.Tensor:
    """A random map of this shape, in this layout, values on a grid so that ties happen."""
    b, c, h, w = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def grid(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).mul(16).round().div(16).to(dtype)

    if layout == "contiguous":
        return grid(b, c, h, w)
    if layout == "channels_last":
        return grid(b, h, w, c).permute(0, 3, 1, 2)
    if layout == "channel_slice":  # channels_last with a gap after each pixel, and misaligned
        return grid(b, h, w, c + 3).permute(0, 3, 1, 2)[:, 1 : c + 1]
    if layout == "strided":
        return grid(b, c, 2 * h, 2 * w)[:, :, ::2, 1::2]
    if layout == "transposed":
        return grid(c, b, w, h).permute(1, 0, 3, 2)
    return grid(b, c, h, 1).expand(b, c, h, w)


def check(x: torch.Tensor) -> None:
    """Compare with float64; x holds no NaN."""
    mean, high, argmax = statistics(x)
    flat = x.double().flatten(2)
    assert mean.shape == high.shape == argmax.shape == x.shape[:2]
    assert (mean.dtype, high.dtype, argmax.dtype) == (torch.float32, torch.float32, torch.int64)
    error = (mean.double() - flat.mean(2)).abs()
    assert (error <= MEAN_TOLERANCE * flat.abs().mean(2)).all()
    assert torch.equal(high.double(), flat.amax(2))
    positions = torch.arange(flat.shape[2]).expand_as(flat)
    first = torch.where(flat == flat.amax(2, keepdim=True), positions, flat.shape[2]).amin(2)
    assert torch.equal(argmax, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_equals_float64(shape, layout, dtype):
    check(laid_out(shape, layout, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_equals_float64_and_keeps_the_format(shape, layout, dtype):
    x = laid_out(shape, layout, dtype)
    argmax = statistics(x)[2]
    generator = torch.Generator().manual_seed(5)
    grad_mean = torch.randn(shape[:2], generator=generator)
    grad_max = torch.randn(shape[:2], generator=generator)
    grad_x = backward(grad_mean, grad_max, argmax, x)
    pixels = shape[2] * shape[3]
    expected = (grad_mean.double() / pixels).unsqueeze(2).repeat(1, 1, pixels)
    expected.scatter_add_(2, argmax.unsqueeze(2), grad_max.double().unsqueeze(2))
    step = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    # the sum of two float32 numbers may cancel: the error is relative to what was added
    size = grad_mean.double().abs().add(grad_max.double().abs()).amax()
    assert (grad_x.double().flatten(2) - expected).abs().max() <= step * size
    assert (grad_x.shape, grad_x.dtype) == (x.shape, dtype)
    last = torch.channels_last
    wanted = not x.is_contiguous() and x.is_contiguous(memory_format=last)
    assert grad_x.is_contiguous(memory_format=last if wanted else torch.contiguous_format)


def test_backward_takes_strided_gradients():
    x = torch.randn(2, 6, 3, 3)
    argmax = statistics(x)[2]
    grads = torch.randn(2, 2, 12)[:, :, ::2]
    grad_x = backward(grads[0], grads[1], argmax.t().contiguous().t(), x)
    assert torch.equal(grad_x, backward(grads[0].clone(), grads[1].clone(), argmax, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_not_a_number_counts_as_the_maximum_and_the_first_wins(layout, dtype):
    x = laid_out((2, 37, 24, 25), layout, dtype).clone(memory_format=torch.preserve_format)
    for channel, places in ((0, (0,)), (5, (599,)), (20, (7, 3)), (36, (300, 512)), (33, (88,))):
        for place in places:
            x[1, channel, place // 25, place % 25] = float("nan")
    x[1, 20, 0, 0] = float("inf")
    mean, high, argmax = statistics(x)
    hit = torch.zeros(2, 37, dtype=torch.bool)
    hit[1, [0, 5, 20, 36, 33]] = True
    assert torch.equal(high.isnan(), hit)
    assert torch.equal(mean.isnan(), hit)
    assert argmax[1, [0, 5, 20, 36, 33]].tolist() == [0, 599, 3, 300, 88]
    pooled, where = torch.nn.functional.max_pool2d(x.float(), (24, 25), return_indices=True)
    clean = ~hit
    assert torch.equal(high[clean], pooled.flatten(1)[clean])
    flat = x.float().flatten(2)
    assert torch.equal(flat.gather(2, argmax.unsqueeze(2)).squeeze(2)[clean], high[clean])
    assert where.shape[:2] == argmax.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinities(layout, dtype):
    x = laid_out((1, 40, 23, 23), layout, dtype).clone(memory_format=torch.preserve_format)
    inf = float("inf")
    x[0, 0], x[0, 39] = -inf, -inf
    x[0, 1, 20, 20] = inf
    x[0, 2, 2, 2], x[0, 2, 3, 3] = inf, -inf
    x[0, 35, 22, 22], x[0, 35, 0, 0] = inf, -inf
    mean, high, argmax = statistics(x)
    assert high[0, [0, 39, 1, 2, 35]].tolist() == [-inf, -inf, inf, inf, inf]
    assert argmax[0, [0, 39, 1, 2, 35]].tolist() == [0, 0, 480, 48, 528]
    assert mean[0, [0, 39, 1]].tolist() == [-inf, -inf, inf]
    assert mean[0, [2, 35]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_numbers_and_signed_zeros(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.full((1, 40, 5, 7), -tiny / 4, dtype=dtype)
    x[0, :, 3, 3] = tiny / 8
    for one in (x, x.contiguous(memory_format=torch.channels_last)):
        check(one)
    zeros = torch.zeros(1, 40, 5, 7, dtype=dtype)
    zeros[0, :, 0, 0] = -0.0
    for one in (zeros, zeros.contiguous(memory_format=torch.channels_last)):
        _, high, argmax = statistics(one)
        assert (argmax == 0).all()
        assert torch.signbit(high).all()  # the element at argmax, not its equal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_half_precision_value_is_widened_exactly(layout, dtype):
    if dtype == torch.float32:
        bits = torch.arange(0, 2**31 - 2**23, 2**15 + 7, dtype=torch.int32)
    else:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    x = values[values.isfinite()].reshape(1, -1, 1, 1)
    x = x if layout == "contiguous" else x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    mean, high, _ = statistics(x)
    assert torch.equal(high.flatten(), x.flatten().float())
    assert torch.equal(mean.flatten(), x.flatten().float())
    wide = values[values.isfinite()].reshape(1, 1, 1, -1)  # by vectors too: the largest one wins
    assert statistics(wide)[1].item() == wide.float().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (1, 33, 9, 9), (1, 64, 7, 7), (1, 1, 1, 1)])
def test_nothing_is_read_before_or_behind_the_tensor(shape, layout, dtype):
    if not sys.platform.startswith("linux"):
        pytest.skip("page protection is set through libc's mprotect")
    page = mmap.PAGESIZE
    data = laid_out(shape, "contiguous", dtype)
    size = data.numel() * dtype.itemsize
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
    for offset in (page, (pages + 1) * page - size):  # at the first page's start, at the end
        count = data.numel()
        x = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).reshape(shape)
        if layout == "channels_last":
            b, c, h, w = shape
            x = x.reshape(b, h, w, c).permute(0, 3, 1, 2)
        x.copy_(data)
        check(x)
    for guard in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(guard), page, 3) == 0


def test_large_planes_stay_accurate():
    x = torch.full((1, 1, 2048, 2048), 0.1)
    x[0, 0, 2047, 2047] = 0.2
    check(x)
    check(x.permute(0, 3, 1, 2)[:, 5:6])
    check(torch.rand(1, 2, 1500, 1501).add(100).permute(0, 1, 3, 2))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 200, 28, 28), (1, 1024, 20, 20), (1, 1, 500, 500)])
def test_same_bits_with_any_number_of_threads(shape, layout):
    x = laid_out(shape, layout, torch.float32) + torch.rand(shape[1], 1, 1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            one = statistics(x)
            results.append((*one, backward(one[0], one[1], one[2], x)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_batch_and_no_channels():
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4)):
        x = torch.empty(shape)
        mean, high, argmax = statistics(x)
        assert mean.shape == high.shape == argmax.shape == shape[:2]
        assert backward(mean, high, argmax, x).shape == shape


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 4), "4 dimensions"),
        (torch.zeros(1, 2, 3, 3, dtype=torch.float64), "float32, bfloat16 or float16"),
        (torch.zeros(1, 2, 0, 3), "no pixels"),
        (torch.zeros(1).expand(1, 1, 65536, 65536), "below 2\\^31"),
    ],
)
def test_bad_input_is_refused_by_name(x, message):
    with pytest.raises(RuntimeError, match=message):
        statistics(x)


def test_bad_gradients_are_refused_by_name():
    x = torch.randn(2, 3, 4, 4)
    mean, high, argmax = statistics(x)
    with pytest.raises(RuntimeError, match=r"grad_mean must have the shape \(B, C\) = \(2, 3\)"):
        backward(mean[:1], high, argmax, x)
    with pytest.raises(RuntimeError, match="grad_max must be float32"):
        backward(mean, high.double(), argmax, x)
    with pytest.raises(RuntimeError, match="argmax must be int64"):
        backward(mean, high, argmax.int(), x)
    with pytest.raises(RuntimeError, match=r"argmax must lie in \[0, 16\), got 16"):
        backward(mean, high, argmax.clone().fill_(16), x)
    with pytest.raises(RuntimeError, match="got -1"):
        backward(mean, high, argmax.clone().fill_(-1), x)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "portable"])
def test_this_file_with_each_instruction_set_forced(isa):
    if os.environ.get("FUSED_CPU_ISA"):
        pytest.skip("runs inside itself otherwise")
    available = native.kernel("cpu_isa_available")().split(", ")
    if isa not in available:
        pytest.skip(f"this processor and build have only {available}")
    environment = {**os.environ, "FUSED_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    # deselected: what starts processes of its own
    only = "not forced and not instruction_set and not reason"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", only, __file__],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    told = run_python(
        "from fused.backends import native, cpu; print(native.kernel('cpu_isa')())",
        FUSED_CPU_ISA=isa,
    )
    assert told.stdout.strip() == isa, told.stderr[-2000:]


def test_an_impossible_instruction_set_is_a_reason():
    code = (
        "import torch\n"
        "from fused.backends import cpu\n"
        "print(cpu.BACKEND.why_not('channel_statistics', torch.zeros(1, 2, 3, 3)))"
    )
    done = run_python(code, FUSED_CPU_ISA="sse9")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "FUSED_CPU_ISA='sse9'" in done.stdout


def test_reasons():
    x = torch.zeros(1, 2, 3, 3)
    can_run = cpu.BACKEND.can_run
    assert can_run("channel_statistics", x) is None
    assert can_run("channel_statistics_backward", x.bfloat16()) is None
    assert "float64 is not supported" in str(can_run("channel_statistics", x.double()))
    assert "input is on meta" in str(can_run("channel_statistics", x.to("meta")))
    assert "no cpu kernel yet" in str(can_run("no_such_op", x))
    reason = str(cuda.BACKEND.can_run("channel_statistics", x))
    assert cuda.LIBRARY.error or "the cuda kernels run on cuda" in reason
