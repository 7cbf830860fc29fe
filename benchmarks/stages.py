"""What is timed: every stage cut at its op's boundary, CIEMA, MSFF and the network, in two forms.

The published form calls child modules as `fused.backends.reference.published` does; the fused form
calls the ops. Both take the same inputs and return the same outputs, so one oracle judges both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fused import FusedCIEMA, ops, optimize_for_inference
from fused.backends import native
from fused.backends.cpu_packed import PackedCIEMA
from fused.backends.reference.published import PublishedCIEMA, PublishedMSFF
from fused.contract import STAGES, Cost, Problem, cost
from mobilesteelnet.model import MobileSteelNet, describe

CIEMA_STAGES = tuple(stage for stage in STAGES if stage != "msff")
SUBJECTS = (*STAGES, "ciema", "network")
FORWARD, BACKWARD, BOTH = "forward", "backward", "both"
MODES = (FORWARD, BACKWARD, BOTH)

OPS = {op.name: op for op in ops.STAGE_OPS}
_NET = "cross_spatial_learning"


def _norm(argument: str, running: str, key: str) -> dict[str, str]:
    return {
        argument.format("weight"): f"{key}.weight",
        argument.format("bias"): f"{key}.bias",
        running.format("mean"): f"{key}.running_mean",
        running.format("var"): f"{key}.running_var",
    }


# Argument of each op → key of CIEMA's state dict.
ARGUMENT_KEYS: dict[str, dict[str, str]] = {
    "channel_interaction": {
        "squeeze_weight": "channel_interaction.fc.0.weight",
        "excite_weight": "channel_interaction.fc.2.weight",
        "interaction_weight": "channel_interaction.channel_interaction.weight",
    },
    "coordinate_attention": {"weight": "conv1x1.weight", "bias": "conv1x1.bias"},
    "cross_spatial": {
        **{f"gn_{name}": f"gn.{name}" for name in ("weight", "bias")},
        **{f"conv3x3_{name}": f"conv3x3.{name}" for name in ("weight", "bias")},
        **{f"spatial_conv{k}_weight": f"{_NET}.spatial_conv{k}.weight" for k in (1, 3, 5)},
        "attention_weight": f"{_NET}.spatial_attention.0.weight",
        **_norm("attention_bn_{}", "attention_running_{}", f"{_NET}.spatial_attention.1"),
        "reduce_weight": f"{_NET}.ms_reduce.0.weight",
        **_norm("reduce_bn_{}", "reduce_running_{}", f"{_NET}.ms_reduce.1"),
        "channel_feat_weight": f"{_NET}.channel_feat.weight",
        "alpha": f"{_NET}.alpha",
    },
    "gated_fusion": {
        "squeeze_weight": "multi_scale_fusion.0.weight",
        **_norm("bn1_{}", "running_{}1", "multi_scale_fusion.1"),
        "expand_weight": "multi_scale_fusion.3.weight",
        **_norm("bn2_{}", "running_{}2", "multi_scale_fusion.4"),
        "fusion_weight": "final_fusion.0.weight",
        **_norm("bn3_{}", "running_{}3", "final_fusion.1"),
    },
}


# ---------------------------------------------------------------------------- stages as modules


class OpStage(nn.Module):
    """One stage of a FusedCIEMA block, called as its op; buffers are not updated."""

    def __init__(self, block: FusedCIEMA, stage: str, backend: str) -> None:
        super().__init__()
        self.block, self.stage, self.backend = block, stage, backend

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The op's map and vector inputs → its differentiable outputs."""
        op, block = OPS[self.stage], self.block
        tensors = dict(block.named_parameters()) | dict(block.named_buffers())
        numbers: dict[str, Any] = {
            "groups": block.groups,
            "training": self.training,
            "bn_statistics": block.bn_statistics,
            "save": torch.is_grad_enabled(),
            **op.defaults,
        }
        maps = iter(inputs)
        args: list[Any] = []
        for name in op.inputs:
            key = ARGUMENT_KEYS[self.stage].get(name)
            if key is not None:
                args.append(None if self.training and "running" in name else tensors[key])
            elif "eps" in name:
                args.append(block.gn.eps)
            else:
                args.append(numbers[name] if name in numbers else next(maps))
        results = op(*args, backend=self.backend)
        results = results if isinstance(results, (list, tuple)) else (results,)
        pairs = zip(op.outputs, results, strict=True)
        return tuple(value for name, value in pairs if name in op.differentiable)


