"""The Triton kernels of gated_fusion beyond what test_stages.py covers, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from stage_cases import OPS, Sizes, arguments, convert, error, layout_of, require_grad, tolerance

from fused.backends.reference import gated_fusion as reference
from fused.backends.triton import INTERPRETER

if not INTERPRETER:
    pytest.skip("needs FUSED_TRITON_INTERPRETER=1", allow_module_level=True)

from fused.backends.triton import configs, gated_fusion, gated_fusion_backward, launch

OP = OPS["gated_fusion"]
SMALL = Sizes(2, 24, 7, 5, 4)
# Tails everywhere, a group that is no power of two, one hidden channel, a group in pieces.
TAILS = (Sizes(2, 72, 9, 13, 6), Sizes(1, 130, 9, 11, 10), Sizes(2, 4, 5, 7, 1))
PIECES = Sizes(1, 140, 5, 4, 1)


def case(s: Sizes, training: bool, dtype: torch.dtype, save: bool = True) -> dict[str, Any]:
    """Float64 arguments by name, the maps rounded to `dtype`."""
    named = arguments("gated_fusion", s, training) | {"save": save}
    return {k: v.to(dtype).double() if k in OP.maps else v for k, v in named.items()}


def oracle(named: dict[str, Any]) -> tuple[tuple[Any, ...], torch.Tensor, tuple[Any, ...]]:
    """Float64 outputs, a gradient of `out`, and the gradients that follow from it."""
    args = convert("gated_fusion", named, torch.float64, "contiguous")
    leaves = require_grad("gated_fusion", args)
    outputs = reference.forward(*args)
    grad = torch.randn_like(outputs[0]).to(torch.float16).double()
    return outputs, grad, torch.autograd.grad(outputs[0], leaves, grad)


def gradients(args: list[Any], outputs: tuple[Any, ...], grad: torch.Tensor) -> tuple[Any, ...]:
    """Ours, of a forward with these arguments and outputs."""
    named = dict(zip(OP.inputs, args, strict=True)) | dict(zip(OP.outputs, outputs, strict=True))
    named["grad_out"] = grad.to(args[0].dtype)
    return gated_fusion_backward.backward(*(named[name] for name in OP.backward_inputs))


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the kernels launched inside."""
    names: list[str] = []

    def count(one: launch.Launch) -> None:
        names.append(one.name)
        one.run()

    with launch.intercept(count):
        yield names


def check(got: tuple[Any, ...], want: tuple[Any, ...], limit: float, what: str) -> None:
    for index, (ours, exact) in enumerate(zip(got, want, strict=True)):
        assert error(ours, exact) <= limit, f"{what}: {index}"


@pytest.mark.parametrize("config", [0, 1])
@pytest.mark.parametrize("sizes", TAILS, ids=str)
def test_tails_in_every_configuration(sizes: Sizes, config: int) -> None:
    for training in (False, True):
        named = case(sizes, training, torch.float32)
        want, grad, want_gradients = oracle(named)
        args = convert("gated_fusion", named, torch.float32, "contiguous")
        with configs.forced(config):
            got = gated_fusion.forward(*args)
            check(got, want, 1e-5, f"training={training}")
            check(gradients(args, got, grad), want_gradients, 1e-4, f"training={training}")
        if not training:
            args[OP.inputs.index("save")] = False
            with configs.forced(config):
                assert error(gated_fusion.forward(*args)[0], want[0]) <= 1e-5


def test_launches() -> None:
    for training, save, budget in ((False, False, 2), (False, True, 6), (True, True, 6)):
        args = convert(
            "gated_fusion", case(SMALL, training, torch.float32, save), torch.float32, "contiguous"
        )
        with counted() as names:
            outputs = gated_fusion.forward(*args)
        assert len(names) == budget, names
        if save:
            with counted() as names:
                gradients(args, outputs, torch.ones_like(outputs[0]))
            assert len(names) == 10, names


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_group_wider_than_a_tile_is_added_from_pieces(layout: str) -> None:
    named = case(PIECES, True, torch.float32)
    _, grad, want = oracle(named)
    args = convert("gated_fusion", named, torch.float32, layout)
    got = gradients(args, gated_fusion.forward(*args), layout_of(grad, layout))
    check(got, want, 1e-4, layout)


