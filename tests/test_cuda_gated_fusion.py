"""Gated fusion's CUDA kernels under the emulator, against the float64 maths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from emulator import ORDERS, Report, emulate, emulated, missing_tool
from stage_cases import OPS, Sizes, arguments, convert, error, layout_of, require_grad, tolerance

from fused.backends import reference
from fused.backends.cuda import gated_fusion
from fused.backends.cuda.launch import Launch, intercept
from fused.backends.reference import products
from fused.contract import Problem, cost, memory_format

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)

OP = OPS["gated_fusion"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last")
SMALL = Sizes(2, 24, 7, 5, 4)
# Tails along channels and pixels, c = 1, one group, a map of one pixel, one hidden channel; several
# tiles along both axes.
CASES = (
    SMALL,
    Sizes(1, 40, 13, 11, 4),
    Sizes(3, 10, 6, 1, 2),
    Sizes(2, 8, 4, 4, 8),
    Sizes(1, 32, 9, 17, 1),
    Sizes(2, 4, 1, 9, 2),
    Sizes(1, 12, 1, 1, 4),
    Sizes(1, 136, 9, 16, 4),
)
# Each size and dtype in one of the layouts, in turn.
TURNS = [
    (sizes, dtype, LAYOUTS[(n + k) % 2])
    for n, sizes in enumerate(CASES)
    for k, dtype in enumerate(DTYPES)
]
# What rounding leaves of a gradient of a few channels that nearly cancels; see test_stages.py.
FEW_CHANNELS = 0.2


def case(sizes: Sizes, training: bool, dtype: torch.dtype, save: bool = True) -> dict[str, Any]:
    """Float64 arguments by name, the maps rounded to `dtype`."""
    named = arguments("gated_fusion", sizes, training) | {"save": save}
    return {k: v.to(dtype).double() if k in OP.maps else v for k, v in named.items()}


def exact(named: dict[str, Any]) -> tuple[tuple[Any, ...], torch.Tensor, tuple[Any, ...]]:
    """Float64 outputs, a gradient of `out`, and the gradients that follow from it."""
    named = {k: v.clone() if torch.is_tensor(v) else v for k, v in named.items()}
    args = convert("gated_fusion", named, torch.float64, "contiguous")
    leaves = require_grad("gated_fusion", args)
    outputs = reference.gated_fusion.forward(*args)
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(5))
    grad = grad.bfloat16().double()
    return outputs, grad, torch.autograd.grad(outputs[0], leaves, grad)


def run(
    named: dict[str, Any], dtype: torch.dtype, layout: str, grad: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Outputs and gradients of the kernels."""
    args = convert("gated_fusion", named, dtype, layout)
    leaves = require_grad("gated_fusion", args)
    outputs = OP(*args, backend="cuda")
    return outputs, torch.autograd.grad(outputs[0], leaves, layout_of(grad.to(dtype), layout))


def library_gradients(
    named: dict[str, Any], dtype: torch.dtype, grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Those of the reference, with its products' operands rounded as on a GPU."""
    args = convert("gated_fusion", named, dtype, "contiguous")
    with pytest.MonkeyPatch.context() as patch:
        for module in (reference.gated_fusion, products):
            patch.setattr(module, "product_dtype", lambda x: x.dtype)
        outputs = reference.gated_fusion.forward(*args)
        known = dict(zip(OP.inputs, args, strict=True))
        known |= dict(zip(OP.outputs, outputs, strict=True)) | {"grad_out": grad.to(dtype)}
        return tuple(reference.gated_fusion.backward(*(known[k] for k in OP.backward_inputs)))


@contextmanager
def noted() -> Iterator[list[tuple[Launch, Report]]]:
    """Launches inside, with their reports, in which nothing may be found."""
    seen: list[tuple[Launch, Report]] = []

    def note(launch: Launch, report: Report) -> None:
        assert report.findings == [], f"{launch.entry}: {report.findings}"
        seen.append((launch, report))

    with emulated(note):
        yield seen


def names(seen: Sequence[tuple[Launch, Report | None]]) -> list[str]:
    """Their entries, without stage and dtype."""
    return [launch.entry.split("_", 2)[2].rpartition("_")[0] for launch, _ in seen]


@pytest.mark.parametrize(("sizes", "dtype", "layout"), TURNS, ids=str)
def test_evaluation(sizes: Sizes, dtype: torch.dtype, layout: str) -> None:
    named = case(sizes, False, dtype, save=False)
    (want, *_) = exact(named)[0]
    args = convert("gated_fusion", named, dtype, layout)
    with emulated():
        out, *rest = OP(*args, backend="cuda")
    assert error(out, want) <= tolerance(dtype)[0]
    assert memory_format(out) == memory_format(args[0])
    assert all(kept.numel() == 0 for kept in rest)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("sizes", "dtype", "layout"), TURNS, ids=str)