class PublishedStage(nn.Module):
    """One stage of a PublishedCIEMA block, cut where the op of that name begins and ends."""

    def __init__(self, block: PublishedCIEMA, stage: str) -> None:
        super().__init__()
        self.block, self.stage = block, stage

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As in OpStage."""
        run: Callable[..., Any] = getattr(self, f"_{self.stage}")
        return run(*inputs)

    def _channel_interaction(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.block.channel_interaction(x),)

    def _coordinate_attention(self, e: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, channels, height, width = e.shape
        slabs = e.reshape(batch * self.block.groups, -1, height, width)
        pooled = torch.cat([slabs.mean(3, keepdim=True), slabs.mean(2, keepdim=True).mT], 2)
        gate_h, gate_w = self.block.conv1x1(pooled).sigmoid().split([height, width], 2)
        u = slabs * gate_h * gate_w.mT
        var, mean = torch.var_mean(u, (2, 3), correction=0)
        gates = (gate.reshape(batch, channels, -1) for gate in (gate_h, gate_w))
        rstd = (var + self.block.gn.eps).rsqrt()
        return (*gates, mean.reshape(batch, channels), rstd.reshape(batch, channels))

    def _cross_spatial(
        self,
        e: torch.Tensor,
        alpha_h: torch.Tensor,
        alpha_w: torch.Tensor,
        mean: torch.Tensor,
        rstd: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        block, (batch, _, height, width) = self.block, e.shape
        normalised = (e * alpha_h[..., None] * alpha_w[:, :, None] - mean[..., None, None]) * rstd[
            ..., None, None
        ]
        x1 = normalised.reshape(batch * block.groups, -1, height, width)
        x1 = x1 * block.gn.weight[:, None, None] + block.gn.bias[:, None, None]
        x2 = block.conv3x3(e.reshape(x1.shape))
        y1, y2 = block._learn(x1, x2, batch)
        weight1 = y1.mean((2, 3)).softmax(1)[:, :, None, None]
        weight2 = y2.mean((2, 3)).softmax(1)[:, :, None, None]
        w = ((weight1 * y2).sum(1) + (weight2 * y1).sum(1)).sigmoid()
        return (w.reshape(batch, block.groups, height, width),)

    def _gated_fusion(self, e: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        block = self.block
        s = e * w.repeat_interleave(block.channels // block.groups, 1)
        phi = block.final_fusion(torch.cat([s, block.multi_scale_fusion(s)], 1))
        return (phi * e + (1 - phi) * s,)


class FrozenStage(nn.Module):
    """One stage of a frozen FusedCIEMA block on the CPU; maps are converted inside, as there."""

    def __init__(self, block: FusedCIEMA, stage: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.stage, self.dtype = stage, dtype
        self.packed = PackedCIEMA(block, block.probe().to(dtype))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As in OpStage."""
        e, *rest = inputs
        results = self._run(e.to(self.dtype), *rest)
        return tuple(value.to(inputs[0].dtype) for value in results)

    def _run(self, e: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed = self.packed
        if self.stage == "channel_interaction":
            return (packed.interact(e),)
        if self.stage == "coordinate_attention":
            run = native.kernel("coordinate_attention_packed")
            return tuple(run(e, packed.coordinate, packed.groups, packed.eps))
        if self.stage == "cross_spatial":
            run = native.kernel("cross_spatial_packed")
            return (run(e, *rest, packed.cross, packed.groups)[0],)
        return (packed.fuse(e, rest[0].to(self.dtype), mean_only=False),)


class Whole(nn.Module):
    """A block or network with the stages' calling convention: maps in, a tuple out."""

    def __init__(self, module: nn.Module, takes_list: bool) -> None:
        super().__init__()
        self.block, self.takes_list = module, takes_list

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The module's inputs → its one output."""
        return (self.block(list(inputs) if self.takes_list else inputs[0]),)


# ------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Shape:
    """Sizes of the network that the cases are cut from.

    Attributes:
        name: as in `--shapes`.
        batch: B.
        width: multiplier of the published channel counts.
        image_size: height and width of the network's input.
        modes: those that are timed.
    """

    name: str
    batch: int
    width: float
    image_size: int
    modes: tuple[str, ...] = MODES


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 2, 0.125, 32),
        Shape("small", 1, 0.25, 112),
        Shape("paper", 1, 1.0, 224),
        Shape("paper-batch4", 4, 1.0, 224, (BACKWARD, BOTH)),
        Shape("paper-batch8", 8, 1.0, 224, (FORWARD,)),
    )
}


