"""Legality names the argument and its value; costs are the figures of spec.md."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_cases import OPS, Sizes, arguments, convert

from fused import FusedCIEMA, FusedMSFF
from fused.contract import STAGES, Problem, cost, saved_bytes

PAPER = Problem(1, 1024, 56, 56, features=((128, 56, 56), (512, 28, 28), (1024, 14, 14)))
SIZES = Sizes(2, 8, 4, 3, 2)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(2, 16, 4), ValueError, r"x must be \(B, C, H, W\), got shape \(2, 16, 4\)"),
        (torch.zeros(0, 16, 4, 4), ValueError, r"x is empty, shape \(0, 16, 4, 4\)"),
        (torch.zeros(2, 16, 0, 4), ValueError, r"x is empty"),
        (torch.zeros(2, 16, 4, 4, dtype=torch.int32), TypeError, "x has dtype torch.int32"),
        (torch.zeros(2, 16, 4, 4).to_sparse(), TypeError, "layout torch.sparse_coo"),
        (torch.zeros(2, 12, 4, 4), ValueError, "x has 12 channels.*built for channels=16"),
        (torch.zeros(2, 16, 4, 4, dtype=torch.float64), TypeError, "float32.*float64"),
    ],
)
def test_bad_maps(x: torch.Tensor, error: type[Exception], words: str, backend: str | None) -> None:
    block = FusedCIEMA(16, 4, backend=backend).eval()
    with pytest.raises(error, match=words):
        block(x)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"channels": 30, "factor": 4}, "groups=4 does not divide channels=30"),
        ({"channels": 32, "factor": 0}, "groups=0"),
        ({"channels": 32, "factor": -4}, "groups=-4"),
        ({"channels": 2, "factor": 1}, "channels=2, at least 4"),
        ({"channels": 32, "reduction": 0}, "reduction=0"),
        ({"channels": 32, "bn_statistics": "batch"}, "bn_statistics='batch'"),
        ({"channels": 32, "factor": 8, "groups": 4}, "factor=8 and groups=4 differ"),
    ],
)
def test_bad_constructor_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FusedCIEMA(**arguments)


def test_parameters_are_of_a_floating_dtype() -> None:
    for dtype in (torch.int32, torch.complex64, "float32"):
        with pytest.raises(TypeError, match=f"dtype={dtype!r}, supported are None, float32"):
            FusedCIEMA(32, dtype=dtype)
        with pytest.raises(TypeError, match=f"dtype={dtype!r}, supported are None, float32"):
            FusedMSFF([4, 8], dtype=dtype)


def test_bad_msff_arguments() -> None:
    with pytest.raises(ValueError, match=r"stage_channels=\[\]"):
        FusedMSFF([])
    with pytest.raises(ValueError, match="out_channels=0"):
        FusedMSFF([4], 0)
    block = FusedMSFF([4, 8])
    with pytest.raises(TypeError, match="list of maps, got one tensor"):
        block(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"\[4\] channels.*\[4, 8\]"):
        block([torch.zeros(1, 4, 2, 2)])
    maps = [torch.zeros(1, 4, 2, 2), torch.zeros(2, 8, 2, 2)]
    with pytest.raises(ValueError, match=r"features\[1\] has batch 2"):
        block.eval()(maps)
    maps[1] = torch.zeros(1, 8, 2, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"features\[1\] has dtype torch.float64"):
        block(maps)


def test_training_needs_more_than_one_value_a_channel() -> None:
    block = FusedCIEMA(16, 4)
    with pytest.raises(ValueError, match="more than one value a channel"):
        block(torch.zeros(1, 16, 1, 1))
    assert block.eval()(torch.zeros(1, 16, 1, 1)).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_wrong_shape_of_any_argument_is_refused_by_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(OPS)))
    args = convert(name, arguments(name, SIZES), torch.float32, "contiguous")
    tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and i > 0]
    if not tensors:
        return
    index = data.draw(st.sampled_from(tensors))
    bad = data.draw(st.sampled_from(["longer", "flat", "None", "dtype"]))
    value = args[index]
    if bad == "longer":
        args[index] = torch.cat([value, value])
    elif bad == "flat":
        args[index] = value.reshape(-1, 1, 1, 1, 1)
    elif bad == "dtype":
        args[index] = value.double()
    else:
        args[index] = None
    key = OPS[name].inputs[index]
    for backend in ("auto", "reference"):
        # Where two arguments disagree the message may name the other one; it names the stage.
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            OPS[name](*args, backend=backend)
        assert key in str(caught.value) or name in str(caught.value)


def test_costs_are_those_of_the_spec() -> None:
    flop = {s: cost(s, PAPER, published=True).flop / 1e9 for s in STAGES}
    assert flop["msff"] == pytest.approx(10.7, abs=0.05)
    ciema = sum(value for stage, value in flop.items() if stage != "msff")
    assert ciema == pytest.approx(44.6, abs=0.05)
    assert cost("msff", PAPER).flop / 1e9 == pytest.approx(2.1, abs=0.05)
    assert (
        cost("cross_spatial", PAPER, direction="backward").flop
        > 2 * cost("cross_spatial", PAPER).flop
    )


def test_bad_cost_arguments() -> None:
    with pytest.raises(ValueError, match="stage='attention'"):
        cost("attention", PAPER)
    with pytest.raises(ValueError, match="direction='up'"):
        cost("msff", PAPER, direction="up")
    with pytest.raises(ValueError, match="stage='attention'"):
        saved_bytes("attention", PAPER, torch.float32)


def _kept_by_autograd(block: FusedCIEMA, x: torch.Tensor) -> int:
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = block(x)
    assert out.requires_grad
    return sum(storages.values())


def test_saved_bytes_are_what_autograd_keeps() -> None:
    problem = Problem(2, 64, 14, 14, groups=4)
    block = FusedCIEMA(64, 4)
    kept = _kept_by_autograd(block, torch.randn(2, 64, 14, 14))
    whole = 2 * 64 * 14 * 14 * 4
    want = sum(saved_bytes(s, problem, torch.float32) for s in STAGES[1:])
    # e is saved by three stages and stored once; w, the gates and their statistics by two.
    shared = 2 * whole + saved_bytes("coordinate_attention", problem, torch.float32) - whole
    shared += whole * 4 // 64
    assert kept == pytest.approx(want - shared, rel=0.02)


def test_saved_memory_goal_at_the_papers_size() -> None:
    """goals.md: at most 0.058 GB an image, a tenth of the published form."""
    block = FusedCIEMA(1024)
    assert _kept_by_autograd(block, torch.randn(1, 1024, 56, 56)) <= 0.058e9
