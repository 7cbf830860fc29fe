"""FLOP, bytes of device-memory traffic and saved bytes of every stage, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    batch: int
    channels: int
    height: int
    width: int
    groups: int = 32
    reduction: int = 16
    features: tuple[tuple[int, int, int], ...] = ()

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
        bytes: traffic of maps through device memory; a (sample, group) slab stays on chip.
        saved: bytes kept for the backward, parameters not counted.
    """

    flop: int
    bytes: int
    saved: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flop + other.flop, self.bytes + other.bytes, self.saved + other.saved)


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


def _map_passes(stage: str, direction: str) -> float:
    """Reads and writes of a C-channel map; w and vectors are below one pass in 32."""
    forward = {
        "msff": 1.0,  # write; the small maps are counted beside
        "channel_interaction": 3.0,  # x for statistics, x for the product, e out
        "coordinate_attention": 1.0,
        "cross_spatial": 1.0,
        "gated_fusion": 3.5,  # e twice, hidden out and in, out
    }
    backward = {
        "msff": 2.0,  # grad twice: batch-norm sums, then the product
        "channel_interaction": 4.0,  # grad twice, x, grad_x
        "coordinate_attention": 2.0,
        "cross_spatial": 2.0,
        "gated_fusion": 7.75,  # grad, e, logits twice; hidden and its gradient; grad_e
    }
    return (forward if direction == "forward" else backward)[stage]


def cost(
    stage: str,
    problem: Problem,
    *,
    dtype: torch.dtype = torch.float32,
    direction: str = "forward",
    published: bool = False,
) -> Cost:
    """FLOP, bytes and saved bytes of one stage.

    Args:
        stage: one of `STAGES`.
        problem: the sizes; MSFF also needs `problem.features`.
        dtype: of the maps.
        direction: "forward" or "backward"; the backward counts what it recomputes.
        published: count MSFF's product at the target size, as the published form does it.
    """
    if direction not in ("forward", "backward"):
        raise ValueError(f"direction={direction!r}, expected 'forward' or 'backward'")
    forward = _multiply_adds(stage, problem, published)
    again = 0 if published else _recomputed_multiply_adds(stage, problem)
    multiply_adds = forward if direction == "forward" else 2 * forward + again
    size = dtype.itemsize
    map_bytes = problem.channels * problem.pixels * size
    small = sum(c * h * w for c, h, w in problem.features) * problem.batch * size
    traffic = int(_map_passes(stage, direction) * map_bytes)
    traffic += small * (1 if direction == "forward" else 2) if stage == "msff" else 0
    return Cost(2 * multiply_adds, traffic, saved_bytes(stage, problem, dtype))


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