@dataclass(frozen=True)
class Case:
    """One subject (a stage, "ciema" or "network") at one shape, with its weights and inputs."""

    subject: str
    shape: Shape

    @property
    def stages(self) -> tuple[str, ...]:
        """The fused stages inside."""
        if self.subject in STAGES:
            return (self.subject,)
        return CIEMA_STAGES if self.subject == "ciema" else STAGES

    @cached_property
    def _network(self) -> tuple[MobileSteelNet, list[torch.Tensor]]:
        """The network that all providers share their weights with, and the subject's inputs."""
        torch.manual_seed(0)
        network = MobileSteelNet(width=self.shape.width, backend="reference")
        size, batch = self.shape.image_size, self.shape.batch
        images = torch.randn(batch, 3, size, size)
        return network, _inputs(network, self.subject, _calibrate(network, images))

    @property
    def inputs(self) -> list[torch.Tensor]:
        """Float32 inputs, such as the subject meets inside the network."""
        return self._network[1]

    def module(self, form: str, backend: str = "reference") -> nn.Module:
        """A fresh copy of the subject: `form` "published", or "fused" with a backend."""
        source = self._network[0]
        network = MobileSteelNet.from_config(source.config | {"backend": backend})
        network.load_state_dict(source.state_dict())
        if form == "published":
            _publish(network)
        assert network.ciema is not None
        if self.subject == "network":
            return Whole(network, takes_list=False)
        if self.subject == "msff":
            assert network.msff is not None
            return Whole(network.msff, takes_list=True)
        if self.subject == "ciema":
            return Whole(network.ciema, takes_list=False)
        if form == "published":
            return PublishedStage(network.ciema, self.subject)
        return OpStage(network.ciema, self.subject, backend)

    def frozen(self, dtype: torch.dtype) -> nn.Module:
        """The subject's frozen form with maps of `dtype`, float32 in and out."""
        if self.subject in CIEMA_STAGES:
            module = self.module("fused", "auto").eval()
            assert isinstance(module, OpStage)
            return FrozenStage(module.block, self.subject, dtype)
        return optimize_for_inference(self.module("fused", "auto").eval(), dtype)

    @property
    def size(self) -> str:
        """The subject's largest input, as 1x1024x56x56."""
        return "x".join(map(str, max(self.inputs, key=torch.Tensor.numel).shape))

    def flop(self, mode: str, published: bool) -> int:
        """FLOP of one call by the contract, with spec.md 5.1 if not published."""
        network, _ = self._network
        assert network.msff is not None
        assert network.ciema is not None
        if self.subject == "network":
            return _network_flop(network, self.shape, mode, published)
        shapes = network.msff.stage_channels or ()
        largest = self.shape.image_size // 4
        features = tuple((c, largest >> i, largest >> i) for i, c in enumerate(shapes))
        channels, groups = network.ciema.channels, network.ciema.groups
        problem = Problem(
            *(self.shape.batch, channels, largest, largest), groups=groups, features=features
        )
        directions = {FORWARD: (FORWARD,), BACKWARD: (BACKWARD,), BOTH: (FORWARD, BACKWARD)}[mode]
        parts = [
            cost(stage, problem, direction=direction, published=published)
            for stage in self.stages
            for direction in directions
        ]
        return sum(parts, Cost(0, 0, 0)).flop


def _publish(network: MobileSteelNet) -> None:
    """Put published blocks in the places of the fused ones, with their weights."""
    msff, ciema = network.msff, network.ciema
    assert msff is not None
    assert ciema is not None
    assert msff.stage_channels is not None
    blocks: dict[str, nn.Module] = {
        "msff": PublishedMSFF(msff.stage_channels, msff.out_channels),
        "ciema": PublishedCIEMA(ciema.channels, ciema.groups, ciema.reduction),
    }
    for name, block in blocks.items():
        block.load_state_dict(getattr(network, name).state_dict())
        setattr(network, name, block)


@torch.no_grad()
def _calibrate(network: MobileSteelNet, images: torch.Tensor) -> torch.Tensor:
    """Running buffers from these images: with fresh ones the deep maps would shrink to nothing."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.weight.add_(0.1 * torch.randn_like(norm.weight))
        norm.bias.add_(0.1 * torch.randn_like(norm.bias))
    network.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    network.eval()
    return images


@torch.no_grad()
def _inputs(network: MobileSteelNet, subject: str, images: torch.Tensor) -> list[torch.Tensor]:
    """The subject's inputs for these images, in evaluation."""
    if subject == "network":
        return [images]
    maps = network.backbone(images)
    if subject == "msff":
        return maps
    assert network.msff is not None
    assert network.ciema is not None
    x = network.msff(maps)
    if subject in ("ciema", "channel_interaction"):
        return [x]

    ciema = network.ciema

    def stage(name: str, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        outputs: tuple[torch.Tensor, ...] = OpStage(ciema, name, "reference").eval()(*inputs)
        return outputs

    (e,) = stage("channel_interaction", [x])
    if subject == "coordinate_attention":
        return [e]
    vectors = stage("coordinate_attention", [e])
    if subject == "cross_spatial":
        return [e, *vectors]
    return [e, *stage("cross_spatial", [e, *vectors])]


def _network_flop(network: MobileSteelNet, shape: Shape, mode: str, published: bool) -> int:
    facts = describe(network, shape.image_size)
    forward = facts["published_flop" if published else "flop"]
    backbone = 2 * facts["backbone_flop"]
    if published:
        backward = 2 * facts["published_flop"]
    else:
        backward = backbone + sum(row["backward_flop"] for row in facts["stages"])
    per_image = {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[mode]
    return shape.batch * per_image
