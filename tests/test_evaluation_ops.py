"""The ops of evaluation without gradients: the same as the stages that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stage_cases import AWKWARD, PLACES, Place, Sizes, arguments, convert, error, tolerance

from fused import FusedCIEMA, backends, ops
from fused.backends import Backend, BackendError
from fused.evaluation_ops import gated_fusion_mean, spatial_gate


def of_both(sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Any], list[Any]]:
    """Arguments of coordinate attention and of cross-spatial learning without its vectors."""
    first = convert(
        *("coordinate_attention", arguments("coordinate_attention", sizes), dtype, "contiguous"),
        device,
    )
    second = convert(
        *("cross_spatial", arguments("cross_spatial", sizes), dtype, "contiguous", device)
    )
    return first, second[5:]


def joined(first: list[Any], rest: list[Any]) -> list[Any]:
    e, weight, bias, _, eps = first
    return [e, weight, bias, eps, *rest]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_spatial_gate_is_its_two_stages(place: Place, dtype: torch.dtype) -> None:
    for sizes in AWKWARD:
        exact_first, exact_rest = of_both(sizes, torch.float64)
        first, rest = of_both(sizes, dtype, place.device)
        exact_first[0] = first[0].double().cpu()  # rounding of the input is not the op's error
        vectors = ops.coordinate_attention(*exact_first, backend="reference")
        want = ops.cross_spatial(exact_first[0], *vectors, *exact_rest, backend="reference")[0]
        names = [place.backend] if place.backend else ["auto", "cpu", "reference"]
        for name in names:
            if name not in ("auto", "reference"):
                for op in ("coordinate_attention", "cross_spatial"):
                    reason = backends.BACKENDS[name].why_not(op, first[0], sizes.groups)
                    if reason is not None:
                        pytest.skip(reason)
            w = spatial_gate(*joined(first, rest), backend=name)
            assert w.dtype == dtype
            assert error(w, want) <= tolerance(dtype)[0], (str(sizes), name)


def of_fusion(sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> list[Any]:
    """Arguments of `gated_fusion_mean`."""
    named = arguments("gated_fusion", sizes)
    args = convert("gated_fusion", named, dtype, "contiguous", device)
    given = dict(zip(ops.gated_fusion.inputs, args, strict=True))
    return [value for name, value in given.items() if name not in ("training", "save")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_mean_of_gated_fusion_is_that_of_its_map(place: Place, dtype: torch.dtype) -> None:
    for sizes in AWKWARD:
        args = of_fusion(sizes, dtype, place.device)
        exact = [v.double().cpu() if isinstance(v, torch.Tensor) else v for v in args]
        want = gated_fusion_mean(*exact, backend="reference")
        assert want.dtype == torch.float64
        names = [place.backend] if place.backend else ["auto", "cpu", "reference"]
        for name in names:
            if name not in ("auto", "reference"):
                reason = backends.BACKENDS[name].why_not("gated_fusion", args[0], sizes.groups)
                if reason is not None:
                    pytest.skip(reason)
            means = gated_fusion_mean(*args, backend=name)
            assert (means.shape, means.dtype) == (want.shape, torch.float32)
            assert error(means, want) <= tolerance(dtype)[0], (str(sizes), name)


def test_opcheck() -> None:
    sizes = Sizes(2, 8, 4, 3, 2)
    for op, args in (
        (spatial_gate, joined(*of_both(sizes, torch.float32))),
        (gated_fusion_mean, of_fusion(sizes, torch.float32)),
    ):
        torch.library.opcheck(op.op, args, {"backend": "auto"})


def test_a_backend_with_a_kernel_for_both_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(e: torch.Tensor, *rest: Any) -> torch.Tensor:
        return e.new_full((e.shape[0], rest[-5], *e.shape[2:]), 0.25)

    cpu = backends.BACKENDS["cpu"]
    fast = Backend("cpu", {**cpu.kernels, spatial_gate.name: both}, cpu.can_run)
    monkeypatch.setattr(backends, "BACKENDS", {"cpu": fast})
    args = joined(*of_both(Sizes(2, 8, 4, 3, 2), torch.float32))
    assert (spatial_gate(*args, backend="cpu") == 0.25).all()


def test_the_module_calls_it_in_evaluation_without_gradients_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fused import modules

    called = []

    def spy(*args: Any, backend: str | None) -> torch.Tensor:
        called.append(backend)
        return spatial_gate(*args, backend=backend)

    monkeypatch.setattr(modules, "spatial_gate", spy)
    block, x = FusedCIEMA(16, 4).eval(), torch.randn(2, 16, 5, 4)
    with_gradients = block(x)
    assert not called
    with torch.no_grad():
        torch.testing.assert_close(block(x), with_gradients.detach())
    assert len(called) == 1
    block.train()
    with torch.no_grad():
        block(x)
    assert len(called) == 1


def test_a_backend_without_a_kernel_for_the_mean_takes_it_of_the_map(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = backends.BACKENDS["cpu"]
    kernels = {name: kernel for name, kernel in cpu.kernels.items() if name != "gated_fusion_mean"}
    monkeypatch.setattr(backends, "BACKENDS", {"cpu": Backend("cpu", kernels, cpu.can_run)})
    args = of_fusion(Sizes(2, 8, 4, 3, 2), torch.float32)
    want = gated_fusion_mean(*args, backend="reference")
    torch.testing.assert_close(gated_fusion_mean(*args, backend="cpu"), want)


def averaging_block() -> FusedCIEMA:
    return FusedCIEMA(16, 4).eval()


def test_a_block_gives_means_in_evaluation_without_gradients_only() -> None:
    block, x = averaging_block(), torch.randn(2, 16, 5, 4)
    assert not block.gives_means(x)  # its parameters require grad
    with torch.no_grad():
        assert block.gives_means(x)
        means = block.mean_after(block.interact(x))
        torch.testing.assert_close(means, block(x).mean((2, 3)))
        assert not block.train().gives_means(x)
        hooked = averaging_block()
        hooked.register_forward_hook(lambda *_: None)
        inner = averaging_block()
        inner.final_fusion[0].register_forward_hook(lambda *_: None)
        for other in (hooked, inner):
            assert not other.gives_means(x)
    for parameter in block.eval().parameters():
        parameter.requires_grad = False
    assert block.gives_means(x)
    assert not block.gives_means(x.requires_grad_())


def test_wrong_arguments_are_named() -> None:
    args = joined(*of_both(Sizes(2, 8, 4, 3, 2), torch.float32))
    with pytest.raises(ValueError, match="cross_spatial: gn_weight has shape"):
        spatial_gate(*args[:4], torch.ones(3), *args[5:])
    with pytest.raises(ValueError, match="coordinate_attention: weight has shape"):
        spatial_gate(args[0], torch.ones(3, 3, 1, 1), *args[2:])
    with pytest.raises(BackendError, match="cannot run cross_spatial"):
        spatial_gate(*args, backend="triton")
    args = of_fusion(Sizes(2, 8, 4, 3, 2), torch.float32)
    with pytest.raises(ValueError, match="gated_fusion: squeeze_weight has shape"):
        gated_fusion_mean(*args[:2], torch.ones(3, 8, 1, 1), *args[3:])
    with pytest.raises(BackendError, match="cannot run gated_fusion"):
        gated_fusion_mean(*args, backend="triton")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_joint_kernel_is_given_checked_parameters_only(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(*args: Any) -> torch.Tensor:
        raise AssertionError("a kernel would read out of bounds")

    cpu = backends.BACKENDS["cpu"]
    joint = Backend("cpu", {**cpu.kernels, spatial_gate.name: both}, cpu.can_run)
    monkeypatch.setattr(backends, "BACKENDS", {"cpu": joint})
    args = joined(*of_both(Sizes(2, 8, 4, 3, 2), torch.float32, device))
    at = 4 + ops.cross_spatial.inputs[5:].index("spatial_conv5_weight")
    args[at] = torch.ones(4, 4, 3, 3, device=device)
    with pytest.raises(ValueError, match="cross_spatial: spatial_conv5_weight has shape"):
        spatial_gate(*args)


def test_gradients_are_refused_and_not_zero() -> None:
    sizes = Sizes(2, 8, 4, 3, 2)
    for op, args in (
        (spatial_gate, joined(*of_both(sizes, torch.float32))),
        (gated_fusion_mean, of_fusion(sizes, torch.float32)),
    ):
        args[0].requires_grad_()
        for call in (op, op.op):
            with pytest.raises(RuntimeError, match=f"ciema::{op.name} has no gradient"):
                call(*args)
        with torch.no_grad():
            op(*args)
        args[0].requires_grad_(False)
        with pytest.raises(RuntimeError, match="in forward mode; backend='reference' can"):
            torch.func.jvp(lambda e, op=op, args=args: op(e, *args[1:]), (args[0],), (args[0],))


def test_means_are_refused_in_training_with_gradients_and_with_hooks() -> None:
    block, x = averaging_block(), torch.randn(2, 16, 5, 4)
    with torch.no_grad():
        e = block.interact(x)
        block.mean_after(e)
    frozen = averaging_block().requires_grad_(False)
    hooked = averaging_block().requires_grad_(False)
    hooked.conv3x3.register_forward_hook(lambda *_: None)
    for module, given in (
        *((block, e), (frozen, e.clone().requires_grad_()), (hooked, e)),
        (averaging_block().requires_grad_(False).train(), e),
    ):
        with pytest.raises(RuntimeError, match="mean_after is for evaluation without gradients"):
            module.mean_after(given)
    assert frozen.mean_after(e).shape == (2, 16)


def test_weights_that_are_no_parameters_count() -> None:
    """As torch.func and some parametrisations leave them."""
    for name in ("final_fusion.0", "conv3x3", "conv1x1"):
        block, x = averaging_block().requires_grad_(False), torch.randn(2, 16, 5, 4)
        assert block.gives_means(x)
        layer = block.get_submodule(name)
        weight = layer.weight.clone().requires_grad_()
        del layer.weight
        layer.weight = weight
        assert not block.gives_means(x)
        block(x).square().sum().backward()
        assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_maps(dtype: torch.dtype) -> None:
    args = of_fusion(Sizes(2, 8, 4, 3, 2), torch.float32)
    with torch.autocast("cpu", dtype):
        means = gated_fusion_mean(*args)
    assert torch.equal(means, gated_fusion_mean(*(v.to(dtype) for v in args[:2]), *args[2:]))
    args = joined(*of_both(Sizes(2, 8, 4, 3, 2), torch.float32))
    with torch.autocast("cpu", dtype):
        w = spatial_gate(*args)
    assert w.dtype == dtype
    assert torch.equal(w, spatial_gate(args[0].to(dtype), *args[1:]))
