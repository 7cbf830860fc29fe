"""What callers may hand to an op of any backend besides maps: parameters and gradients of views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stage_cases import (
    OPS,
    PLACES,
    Place,
    Sizes,
    arguments,
    backends_for,
    chosen,
    convert,
    differentiable,
    error,
    modes,
    require_grad,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fused.backends import BACKENDS


def with_gaps(value: torch.Tensor) -> torch.Tensor:
    """The values in every third place of memory that holds something else in between."""
    wide = torch.full((*value.shape, 3), 50.0, dtype=value.dtype, device=value.device)
    wide[..., 1] = value
    return wide[..., 1]


@pytest.mark.parametrize("how", ["gaps", "expanded"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("op", [op for op in OPS if op != "channel_statistics"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_parameters_may_lie_in_memory_as_they_like(
    place: Place, op: str, training: bool, how: str
) -> None:
    """As views of a larger tensor, which functional calls and meta-learning bring."""
    named, dtype = arguments(op, Sizes(2, 16, 3, 4, 2), training), torch.float32
    if training and len(modes(op)) == 1:
        pytest.skip("the op has one mode only")
    for backend in backends_for(op, dtype, place):
        runs = []
        for strided in (False, True):
            args = convert(op, named, dtype, "contiguous", place.device)
            for index, (name, value) in enumerate(zip(OPS[op].inputs, args, strict=True)):
                if name in OPS[op].maps or not isinstance(value, torch.Tensor):
                    continue
                if how == "gaps":
                    args[index] = with_gaps(value) if strided else value
                elif value.dim() == 1:
                    same = value.abs()[:1].expand(value.shape)
                    args[index] = same if strided else same.contiguous()
            args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
            leaves = require_grad(op, args)
            with chosen(backend) as name:
                outputs = OPS[op](*args, backend=name)
                results = differentiable(op, outputs)
                gradients = torch.autograd.grad(results, leaves, [r.detach() for r in results])
            runs.append([*outputs, *gradients])
        for got, want in zip(runs[1], runs[0], strict=True):
            assert error(got, want) <= 1e-6, f"{op} {backend}"


# What torch adds up in any order on a GPU, and refuses under use_deterministic_algorithms; but for
# index_put, by which the emulator copies.
ANY_ORDER = {
    *("upsample_bilinear2d_backward", "upsample_linear1d_backward", "scatter_add", "index_add"),
    *("scatter_reduce", "put", "bincount", "max_pool2d_with_indices_backward"),
}


class Refuse(TorchDispatchMode):
    """Fails where an operation of ANY_ORDER is called."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name.rstrip("_") not in ANY_ORDER, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_nothing_is_added_in_any_order(
    place: Place, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, dtype = arguments(op, Sizes(1, 16, 5, 4, 2), True), torch.float32
    for backend in backends_for(op, dtype, place):
        kernels = BACKENDS[backend].kernels
        backward, calls = kernels[f"{op}_backward"], []

        def watched(*args: Any, kernel: Any = backward, calls: list[int] = calls) -> Any:
            calls.append(1)
            with Refuse():
                return kernel(*args)

        monkeypatch.setitem(kernels, f"{op}_backward", watched)
        args = convert(op, named, dtype, "contiguous", place.device)
        leaves = require_grad(op, args)
        with chosen(backend) as name:
            results = differentiable(op, OPS[op](*args, backend=name))
            torch.autograd.grad(results, leaves, [r.detach() for r in results])
        assert calls


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_gradients_may_be_expanded(place: Place, op: str) -> None:
    """As those of a sum are: one number for a whole map."""
    dtype = torch.float32
    for backend in backends_for(op, dtype, place):
        runs = []
        for expanded in (False, True):
            named = arguments(op, Sizes(2, 16, 3, 4, 2))
            args = convert(op, named, dtype, "contiguous", place.device)
            leaves = require_grad(op, args)
            with chosen(backend) as name:
                results = differentiable(op, OPS[op](*args, backend=name))
                ones = [r.detach().new_ones(()).expand(r.shape) for r in results]
                grads = ones if expanded else [one.contiguous() for one in ones]
                runs.append(torch.autograd.grad(results, leaves, grads))
        for got, want in zip(runs[1], runs[0], strict=True):
            assert error(got, want) <= 1e-6, f"{op} {backend}"


def nearly_constant(op: str, named: dict[str, Any]) -> dict[str, Any]:
    """Arguments by which one channel before a batch norm deviates by a thousandth of its mean."""
    if op == "gated_fusion":
        named["e"][:, 0] = 1 + 1e-3 * named["e"][:, 0]
        named["w"][:] = 0.5
        named["squeeze_weight"][0] = 0
        named["squeeze_weight"][0, 0] = 4
        return named
    for name in ("gn_weight", "conv3x3_weight"):
        named[name][0] *= 1e-3
    for name in ("gn_bias", "conv3x3_bias"):
        named[name][0] = 1
    for name in ("spatial_conv1_weight", "attention_weight"):
        named[name][0] = 0
        named[name][0, 0] = 2
    return named


@pytest.mark.parametrize(("op", "scale"), [("cross_spatial", 1000.0), ("gated_fusion", 100.0)])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_pixels_outside_add_nothing_however_large_their_gradient(
    place: Place, op: str, scale: float
) -> None:
    """A zero there is thousands of deviations from the mean, beyond the range of half precision.

    Scaled as a loss of mixed precision is, all gradients of the map's own pixels are within it.
    """
    named = nearly_constant(op, arguments(op, Sizes(2, 16, 5, 3, 2), True))
    for backend in backends_for(op, torch.float16, place):
        if backend == "reference" and place.device == "cuda":
            continue  # the library's gradient of a weight is of half precision itself
        args = convert(op, named, torch.float16, "contiguous", place.device)
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        leaves = require_grad(op, args)
        generator = torch.Generator().manual_seed(1)
        with chosen(backend) as name:
            results = differentiable(op, OPS[op](*args, backend=name))
            along = [scale * torch.randn(r.shape, generator=generator) for r in results]
            along = [a.to(r) for a, r in zip(along, results, strict=True)]
            gradients = torch.autograd.grad(results, leaves, along)
        names = [name for name in OPS[op].inputs if name in OPS[op].gradients]
        for leaf, gradient in zip(names, gradients, strict=True):
            assert gradient.isfinite().all(), f"{op} {backend}: {leaf}"
