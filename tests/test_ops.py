"""What torch.library asks of an op: opcheck, gradcheck, fakes, autocast, double backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from stage_cases import (
    OPS,
    Sizes,
    arguments,
    convert,
    differentiable,
    layout_of,
    require_grad,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from fused import backends
from fused.contract import OUTPUTS, SAVED, STAGES

SIZES = Sizes(2, 8, 4, 3, 2)
TRAINING = [
    (op, training, form)
    for op in OPS
    for training, form in [(False, "sequential"), (True, "sequential"), (True, "pooled")]
    if op in ("msff", "cross_spatial", "gated_fusion") or not training
]


def test_every_stage_is_an_op_and_says_what_it_saves() -> None:
    assert [name for name in OPS if name in STAGES] == list(STAGES)
    for name, op in OPS.items():
        for saved in SAVED[name]:
            assert saved in op.backward_inputs, (name, saved)
            assert saved in (*op.inputs, *op.outputs), (name, saved)
        # Nothing else of the size of a map is kept: the rest are parameters and numbers.
        kept = {n for n in op.backward_inputs if n in op.outputs or n in op.maps}
        assert kept <= set(SAVED[name]), name


@pytest.mark.parametrize(("name", "training", "form"), TRAINING)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(name: str, training: bool, form: str, layout: str) -> None:
    args = convert(name, arguments(name, SIZES, training, form), torch.float32, layout)
    torch.library.opcheck(OPS[name].op, args, {"backend": "auto"})
    require_grad(name, args)
    torch.library.opcheck(OPS[name].op, args, {"backend": "auto"})


@pytest.mark.parametrize(("name", "training", "form"), TRAINING)
def test_fakes_do_not_follow_the_default_dtype(name: str, training: bool, form: str) -> None:
    args = convert(name, arguments(name, SIZES, training, form), torch.float32, "contiguous")
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for _ in range(2):  # without gradients, and with them
            torch.library.opcheck(
                OPS[name].op, args, {"backend": "auto"}, test_utils="test_faketensor"
            )
            require_grad(name, args)
    finally:
        torch.set_default_dtype(usual)


@pytest.mark.parametrize(("name", "training", "form"), TRAINING)
def test_opcheck_of_the_backward(name: str, training: bool, form: str) -> None:
    args = convert(name, arguments(name, SIZES, training, form), torch.float32, "channels_last")
    op = OPS[name]
    outputs = op(*args)
    named = dict(zip(op.inputs, args, strict=True)) | dict(zip(op.outputs, outputs, strict=True))
    named |= {f"grad_{key}": torch.randn_like(named[key]) for key in op.differentiable}
    backward_args = [named[key] for key in op.backward_inputs]
    torch.library.opcheck(op.backward_op, backward_args, {"backend": "auto"})


@pytest.mark.parametrize(("name", "training", "form"), TRAINING)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradcheck(name: str, training: bool, form: str, backend: str | None) -> None:
    args = convert(name, arguments(name, SIZES, training, form), torch.float64, "contiguous")
    leaves = require_grad(name, args)

    def run(*values: torch.Tensor) -> list[torch.Tensor]:
        it = iter(values)
        given = []
        for key, arg in zip(OPS[name].inputs, args, strict=True):
            if key not in OPS[name].gradients:
                given.append(arg)
            elif isinstance(arg, list):
                given.append([next(it) for _ in arg])
            else:
                given.append(next(it))
        return differentiable(name, OPS[name](*given, backend=backend))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("name", OPS)
def test_double_backward_is_refused_by_the_op_and_done_by_the_reference(name: str) -> None:
    named = arguments(name, SIZES)
    for backend in (None, "reference"):
        args = convert(name, named, torch.float64, "contiguous")
        leaves = require_grad(name, args)
        results = differentiable(name, OPS[name](*args, backend=backend))
        total = sum((r**2).sum() for r in results)
        first = torch.autograd.grad(total, leaves, create_graph=True)
        again = sum((g**2).sum() for g in first)
        if backend is None:
            with pytest.raises(RuntimeError, match="backend='reference'"):
                again.backward()
        else:
            again.backward()
            assert leaves[0].grad.isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_forward_mode_and_torch_func_are_refused_by_the_op(name: str) -> None:
    """Forward mode would give zero, without an error."""
    op, args = OPS[name], convert(name, arguments(name, SIZES), torch.float64, "contiguous")
    x = args[0] if not isinstance(args[0], list) else args[0][0]

    def run(value: torch.Tensor, backend: str | None = None) -> torch.Tensor:
        first = [value, *args[0][1:]] if isinstance(args[0], list) else value
        return op(first, *args[1:], backend=backend)[0]

    refused = "cannot be differentiated {}; backend='reference' can"
    for transform in (
        lambda: torch.func.jvp(run, (x,), (x,)),
        lambda: torch.func.jacfwd(run)(x),
        lambda: _dual(run, x),
    ):
        with pytest.raises(RuntimeError, match=refused.format("in forward mode")):
            transform()
    with pytest.raises(RuntimeError, match=refused.format("by torch.func")):
        torch.func.grad(lambda value: run(value).sum())(x)
    _, tangent = torch.func.jvp(lambda value: run(value, "reference"), (x,), (x,))
    assert tangent.abs().max() > 0


def _dual(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    with forward_ad.dual_level():
        assert run(x).isfinite().all()  # without a tangent there is nothing to lose
        run(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_need_no_backend_that_runs(name: str) -> None:
    args = convert(name, arguments(name, SIZES), torch.float32, "contiguous", "meta")
    leaves = require_grad(name, args)
    total = sum(r.sum() for r in differentiable(name, OPS[name](*args, backend="cpu")))
    grads = torch.autograd.grad(total, leaves)
    assert [g.shape for g in grads] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_autocast_casts_maps_and_keeps_statistics(name: str, dtype: torch.dtype) -> None:
    args = convert(name, arguments(name, SIZES), torch.float32, "contiguous")
    low = convert(name, arguments(name, SIZES), dtype, "contiguous") if OPS[name].cast else args
    for backend in (None, "reference"):
        with torch.autocast("cpu", dtype):
            outputs = OPS[name](*args, backend=backend)
        want = OPS[name](*low, backend=backend)
        for got, expected in zip(outputs, want, strict=True):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)
    double = convert(name, arguments(name, SIZES), torch.float64, "contiguous")
    with torch.autocast("cpu", dtype):
        assert OPS[name](*double)[0].dtype == torch.float64


def test_backward_under_autocast_stays_in_float32() -> None:
    name = "cross_spatial"
    args = convert(name, arguments(name, SIZES), torch.float32, "contiguous")
    leaves = require_grad(name, args)
    w = OPS[name](*args)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(w.sum(), leaves, retain_graph=True)
    outside = torch.autograd.grad(w.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize(("name", "training", "form"), TRAINING)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_outputs_are_as_the_contract_says(
    name: str, training: bool, form: str, layout: str
) -> None:
    args = convert(name, arguments(name, SIZES, training, form), torch.bfloat16, layout)
    named = dict(zip(OPS[name].inputs, args, strict=True))
    for spec, out in zip(OUTPUTS[name](named), OPS[name](*args), strict=True):
        assert tuple(out.shape) == tuple(spec.shape)
        assert out.dtype == spec.dtype
        if out.dim() == 4:
            assert out.is_contiguous(memory_format=spec.memory_format)
        else:
            assert out.is_contiguous()


def test_a_gradient_without_saved_maps_is_refused() -> None:
    name = "gated_fusion"
    args = convert(name, arguments(name, SIZES), torch.float32, "contiguous")
    args[OPS[name].inputs.index("save")] = False
    OPS[name](*args)
    require_grad(name, args)
    with pytest.raises(ValueError, match="save=False"):
        OPS[name](*args)


def test_gradient_of_another_layout_than_the_output() -> None:
    """Eager hands an NCHW gradient to a channels_last output."""
    name = "gated_fusion"
    results = []
    for layout in ("contiguous", "channels_last"):
        args = convert(name, arguments(name, SIZES), torch.float64, layout)
        leaves = require_grad(name, args)
        out = OPS[name](*args)[0]
        grad = layout_of(torch.ones_like(out), "strided")
        results.append(torch.autograd.grad(out, leaves, grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "training", "form"), TRAINING)
@pytest.mark.parametrize("backend", ["cuda", "triton", "auto"])
def test_fakes_of_cuda_tensors(name: str, training: bool, form: str, backend: str) -> None:
    """As when a machine without a GPU traces for one: shapes and devices, and no kernel."""

    def on_cuda(value: object) -> object:
        if isinstance(value, list):
            return [on_cuda(one) for one in value]
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    args = convert(name, arguments(name, SIZES, training, form), torch.float16, "channels_last")
    with FakeTensorMode():
        fakes = [on_cuda(value) for value in args]
        outputs = OPS[name](*fakes, backend=backend)
        assert all(out.device.type == "cuda" for out in outputs)
    for spec, out in zip(
        OUTPUTS[name](dict(zip(OPS[name].inputs, args, strict=True))), outputs, strict=True
    ):
        assert (tuple(out.shape), out.dtype) == (tuple(spec.shape), spec.dtype)


@pytest.mark.parametrize("device", ["XPU", "MPS"])
@pytest.mark.parametrize("name", list(OPS))
def test_devices_without_our_kernels_run_the_reference(name: str, device: str) -> None:
    """No such device is here: the dispatcher is told of one, the backends see a fake map on it."""
    args = convert(name, arguments(name, SIZES), torch.float32, "contiguous")
    key = getattr(torch._C.DispatchKey, device)
    found = OPS[name].op.redispatch(torch._C.DispatchKeySet(key), *args, backend="reference")
    torch.testing.assert_close(found, OPS[name].op(*args, backend="reference"), rtol=0, atol=0)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ciema::{name}", f"Autocast{device}")
    with FakeTensorMode():
        x = torch.empty(2, 8, 4, 3, device=device.lower())
    assert backends.choose(name, x, groups=2).name == "reference"
    with pytest.raises(backends.BackendError, match=f"is on {device.lower()}"):
        backends.choose(name, x, "cpu", groups=2)


def _backward_arguments(name: str, training: bool = False) -> list:
    op = OPS[name]
    args = convert(name, arguments(name, SIZES, training), torch.float32, "contiguous")
    named = dict(zip(op.inputs, args, strict=True)) | dict(zip(op.outputs, op(*args), strict=True))
    named |= {f"grad_{key}": torch.randn_like(named[key]) for key in op.differentiable}
    return [named[key] for key in op.backward_inputs]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_a_tensor_on_another_device_makes_no_result(name: str, training: bool) -> None:
    """One on meta would have the dispatcher take the fake, whose results are never written."""
    op, refused = OPS[name], 0
    args = convert(name, arguments(name, SIZES, training), torch.float32, "contiguous")
    calls = [(op.op, op.inputs, args)]
    calls.append((op.backward_op, op.backward_inputs, _backward_arguments(name, training)))
    for call, names, values in calls:
        for place, (key, value) in enumerate(zip(names, values, strict=True)):
            if key == op.maps[0] or not isinstance(value, torch.Tensor):
                continue
            moved = [*values[:place], value.to("meta"), *values[place + 1 :]]
            with pytest.raises(ValueError, match=f"{key} is on meta, the map on cpu"):
                call(*moved, backend="auto")
            refused += 1
    assert refused >= (0 if name == "channel_statistics" else 2)


def test_a_gate_of_no_groups_is_refused_by_the_backward() -> None:
    op = OPS["gated_fusion"]
    args = _backward_arguments("gated_fusion", training=True)
    place = op.backward_inputs.index("w")
    args[place] = args[place][:, :0]
    with pytest.raises(RuntimeError, match="divisor of"):
        op.backward_op(*args, backend="auto")
