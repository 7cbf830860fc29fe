"""Bytes that the CUDA kernels move and launches they make, as the emulator counts them."""

from __future__ import annotations

import pytest
import torch
from emulator import Report, emulated, missing_tool
from stage_cases import OPS, Sizes, arguments, convert, differentiable, require_grad

from benchmarks import cuda_capture
from benchmarks.triton_capture import Call
from fused.backends import BACKENDS
from fused.backends.cuda.launch import Launch
from fused.contract import LAUNCHES, Problem, cost

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)

SIZES = Sizes(2, 64, 12, 12, 2)
STAGES = ("channel_interaction", "coordinate_attention", "cross_spatial", "gated_fusion")
# What the entries call maps; parameters, vectors and partial sums are no part of the model.
MAPS = {"x", "e", "out", "w", "hidden", "logits", "grad_e", "grad_out", "grad_x", "grad_w"}
# The stages whose launches name all their maps.
WHOLE = {
    "forward": ("channel_interaction", "coordinate_attention", "cross_spatial"),
    "backward": ("coordinate_attention", "cross_spatial"),
}
Log = list[tuple[Launch, Report]]


def moved(log: Log) -> int:
    """Bytes of the op's maps, each once a launch."""
    return sum(
        sum(report.touched[name])
        for launch, report in log
        for name in launch.buffers
        if name in MAPS and name not in launch.scratch
    )


def kernels(log: Log) -> int:
    """Kernels that were launched; an entry may launch more than one."""
    return sum(report.totals["launches"] for _, report in log)


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
    log: Log = []

    def note(launch: Launch, report: Report) -> None:
        assert report.findings == [], launch.entry
        log.append((launch, report))

    with emulated(note):
        reason = BACKENDS["cuda"].why_not(stage, args[0], SIZES.groups)
        assert reason is None
        outputs = OPS[stage](*args, backend="cuda")
        forward = list(log)
        if training:
            results = differentiable(stage, outputs)
            torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])
    passes = [("forward", forward), ("backward", log[len(forward) :])][: 2 if training else 1]
    for direction, part in passes:
        want = cost(stage, problem, dtype=torch.float16, direction=direction, training=training)
        column = 2 if direction == "backward" else int(training)
        assert kernels(part) <= LAUNCHES["cuda"][stage][column], direction
        # The products of gated fusion call their operands otherwise; its own tests count them. In
        # channel interaction's backward they are the library's, which the emulator doesn't see.
        if stage in WHOLE[direction]:
            assert moved(part) == pytest.approx(want.bytes, rel=0.1), direction


def launches_of(batch: int, *ops: tuple[str, bool]) -> int:
    """Kernels that these calls, (op, training), start at the paper's size."""
    return sum(
        len(cuda_capture.dry(cuda_capture.entries(Call(*op, batch=batch), torch.float16)))
        for op in ops
    )


def test_launches_of_a_whole_forward_at_the_papers_size() -> None:
    """Seven, and six behind MSFF, whether or not a batch has groups enough to fill a GPU."""
    stages = [("channel_interaction", False), ("spatial_gate", False), ("gated_fusion", False)]
    assert [launches_of(batch, *stages) for batch in (1, 8)] == [6, 6]
    network = [*stages[:2], ("gated_fusion_mean", False)]  # the head reads means, not the map
    assert [launches_of(batch, *network) for batch in (1, 8)] == [7, 7]
    assert launches_of(8, ("channel_statistics", False)) == 1  # what MSFF else leaves


def test_launches_of_a_whole_training_step_at_the_papers_size() -> None:
    """Beside the library's products, which channel interaction and gated fusion leave to it."""
    forward = [(stage, True) for stage in STAGES]
    backward = [(f"{stage}_backward", True) for stage in STAGES]
    assert launches_of(4, ("channel_statistics", False), *forward) <= 16
    assert launches_of(4, *forward, *backward) <= 40
