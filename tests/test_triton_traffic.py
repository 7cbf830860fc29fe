"""Bytes that the Triton kernels move, by the sanitizer's log of accesses, against the contract."""

from __future__ import annotations

import pytest
import torch
from stage_cases import OPS, Sizes, arguments, convert, differentiable, require_grad

from fused.backends.triton import INTERPRETER
from fused.contract import LAUNCHES, Problem, cost

if not INTERPRETER:
    pytest.skip("FUSED_TRITON_INTERPRETER is not 1", allow_module_level=True)

from triton_sanitizer import LaunchTraffic, collecting

# One band a slab in the interpreter, and channels that need no padding.
SIZES = Sizes(4, 64, 12, 12, 2)
STAGES = ("channel_interaction", "coordinate_attention", "cross_spatial", "gated_fusion")
# What the launchers call maps; parameters, vectors and partial sums are no part of the model.
MAPS = {"x", "e", "out", "w", "hidden", "logits", "grad_e", "grad_out", "grad_x", "grad_w"}
SCRATCH = {
    *("scratch", "y", "sheets", "features", "reduced", "grad_features", "grad_sheets"),
    *("r", "expanded", "grad_logits", "grad_expanded", "grad_hidden"),
}


def moved(log: list[LaunchTraffic], names: set[str], scratch: bool) -> int:
    """Bytes read and written of arguments of these names."""
    return sum(
        argument.read + argument.written
        for launch in log
        for name, argument in launch.arguments.items()
        if name in names and argument.scratch == scratch
    )


@pytest.mark.parametrize(("training", "layout"), [(False, "channels_last"), (True, "contiguous")])
@pytest.mark.parametrize("stage", STAGES)
def test_bytes_and_launches_are_those_of_the_contract(
    stage: str, training: bool, layout: str
) -> None:
    named = arguments(stage, SIZES, training)
    if "save" in named:
        named["save"] = training
    args = convert(stage, named, torch.float16, layout)
    problem = Problem(*(SIZES.batch, SIZES.channels, SIZES.height, SIZES.width), SIZES.groups)
    leaves = require_grad(stage, args) if training else []
    with collecting() as log:
        outputs = OPS[stage](*args, backend="triton")
        forward = list(log)
        if training:
            results = differentiable(stage, outputs)
            torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])
    passes = [("forward", forward), ("backward", log[len(forward) :])][: 2 if training else 1]
    for direction, launches in passes:
        want = cost(stage, problem, dtype=torch.float16, direction=direction, training=training)
        assert moved(launches, MAPS, False) == pytest.approx(want.bytes, rel=0.1), direction
        if want.scratch > 0:  # else there is none of the size of a map
            assert moved(launches, SCRATCH, True) == pytest.approx(want.scratch, rel=0.1), direction
        column = 2 if direction == "backward" else int(training)
        assert len(launches) == LAUNCHES["triton"][stage][column], direction


def test_evaluation_of_ciema_makes_eight_passes() -> None:
    """The goal; w, a map of one channel in 32, comes on top."""
    problem = Problem(1, 1024, 56, 56, 32)
    whole = sum(cost(stage, problem, dtype=torch.float16).bytes for stage in STAGES)
    one_pass = 1024 * 56 * 56 * 2
    assert whole / one_pass == pytest.approx(8, rel=0.02)


def test_statistics_from_msff_spare_a_pass() -> None:
    """Between MSFF's output and e nothing reads the map but the product."""
    named = arguments("msff", SIZES, False) | {"statistics": True}
    with collecting() as log:
        out, _, _, *known = OPS["msff"](
            *convert("msff", named, torch.float16, "channels_last"), backend="triton"
        )
        weights = convert(
            *("channel_interaction", arguments("channel_interaction", SIZES)),
            *(torch.float16, "channels_last"),
        )[1:4]
        first = len(log)
        OPS["channel_interaction"](out, *weights, *known, backend="triton")
    problem = Problem(
        *(SIZES.batch, SIZES.channels, SIZES.height, SIZES.width), SIZES.groups,
        statistics_known=True,
    )  # fmt: skip
    want = cost("channel_interaction", problem, dtype=torch.float16)
    assert want.bytes == 2 * 2 * SIZES.channels * problem.pixels
    assert moved(log[first:], MAPS, False) == pytest.approx(want.bytes, rel=0.1)
    # Two maps: a product less than for three, the parts more.
    assert first == LAUNCHES["triton"]["msff"][0]