def test_outputs_and_gradients(
    sizes: Sizes, dtype: torch.dtype, layout: str, training: bool
) -> None:
    """Of half precision a gradient may err as tolerated, or twice as much as the library's."""
    if sizes is CASES[-1] and training == (dtype == torch.float16):
        pytest.skip("the largest case takes its turn in the other mode")
    training = training and sizes.batch * sizes.height * sizes.width > 1
    named = case(sizes, training, dtype)
    want, grad, want_gradients = exact(named)
    with emulated():
        outputs, gradients = run(named, dtype, layout, grad)
    for name, got, right in zip(OP.outputs, outputs, want, strict=True):
        assert got.shape == right.shape
        assert error(got, right) <= tolerance(dtype)[int(got.dim() == 1)], name
    theirs = library_gradients(named, dtype, grad)
    together = zip(OP.gradients, gradients, want_gradients, theirs, strict=True)
    for name, got, right, library in together:
        limit = tolerance(dtype)[1]
        if dtype != torch.float32:
            limit = max(limit, 2 * error(library, right), FEW_CHANNELS if got.numel() < 8 else 0)
        assert got.shape == right.shape
        assert error(got, right) <= limit, name


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, "contiguous"), (torch.float16, "channels_last")]
)
def test_same_bits_in_every_order(dtype: torch.dtype, layout: str) -> None:
    named = case(CASES[1], True, dtype)
    _, grad, _ = exact(named)
    runs = []
    for order in ORDERS:
        with emulated(order=order):
            outputs, gradients = run(named, dtype, layout, grad)
        runs.append((*outputs, *gradients))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