@pytest.mark.parametrize("training", [False, True])
def test_weights_in_the_maps_dtype(training: bool) -> None:
    """Nothing is packed then; under autocast, as in test_stages.py, it is."""
    dtype = torch.float16
    named = case(SMALL, training, dtype)
    named = {k: v.to(dtype).double() if torch.is_tensor(v) else v for k, v in named.items()}
    want, grad, want_gradients = oracle(named)
    args = convert("gated_fusion", named, dtype, "contiguous")
    args = [v.to(dtype) if torch.is_tensor(v) else v for v in args]
    got = gated_fusion.forward(*args)
    check(got, want, tolerance(dtype)[0], "outputs")
    results = gradients(args, got, grad)
    check(results, want_gradients, tolerance(dtype)[1], "gradients")
    assert all(result.dtype == dtype for result in results)


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    named = case(SMALL, True, torch.float32)
    want, grad, want_gradients = oracle(named)
    args = convert("gated_fusion", named, torch.float32, "channels_last")
    monkeypatch.setattr(launch, "is_wide", lambda *tensors: True)
    got = gated_fusion.forward(*args)
    check(got, want, 1e-5, "outputs")
    check(gradients(args, got, grad), want_gradients, 1e-4, "gradients")


def test_a_map_without_one_stride_for_its_pixels_is_copied() -> None:
    named = case(SMALL, False, torch.float32)
    want, grad, want_gradients = oracle(named)
    args = convert("gated_fusion", named, torch.float32, "transposed")
    got = gated_fusion.forward(*args)
    check(got, want, 1e-5, "outputs")
    check(gradients(args, got, grad.mT.contiguous().mT), want_gradients, 1e-4, "gradients")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("config", [0, 1])
def test_means_of_out_without_out(dtype: torch.dtype, config: int) -> None:
    named = case(Sizes(2, 72, 9, 13, 6), False, dtype, save=False)
    (want, *_) = reference.forward(*convert("gated_fusion", named, torch.float64, "contiguous"))
    for layout in ("contiguous", "channels_last"):
        args = dict(zip(OP.inputs, convert("gated_fusion", named, dtype, layout), strict=True))
        del args["training"], args["save"]
        with configs.forced(config), counted() as names:
            means = gated_fusion.forward_mean(*args.values())
        assert (means.shape, means.dtype) == (want.shape[:2], torch.float32)
        assert error(means, want.mean((2, 3))) <= tolerance(dtype)[0]
        assert len(names) == 3


def test_statistics_of_a_map_with_a_large_mean() -> None:
    """E[x²] − E[x]² would lose all digits of a variance of 1 at a mean of 1000."""
    named = case(Sizes(2, 16, 9, 15, 2), True, torch.float32)
    named["e"] = (1000 + named["e"]).float().double()
    named["w"] = torch.ones_like(named["w"])
    want = reference.forward(*convert("gated_fusion", named, torch.float64, "contiguous"))
    got = gated_fusion.forward(*convert("gated_fusion", named, torch.float32, "contiguous"))
    var1 = OP.outputs.index("var1")
    assert error(got[var1], want[var1]) <= 1e-4


def test_the_second_shift_has_no_gradient_in_training() -> None:
    """The third norm takes it off again; rounding does not show."""
    named = case(SMALL, True, torch.float16)
    args = convert("gated_fusion", named, torch.float16, "contiguous")
    outputs = gated_fusion.forward(*args)
    grads = gradients(args, outputs, torch.randn_like(outputs[0]))
    by_name = dict(zip(OP.gradients, grads, strict=True))
    assert by_name["bn2_bias"].count_nonzero() == 0
    assert by_name["bn1_bias"].count_nonzero() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate(value: float) -> None:
    for save in (False, True):
        named = case(Sizes(2, 16, 5, 5, 2), False, torch.float32, save)
        args = convert("gated_fusion", named, torch.float32, "contiguous")
        args[0][0, 3, 2, 2] = value
        want, got = reference.forward(*args)[0], gated_fusion.forward(*args)[0]
        assert torch.equal(got.isnan(), want.isnan())
        assert got[1].isfinite().all()
