"""Coordinate attention and cross-spatial learning as one op: the same as the two, without grads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stage_cases import AWKWARD, PLACES, Place, Sizes, arguments, convert, error, tolerance

from fused import FusedCIEMA, backends, ops
from fused.backends import Backend, BackendError
from fused.spatial_gate import NAME, spatial_gate


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
def test_it_is_the_two_stages(place: Place, dtype: torch.dtype) -> None:
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


def test_opcheck() -> None:
    args = joined(*of_both(Sizes(2, 8, 4, 3, 2), torch.float32))
    torch.library.opcheck(torch.ops.ciema.spatial_gate.default, args, {"backend": "auto"})


def test_a_backend_with_a_kernel_for_both_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(e: torch.Tensor, *rest: Any) -> torch.Tensor:
        return e.new_full((e.shape[0], rest[-5], *e.shape[2:]), 0.25)

    cpu = backends.BACKENDS["cpu"]
    fast = Backend("cpu", {**cpu.kernels, NAME: both}, cpu.can_run)
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


def test_wrong_arguments_are_named() -> None:
    args = joined(*of_both(Sizes(2, 8, 4, 3, 2), torch.float32))
    with pytest.raises(ValueError, match="cross_spatial: gn_weight has shape"):
        spatial_gate(*args[:4], torch.ones(3), *args[5:])
    with pytest.raises(ValueError, match="coordinate_attention: weight has shape"):
        spatial_gate(args[0], torch.ones(3, 3, 1, 1), *args[2:])
    with pytest.raises(BackendError, match="cannot run cross_spatial"):
        spatial_gate(*args, backend="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_map(dtype: torch.dtype) -> None:
    args = joined(*of_both(Sizes(2, 8, 4, 3, 2), torch.float32))
    with torch.autocast("cpu", dtype):
        w = spatial_gate(*args)
    assert w.dtype == dtype
    assert torch.equal(w, spatial_gate(args[0].to(dtype), *args[1:]))