def mean_arguments(named: dict[str, Any], dtype: torch.dtype, layout: str) -> list[Any]:
    args = dict(zip(OP.inputs, convert("gated_fusion", named, dtype, layout), strict=True))
    del args["training"], args["save"]
    return list(args.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_of_out_without_out(dtype: torch.dtype, layout: str) -> None:
    for sizes in (CASES[2], CASES[7]):
        named = case(sizes, False, dtype, save=False)
        (want, *_) = exact(named)[0]
        with noted() as seen:
            means = gated_fusion.forward_mean(*mean_arguments(named, dtype, layout))
        assert means.shape == want.shape[:2]
        assert means.dtype == torch.float32
        assert error(means, want.mean((2, 3))) <= tolerance(dtype)[0]
        assert names(seen) == ["product", "moments", "mean"]


def test_launches() -> None:
    """The backward leaves three products to the library, of frozen norms two."""
    for training, save in ((False, False), (False, True), (True, True)):
        named = case(SMALL, training, torch.float32, save)
        _, grad, _ = exact(named)
        args = convert("gated_fusion", named, torch.float32, "contiguous")
        leaves = require_grad("gated_fusion", args) if save else []
        with noted() as seen:
            out, *_ = OP(*args, backend="cuda")
            forward = names(seen)
            if save:
                torch.autograd.grad(out, leaves, grad.float())
        assert len(forward) == (6 if training else 5 if save else 2)
        if save:
            assert len(seen) - len(forward) == (9 if training else 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_the_maps_dtype(dtype: torch.dtype) -> None:
    """As in a module that is half precision as a whole; under autocast they are float32."""
    for training in (False, True):
        named = case(SMALL, training, dtype)
        named = {k: v.to(dtype).double() if torch.is_tensor(v) else v for k, v in named.items()}
        want, grad, want_gradients = exact(named)
        args = [v.to(dtype) if torch.is_tensor(v) else v for v in (named[k] for k in OP.inputs)]
        leaves = require_grad("gated_fusion", args)
        with emulated():
            outputs = OP(*args, backend="cuda")
            gradients = torch.autograd.grad(outputs[0], leaves, grad.to(dtype))
        for got, right in zip(outputs, want, strict=True):
            assert error(got, right) <= tolerance(dtype)[0]
        for got, right in zip(gradients, want_gradients, strict=True):
            assert got.dtype == dtype
            assert error(got, right) <= tolerance(dtype)[1]


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_other_layouts_are_copied(layout: str) -> None:
    named = case(SMALL, True, torch.float32)
    want, grad, want_gradients = exact(named)
    with emulated():
        outputs, gradients = run(named, torch.float32, layout, grad)
    assert error(outputs[0], want[0]) <= 1e-5
    for got, right in zip(gradients, want_gradients, strict=True):
        assert error(got, right) <= 1e-4


def test_gates_may_lie_otherwise_and_be_float32() -> None:
    named = case(SMALL, True, torch.float16)
    want, grad, want_gradients = exact(named)
    listed = convert("gated_fusion", named, torch.float16, "contiguous")
    args = dict(zip(OP.inputs, listed, strict=True))
    args["w"] = args["w"].float().contiguous(memory_format=torch.channels_last)
    for name in ("e", "w"):
        args[name].requires_grad_()
    with emulated():
        out, *_ = OP(*args.values(), backend="cuda")
        of_e, of_w = torch.autograd.grad(out, [args["e"], args["w"]], grad.half())
    assert error(out, want[0]) <= tolerance(torch.float16)[0]
    assert of_w.dtype == torch.float32
    assert memory_format(of_w) == torch.channels_last
    for got, right in zip((of_e, of_w), want_gradients, strict=False):
        assert error(got, right) <= tolerance(torch.float16)[1]


def test_statistics_of_a_map_with_a_large_mean() -> None:
    """E[x²] − E[x]² would lose all digits of a variance of 1 at a mean of 1000."""
    named = case(Sizes(2, 16, 9, 15, 2), True, torch.float32)
    named["e"] = (1000 + named["e"]).float().double()
    named["w"] = torch.ones_like(named["w"])
    want = reference.gated_fusion.forward(*(named[k] for k in OP.inputs))
    with emulated():
        got = OP(*convert("gated_fusion", named, torch.float32, "contiguous"), backend="cuda")
    var1 = OP.outputs.index("var1")
    assert error(got[var1], want[var1]) <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate(value: float, layout: str) -> None:
    """An infinity only where the reference folds, too: it else forms M of infinite r, inf − inf."""
    for save in (False, True)[: 2 if value != value else 1]:
        named = case(Sizes(2, 16, 5, 5, 2), False, torch.float32, save)
        args = convert("gated_fusion", named, torch.float32, layout)
        args[0][0, 3, 2, 2] = value
        want = reference.gated_fusion.forward(*args)[0]
        with emulated():
            got = OP(*args, backend="cuda")[0]
        assert torch.equal(got.isnan(), want.isnan())
        assert got[1].isfinite().all()


def moved(seen: list[tuple[Launch, Report]], squeezed: int) -> tuple[int, int]:
    """Bytes of the op's maps, and of r, that evaluation's launches name, each once a launch."""
    maps = scratch = 0
    for launch, _ in seen:
        for x in launch.buffers.values():
            size = x.numel() * x.element_size() if x.dim() == 4 else 0
            if x.dim() == 4 and x.shape[1] == squeezed:
                scratch += size
            else:
                maps += size
    return maps, scratch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_of_evaluation_are_those_of_the_contract(layout: str) -> None:
    """What the launches name; of that they write each sector once, and no more."""
    sizes = Sizes(1, 128, 16, 24, 4)
    args = convert("gated_fusion", case(sizes, False, torch.float16, False), torch.float16, layout)
    with noted() as seen:
        OP(*args, backend="cuda")
    want = cost("gated_fusion", Problem(1, 128, 16, 24, 4), dtype=torch.float16)
    maps, scratch = moved(seen, 32)
    assert maps == pytest.approx(want.bytes, rel=0.1)
    assert scratch == pytest.approx(want.scratch, rel=0.1)
    out = 128 * 16 * 24 * 2
    (_, first), (_, second) = seen
    assert second.totals["global_write_units"] * 32 == out
    folded = 128 * 32 * 4 + 2 * 128 * 4
    assert first.totals["global_write_bytes"] == out / 4 + folded


# PLANT=n of this stage's headers: what must be found, and in which launch.
PLANTS = {
    11: ("race", "gate_sums"),
    12: ("out-of-bounds", "gate_sums"),
    13: ("race", "product"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_is_found(plant: int) -> None:
    kind, where = PLANTS[plant]
    found: list[set[str]] = []

    def run_planted(launch: Launch) -> None:
        """All four orders of the first launch in question, the others as they are."""
        if found or names([(launch, None)]) != [where]:
            assert emulate(launch).findings == []
            return
        found.extend(emulate(launch, order, plant).kinds for order in ORDERS)
        emulate(launch)

    named = case(SMALL, False, torch.float32, save=where == "gate_sums")
    with emulated(), intercept(run_planted):
        if where == "gate_sums":
            run(named, torch.float32, "channels_last", torch.ones(named["e"].shape))
        else:
            OP(*convert("gated_fusion", named, torch.float32, "channels_last"), backend="cuda")
    assert len(found) == len(ORDERS)
    assert all(kind in kinds for kinds in found), found
