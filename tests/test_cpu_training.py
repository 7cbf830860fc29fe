"""The native kernels that only training needs, and that they meet other backends' halves."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from stage_cases import OPS, Sizes, arguments, convert, differentiable, error, require_grad
from test_cpu_products import DTYPES, LARGE, guarded, op, weight_of
from test_native import LAYOUTS, ROOT, laid_out

from fused import FusedCIEMA
from fused.backends import cpu, cpu_stages, reference
from fused.backends.reference import normalisation
from fused.contract import EPS, memory_format

pytestmark = pytest.mark.skipif(
    cpu.LIBRARY.error is not None, reason=f"native CPU library: {cpu.LIBRARY.error}"
)

STAGES = ("channel_interaction", "gated_fusion", "msff")
# A bfloat16 operand that was transformed is rounded again before it is multiplied.
OPERAND_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-5}
RESULT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
_DIMS = (0, 2, 3)


def positive(size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(size)) + 0.5


def shift(size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size + 1)) * 0.3


def column(vector: torch.Tensor) -> torch.Tensor:
    return vector.double()[:, None, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("rows", "shape"),
    [(1, (1, 1, 1, 1)), (70, (2, 34, 5, 7)), (9, (2, 50, 1, 3)), (65, (1, 6, 29, 31))],
    ids=str,
)
def test_weight_gradient_equals_float64(rows, shape, layout, dtype):
    b, channels, h, w = shape
    x, grad = laid_out(shape, layout, dtype), laid_out((b, rows, h, w), layout, dtype)
    run = op("product_gradient")
    want = torch.einsum("bmhw,bkhw->bmk", grad.double(), x.double())
    got = run(grad, x, None, None, None, True)
    assert (got.shape, got.dtype) == (want.shape, torch.float32)
    assert error(got, want) <= 1e-5
    assert error(run(grad, x, None, None, None, False)[0], want.sum(0)) <= 1e-5
    gate = laid_out((b, max(channels // 2, 1), h, w), layout, dtype)
    scale, bias = positive(channels), shift(channels)
    spread = gate.double().repeat_interleave(channels // gate.shape[1], 1)
    s = (x.double() * column(scale) + column(bias)).relu() * spread
    want = torch.einsum("bmhw,bkhw->mk", grad.double(), s)
    got = run(grad, x, gate, scale, bias, False)[0]
    assert error(got, want) <= OPERAND_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_product_with_moments_equals_float64(layout, dtype):
    x, second = (laid_out((2, size, 9, 13), layout, dtype) for size in (34, 5))
    gate = laid_out((2, 17, 9, 13), layout, dtype)
    weights = weight_of(70, 34), weight_of(70, 5)
    packed = [op("pack_product_weight")(weight, False) for weight in weights]
    scale, bias, constant = positive(5), shift(5), shift(70)
    out, mean, var = op("product_moments")(
        x, packed[0], gate, second, packed[1], scale, bias, constant, True, True
    )
    s = x.double() * gate.double().repeat_interleave(2, 1)
    r = (second.double() * column(scale) + column(bias)).relu()
    want = torch.einsum("mk,bkhw->bmhw", weights[0].double(), s) + column(constant)
    want = want + torch.einsum("mk,bkhw->bmhw", weights[1].double(), r)
    assert error(out, want) <= RESULT_TOLERANCE[dtype]
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format(x))
    assert error(mean, out.double().mean(_DIMS)) <= 1e-5  # of what is kept: rounded
    assert error(var, out.double().var(_DIMS, correction=0)) <= 1e-5
    nothing, mean, _ = op("product_moments")(x, packed[0], *[None] * 6, False, True)
    assert nothing.numel() == 0
    plain = torch.einsum("mk,bkhw->bmhw", weights[0].double(), x.double())
    assert error(mean, plain.mean(_DIMS)) <= 1e-5


def test_what_does_not_fit_a_weight_gradient():
    run, x, grad = op("product_gradient"), torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8)
    for gate in (torch.ones(2, 2, 1, 1), torch.ones(1, 2, 8, 8), torch.ones(2, 2, 8, 9)):
        with pytest.raises(RuntimeError, match="gate and x must have the same samples and pixels"):
            run(grad, x, gate, None, None, False)
    assert torch.equal(run(grad[:0], x[:0], None, None, None, False), torch.zeros(1, 3, 4))


def test_saved_tensors_may_come_back_in_another_layout():
    block = FusedCIEMA(16, groups=4, backend="cpu")
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    want = torch.autograd.grad(block(x).sum(), x)[0]

    def turned(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(0, -1).contiguous() if t.dim() > 1 else t

    def back(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(0, -1) if t.dim() > 1 else t

    with torch.autograd.graph.saved_tensors_hooks(turned, back):
        out = block(x)
    assert error(torch.autograd.grad(out.sum(), x)[0], want) <= 1e-5


def test_a_large_mean_does_not_cancel_the_variance():
    x = torch.randn(3, 8, 40, 41, generator=torch.Generator().manual_seed(0)) + 300
    packed = op("pack_product_weight")(torch.eye(8), False)
    _, mean, var = op("product_moments")(x, packed, *[None] * 6, False, True)
    assert error(mean, x.double().mean(_DIMS)) <= 1e-6
    assert error(var, x.double().var(_DIMS, correction=0)) <= 1e-5


def norm_oracle(
    g: torch.Tensor, z: torch.Tensor, vectors: list[torch.Tensor], training: bool
) -> tuple[torch.Tensor, ...]:
    """Gradient of a batch norm, and of its weight and bias, from that of its result."""
    mean, var, weight, _ = (column(v) for v in vectors)
    n = normalisation.normalised(z.double(), mean, var, EPS)
    grad_z = normalisation.backward(g, n, var, weight, EPS, _DIMS if training else None)
    return grad_z, (g * n).sum(_DIMS), g.sum(_DIMS)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_backward_equal_float64(layout, dtype, training):
    shape = (2, 34, 9, 13)
    z, grad, e = (laid_out(shape, layout, dtype) * factor for factor in (1.0, 0.5, 0.75))
    w = laid_out((2, 17, 9, 13), layout, dtype).sigmoid()
    vectors = [shift(34), positive(34), positive(34) + 0.1, shift(34) + 0.01]
    mean, var, weight, bias = (column(v) for v in vectors)
    y = normalisation.affine(z.double(), mean, var, weight, bias, EPS)
    want = norm_oracle(grad.double() * (y > 0), z, vectors, training)
    got = op("norm_relu_backward")(grad, z, *vectors, EPS, training)
    for ours, theirs in zip(got, want, strict=True):
        assert error(ours, theirs) <= RESULT_TOLERANCE[dtype]
    assert got[0].dtype == dtype
    wide = op("norm_relu_backward")(grad, z.float(), *vectors, EPS, training)
    assert wide[0].dtype == dtype
    assert torch.equal(wide[1], got[1])
    phi, spread = y.sigmoid(), w.double().repeat_interleave(2, 1)
    g = grad.double() * e.double() * (1 - spread) * phi * (1 - phi)
    got = op("norm_gate_backward")(grad, e, w, z, *vectors, EPS, training)
    for ours, theirs in zip(got, norm_oracle(g, z, vectors, training), strict=True):
        assert error(ours, theirs) <= RESULT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(7, 9, 3, 2), (1, 17, 1, 5), (13, 8, 13, 1), (40, 33, 39, 17)])
def test_resizing_backward_equals_pytorchs_in_float64(sizes, layout, dtype):
    height, width, h, w = sizes
    grad = laid_out((2, 19, height, width), layout, dtype)
    got = op("msff_shrink")(grad, h, w)
    want = torch.ops.aten.upsample_bilinear2d_backward(
        grad.double(), [height, width], [2, 19, h, w], False, None, None
    )
    assert error(got, want) <= RESULT_TOLERANCE[dtype]
    assert (got.dtype, got.shape) == (dtype, want.shape)
    assert got.is_contiguous(memory_format=memory_format(grad))
    with pytest.raises(RuntimeError, match="the small map must have 1 to"):
        op("msff_shrink")(grad, height + 1, w)


def run_stage(name: str, args: list[Any], halves: tuple[Any, Any]) -> list[torch.Tensor]:
    """Outputs and gradients, the forward of one backend and the backward of another."""
    forward, backward = halves
    stage = OPS[name]
    outputs = forward(*args)
    named = dict(zip(stage.inputs, args, strict=True))
    named |= dict(zip(stage.outputs, outputs, strict=True))
    for key in stage.differentiable:
        generator = torch.Generator().manual_seed(7)
        grad = torch.randn(named[key].shape, generator=generator).to(named[key])
        named[f"grad_{key}"] = grad.contiguous(memory_format=memory_format(named[key]))
    gradients = backward(*(named[key] for key in stage.backward_inputs))
    flat = [g for one in gradients for g in (one if isinstance(one, list) else [one])]
    return [*outputs, *flat]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_halves_of_two_backends_fit_together(name, training):
    sizes = Sizes(2, 72, 9, 7, 4)
    args = convert(name, arguments(name, sizes, training), torch.float32, "contiguous")
    ours = (cpu_stages.KERNELS[name], cpu_stages.KERNELS[f"{name}_backward"])
    theirs = (reference.KERNELS[name], reference.KERNELS[f"{name}_backward"])
    want = run_stage(name, args, theirs)
    for halves in ((ours[0], theirs[1]), (theirs[0], ours[1]), ours):
        for got, wanted in zip(run_stage(name, args, halves), want, strict=True):
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
            assert error(got, wanted) <= 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STAGES)
def test_same_bits_with_any_number_of_threads(name, dtype):
    args = convert(name, arguments(name, Sizes(2, 144, 13, 17, 4), True), dtype, "contiguous")
    halves = (cpu_stages.KERNELS[name], cpu_stages.KERNELS[f"{name}_backward"])
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(run_stage(name, args, halves))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_at_the_edge_of_readable_memory(layout, dtype):
    if not sys.platform.startswith("linux"):
        pytest.skip("page protection is set through libc's mprotect")
    for shape in ((2, 17, 7, 7), (1, 33, 1, 5), (1, 3, 1, 1)):
        x = laid_out(shape, layout, dtype)
        vectors = [shift(shape[1]), *[positive(shape[1])] * 2, shift(shape[1])]
        w = x[:, :1].sigmoid()
        runs = (
            lambda copy: op("product_gradient")(copy, copy, None, None, None, False),
            lambda copy, v=vectors: op("norm_relu_backward")(copy, copy, *v, EPS, True)[0],
            lambda copy, v=vectors, w=w: op("norm_gate_backward")(
                copy, copy, w, copy, *v, EPS, True
            )[0],
            lambda copy: op("msff_shrink")(copy, 1, 1),
        )
        for run in runs:
            want = run(x)
            guarded(
                x,
                lambda copy, run=run, want=want: torch.testing.assert_close(
                    run(copy), want, rtol=0, atol=0
                ),
            )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", [Sizes(1, 160, 31, 29, 5), LARGE], ids=str)
@pytest.mark.parametrize("name", STAGES)
def test_gradients_of_wide_maps_equal_float64(name, sizes, training):
    """Several tiles of pixels, blocks of rows and chunks of a weight's gradient."""
    # A draw in which no pixel lies so near the ReLU's threshold that float32 takes the other side.
    named = arguments(name, sizes, training, seed=1)
    torch.manual_seed(1)
    doubles = convert(name, named, torch.float64, "contiguous")
    leaves = require_grad(name, doubles)
    results = differentiable(name, OPS[name](*doubles, backend="reference"))
    seeds = [torch.randn_like(o) for o in results]
    want = torch.autograd.grad(results, leaves, seeds)
    args = convert(name, named, torch.float32, "contiguous")
    ours = require_grad(name, args)
    results = differentiable(name, OPS[name](*args, backend="cpu"))
    got = torch.autograd.grad(results, ours, [s.float() for s in seeds])
    for gradient, wanted in zip(got, want, strict=True):
        assert error(gradient, wanted) <= 1e-4


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
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
