"""What `torch.utils.flop_counter` counts for the ops, whose products it does not see by itself."""

from __future__ import annotations

from typing import Any

import torch

from . import evaluation_ops, ops
from .contract import STAGES, Problem, cost


def problem_of(stage: str, named: dict[str, Any]) -> Problem:
    """The sizes of a call of a stage's op, from its arguments by name."""
    if stage == "msff":
        sizes = [feature.shape[1:] for feature in named["features"]]
        height, width = (max(size[i] for size in sizes) for i in (1, 2))
        batch, channels = named["features"][0].shape[0], named["weight"].shape[0]
        return Problem(batch, channels, height, width, 1, features=tuple(map(tuple, sizes)))
    x: torch.Tensor = named["x" if stage == "channel_interaction" else "e"]
    batch, channels, height, width = x.shape
    if stage == "channel_interaction":
        reduction = channels // named["squeeze_weight"].shape[0]
        return Problem(batch, channels, height, width, 1, reduction)
    groups = named["w"].shape[1] if stage == "gated_fusion" else named["groups"]
    return Problem(batch, channels, height, width, groups)


def _count(op: Any, stages: tuple[str, ...], direction: str = "forward") -> None:
    """Let calls of an op count as those stages."""
    from torch.utils.flop_counter import register_flop_formula

    names = [argument.name for argument in op._schema.arguments]

    @register_flop_formula(op.overloadpacket, get_raw=True)
    def formula(*args: Any, **named: Any) -> int:
        given = dict(zip(names, args, strict=False)) | named
        costs = (cost(stage, problem_of(stage, given), direction=direction) for stage in stages)
        return sum(one.flop for one in costs)


def register() -> None:
    """Tell torch's counter of all ops; once, for it refuses a second time."""
    for stage in ops.STAGE_OPS:
        if stage.name in STAGES:
            _count(stage.op, (stage.name,))
            _count(stage.backward_op, (stage.name,), "backward")
    _count(evaluation_ops.gated_fusion_mean.op, ("gated_fusion",))
    _count(evaluation_ops.spatial_gate.op, ("coordinate_attention", "cross_spatial"))
