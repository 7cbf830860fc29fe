"""FLOP, bytes of device-memory traffic and saved bytes of every stage, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .legality import STAGES, statistics_dtype


@dataclass(frozen=True)
class Problem:
    """The sizes of one stage's input.

    Attributes:
        batch: B.
        channels: C of CIEMA, and C_out of MSFF.
        height: H of the (largest) map.
        width: W of the (largest) map.
        groups: G.
        reduction: r of the channel-interaction MLP.
        features: (C_i, H_i, W_i) of each map that goes into MSFF.
        statistics_known: MSFF leaves its output's channel statistics to channel interaction.
    """

    batch: int
    channels: int
    height: int
    width: int
    groups: int = 32
    reduction: int = 16
    features: tuple[tuple[int, int, int], ...] = ()
    statistics_known: bool = False

    @property
    def pixels(self) -> int:
        """B·H·W."""
        return self.batch * self.height * self.width

    @property
    def group_channels(self) -> int:
        """C / G, the width of one group."""
        return self.channels // self.groups


@dataclass(frozen=True)
class Cost:
    """What one call of a stage takes at least.

    Attributes:
        flop: floating-point operations of the products, two a multiply-add.
        bytes: what its launches read and write of the op's maps, its inputs, outputs and saved
            maps: traffic through device memory. Within a launch a byte counts once.
        saved: bytes kept for the backward, parameters not counted.
        scratch: what its launches read and write of maps of their own; one image's fit the
            second-level cache of a large GPU.
    """

    flop: int
    bytes: int
    saved: int
    scratch: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flop + other.flop,
            self.bytes + other.bytes,
            self.saved + other.saved,
            self.scratch + other.scratch,
        )


def _multiply_adds(stage: str, p: Problem, published: bool) -> int:
    """Multiply-adds of a forward: of the published form, or with spec.md section 5.1."""
    channels, width = p.channels, p.group_channels
    if stage == "msff":
        if published:
            return channels * sum(f[0] for f in p.features) * p.pixels
        return p.batch * channels * sum(c * h * w for c, h, w in p.features)
    if stage == "channel_interaction":
        hidden = max(channels // p.reduction, 1)
        return channels * channels * p.pixels + 4 * p.batch * channels * hidden
    if stage == "coordinate_attention":
        return p.batch * channels * width * (p.height + p.width)
    if stage == "cross_spatial":
        # 3×3 of e; on both branches 1×1 + 3×3 + 5×5, attention 3c→3c, reduction 3c→c, Wc c→c.
        return (9 + 2 * (1 + 9 + 25 + 9 + 3 + 1)) * width * channels * p.pixels
    if stage == "gated_fusion":
        hidden = channels // 4
        return (2 * hidden * channels + 2 * channels * channels) * p.pixels
    raise ValueError(f"stage={stage!r}, expected one of {STAGES}")


def _recomputed_multiply_adds(stage: str, p: Problem) -> int:
    """Multiply-adds that a backward repeats because the maps between were not saved."""
    if stage in ("msff", "cross_spatial"):
        return _multiply_adds(stage, p, published=False)
    if stage == "gated_fusion":
        return (p.channels // 4) * p.channels * p.pixels
    return 0


class Passes(NamedTuple):
    """Reads and writes of one call, in maps of C channels, of w, and of scratch.

    Attributes:
        maps: of C-channel maps that are inputs, outputs or saved.
        gates: of the (B, G, H, W) gate w or its gradient.
        features: of the maps that go into MSFF, or their gradients.
        scratch: of C-channel maps of the op's own.
    """

    maps: float
    gates: int = 0
    features: int = 0
    scratch: float = 0.0


# By (stage, "evaluation", "training" or "backward"), as the Triton backend's launches do it; the
# sanitizer's log of accesses is compared with these (tests/test_triton_traffic.py).
_PASSES: dict[tuple[str, str], Passes] = {
    ("msff", "evaluation"): Passes(1.0, features=1),
    ("msff", "training"): Passes(1.0, features=2),
    ("msff", "backward"): Passes(2.0, features=4, scratch=4.0),
    # x for the statistics (unless they are known), x for the product, e; in the backward twice the
    # gradient, x, x's gradient.
    ("channel_interaction", "evaluation"): Passes(3.0),
    ("channel_interaction", "training"): Passes(3.0),
    ("channel_interaction", "backward"): Passes(4.0),
    ("coordinate_attention", "evaluation"): Passes(1.0),
    ("coordinate_attention", "training"): Passes(1.0),
    ("coordinate_attention", "backward"): Passes(2.0),
    # Scratch: three sheets, y of both branches; in training three thirds of features twice.
    ("cross_spatial", "evaluation"): Passes(1.0, gates=1, scratch=10.0),
    ("cross_spatial", "training"): Passes(1.0, gates=1, scratch=24.0),
    ("cross_spatial", "backward"): Passes(3.0, gates=8, scratch=56.0),
    # e twice, out; hidden is scratch unless it is kept, and so are the logits.
    ("gated_fusion", "evaluation"): Passes(3.0, gates=2, scratch=0.5),
    ("gated_fusion", "training"): Passes(6.5, gates=3, scratch=2.0),
    ("gated_fusion", "backward"): Passes(12.0, gates=5, scratch=11.75),
}

# Launches of one call on a GPU, at most, by backend and stage: evaluation, training, backward.
# Those of MSFF are for three maps of which one has the target size; its channel statistics take one
# more. What the library's products launch is not counted.
LAUNCHES: dict[str, dict[str, tuple[int, int, int]]] = {
    "triton": {
        "msff": (3, 5, 14),
        "channel_interaction": (2, 2, 3),
        "coordinate_attention": (1, 1, 2),
        "cross_spatial": (2, 5, 10),
        "gated_fusion": (2, 6, 10),
    },
    "cuda": {
        "msff": (3, 5, 14),
        "channel_interaction": (3, 3, 1),
        "coordinate_attention": (1, 1, 2),
        "cross_spatial": (2, 5, 13),
        "gated_fusion": (2, 6, 9),
    },
}


def cost(
    stage: str,
    problem: Problem,
    *,
    dtype: torch.dtype = torch.float32,
    direction: str = "forward",
    published: bool = False,
    training: bool = False,
) -> Cost:
    """FLOP, bytes, scratch and saved bytes of one stage.

    Args:
        stage: one of `STAGES`.
        problem: the sizes; MSFF also needs `problem.features`.
        dtype: of the maps.
        direction: "forward" or "backward"; the backward counts what it recomputes.
        published: count MSFF's product at the target size, as the published form does it.
        training: a forward with batch statistics, which keeps maps for its backward.
    """
    if direction not in ("forward", "backward"):
        raise ValueError(f"direction={direction!r}, expected 'forward' or 'backward'")
    forward = _multiply_adds(stage, problem, published)
    again = 0 if published else _recomputed_multiply_adds(stage, problem)
    multiply_adds = forward if direction == "forward" else 2 * forward + again
    size = dtype.itemsize
    map_bytes = problem.channels * problem.pixels * size
    small = sum(c * h * w for c, h, w in problem.features) * problem.batch * size
    forward_form = "training" if training else "evaluation"
    passes = _PASSES[stage, forward_form if direction == "forward" else direction]
    gate_bytes = problem.groups * problem.pixels * size
    maps = passes.maps
    if problem.statistics_known and (stage, direction) == ("channel_interaction", "forward"):
        maps -= 1.0
    traffic = maps * map_bytes + passes.gates * gate_bytes + passes.features * small
    scratch = passes.scratch * map_bytes
    return Cost(2 * multiply_adds, int(traffic), saved_bytes(stage, problem, dtype), int(scratch))


def saved_bytes(stage: str, problem: Problem, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps for one stage; maps shared by stages are counted in each."""
    p, size, stat = problem, dtype.itemsize, statistics_dtype(dtype).itemsize
    whole = p.channels * p.pixels * size
    vectors = p.batch * p.channels * stat
    gates = p.batch * p.channels * (p.height + p.width) * stat
    if stage == "msff":
        return sum(c * h * w for c, h, w in p.features) * p.batch * size + 2 * p.channels * stat
    if stage == "channel_interaction":
        return whole + 3 * vectors + 8 * p.batch * p.channels
    if stage == "coordinate_attention":
        return whole + gates + 2 * vectors
    if stage == "cross_spatial":
        statistics = 2 * p.groups * 8 * p.group_channels * stat
        return whole + gates + 4 * vectors + p.groups * p.pixels * size + statistics
    if stage == "gated_fusion":
        hidden = (p.channels // 4) * p.pixels * size
        return 2 * whole + hidden + p.groups * p.pixels * size + 2 * 9 * p.channels // 4 * stat
    raise ValueError(f"stage={stage!r}, expected one of {STAGES}")
