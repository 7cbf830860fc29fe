"""MobileSteelNet (spec.md 4): depthwise-separable backbone, MSFF, CIEMA, pooling, linear head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fused
from fused.contract import BN_STATISTICS, Cost, Problem, check_count, check_map, cost
from fused.fused_block import own_call

from .blocks import CIEMA_FORMS, OTHER_ATTENTIONS

ATTENTIONS = (*CIEMA_FORMS, *OTHER_ATTENTIONS, "none")
FUSIONS = ("msff", "none")
ACTIVATIONS = (None, "relu", "relu-output")
PAPER_INPUT_SIZE = 224
STEM_CHANNELS = 32
# (output channels, stride) of every block; the stages' last outputs go into MSFF.
STAGE_BLOCKS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((64, 1), (128, 2), (128, 1)),
    ((256, 1), (512, 2), (512, 1), (512, 1)),
    ((512, 1), (512, 1), (1024, 2), (1024, 1)),
)


def scaled_channels(channels: int, width: float) -> int:
    """`channels`·`width`, rounded to a multiple of 8 and at least 8; exact at width 1."""
    return max(8, round(channels * width / 8) * 8)


def attention_groups(channels: int) -> int:
    """32 groups as published where each keeps 4 channels, fewer for a narrow network."""
    groups = 32
    while groups > 1 and (channels % groups or channels // groups < 4):
        groups //= 2
    return groups


class DepthwiseSeparable(nn.Module):
    """3×3 depthwise, 1×1 pointwise, batch norm; published without any activation.

    With `activation="relu"` batch norm and ReLU follow both convolutions, as in MobileNetV1; with
    "relu-output" a ReLU follows the published batch norm, and keys and shapes stay as published.
    """

    def __init__(
        self, channels: int, out_channels: int, stride: int, activation: str | None
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(*(channels, channels, 3, stride, 1), groups=channels, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(channels) if activation == "relu" else None
        self.pointwise = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.has_relu = activation is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, C', H/stride, W/stride)."""
        x = self.depthwise(x)
        if self.depthwise_bn is not None:
            x = self.depthwise_bn(x).relu()
        x = self.bn(self.pointwise(x))
        return x.relu() if self.has_relu else x


class MobileSteelNet(nn.Module):
    """Classifier of steel surface defects: images (B, in_channels, H, W) → logits (B, classes).

    At `width=1` keys, shapes and outputs are those of the published network.

    Args:
        num_classes: size of the head.
        in_channels: of the images.
        attention: "ciema", "none" for the paper's table 7, "ciema-no-channel-interaction" or
            "ciema-no-cross-spatial" for its table 9, "se", "eca", "cbam", "ca", "ema" for table 5.
        fusion: "msff", or "none": the last stage alone goes on.
        activation: None as published; "relu" or "relu-output" in the blocks.
        bn_statistics: of CIEMA, "sequential" as published or "pooled" (spec.md 3).
        backend: of the fused layers, None follows `fused.set_backend`.
        width: multiplier of all channel counts.
        dropout: probability with which a feature before the head is dropped in training.

    Raises:
        ValueError: an argument is out of range; the message names it and its value.
    """

    def __init__(
        self,
        num_classes: int = 6,
        in_channels: int = 3,
        attention: str = "ciema",
        fusion: str = "msff",
        activation: str | None = None,
        bn_statistics: str = "sequential",
        backend: str | None = None,
        width: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        for name, value in (("width", width), ("dropout", dropout)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r}, expected a number")
        if not 0 < width <= 8:
            raise ValueError(f"width={width}, expected a number above 0, at most 8")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}, expected at least 0, below 1")
        choices: dict[str, tuple[str | None, tuple[str | None, ...]]] = {
            "attention": (attention, ATTENTIONS),
            "fusion": (fusion, FUSIONS),
            "activation": (activation, ACTIVATIONS),
            "bn_statistics": (bn_statistics, BN_STATISTICS),
        }
        for name, (choice, allowed) in choices.items():
            if choice not in allowed:
                names = ", ".join("none (None)" if one is None else one for one in allowed)
                raise ValueError(f"{name}={choice!r}, expected one of {names}")
        self.config: dict[str, Any] = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "attention": attention,
            "fusion": fusion,
            "activation": activation,
            "bn_statistics": bn_statistics,
            "backend": backend,
            "width": width,
            "dropout": dropout,
        }
        stem = scaled_channels(STEM_CHANNELS, width)
        self.initial_conv = nn.Sequential(
            nn.Conv2d(in_channels, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        )
        stages, channels, stage_channels = [], stem, []
        for specification in STAGE_BLOCKS:
            blocks = []
            for published_channels, stride in specification:
                out = scaled_channels(published_channels, width)
                blocks.append(DepthwiseSeparable(channels, out, stride, activation))
                channels = out
            stages.append(nn.Sequential(*blocks))
            stage_channels.append(channels)
        self.stage1, self.stage2, self.stage3 = stages
        self.msff = None
        if fusion == "msff":
            self.msff = fused.FusedMSFF(stage_channels, channels, backend=backend)
        self.ciema, self.attention = None, None
        groups = attention_groups(channels)
        if attention in CIEMA_FORMS:
            self.ciema = CIEMA_FORMS[attention](
                channels, groups, bn_statistics=bn_statistics, backend=backend
            )
        elif attention != "none":
            self.attention = OTHER_ATTENTIONS[attention](channels, groups)
        self.fc = nn.Linear(channels, num_classes)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MobileSteelNet:
        """Build the network that `config`, another network's `.config`, describes."""
        return cls(**config)

    @classmethod
    def from_pretrained(
        cls, *, device: str | torch.device = "cpu", backend: str | None = None
    ) -> MobileSteelNet:
        """The network with the weights that the package brings, in evaluation mode; no download.

        `mobilesteelnet.shipped.load_shipped` gives classes and normalisation with it.

        Raises:
            CheckpointError: this version brings no weights, or they are damaged.
            ModuleNotFoundError: safetensors is not installed.
        """
        from .shipped import load_shipped

        model = load_shipped(device, backend=backend).model
        if not isinstance(model, cls):
            raise TypeError(f"the package's weights are those of a {type(model).__name__}")
        return model

    def frozen_for_inference(self, dtype: torch.dtype | None) -> nn.Module | str:
        """The frozen form of this private copy (fused.optimize_for_inference), or why none."""
        from .frozen import freeze

        return freeze(self, dtype)

    def _check_images(self, images: torch.Tensor) -> None:
        channels, given = self.config["in_channels"], isinstance(images, torch.Tensor)
        if given and (images.dim() != 4 or images.shape[1] != channels):
            raise ValueError(
                f"MobileSteelNet: images have shape {tuple(images.shape)}, expected "
                f"(B, {channels}, H, W)"
            )
        check_map("MobileSteelNet", "images", images)

    def backbone(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of the three stages."""
        self._check_images(images)
        stage1 = self.stage1(self.initial_conv(images))
        stage2 = self.stage2(stage1)
        return [stage1, stage2, self.stage3(stage2)]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the attention sees: MSFF's output, or the last stage's."""
        stages = self.backbone(images)
        return stages[-1] if self.msff is None else self.msff(stages)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, in_channels, H, W) → logits (B, num_classes)."""
        vectors = self._pooled_features(images)
        dropout: float = self.config["dropout"]
        return self.fc(nn.functional.dropout(vectors, dropout, self.training))

    def _pooled_features(self, images: torch.Tensor) -> torch.Tensor:
        """Means over H×W (B, C) of what the attention gives."""
        statistics: list[Any] = []
        if self._statistics_can_pass():
            assert self.msff is not None
            features, *statistics = self.msff.with_statistics(self.backbone(images))
        else:
            features = self.features(images)
        if isinstance(self.ciema, fused.FusedCIEMA) and self.ciema.gives_means(features):
            dtype, e = features.dtype, self.ciema.interact(features, *statistics)
            del features  # nobody keeps MSFF's map, and CIEMA's is not made
            return self.ciema.mean_after(e).to(dtype)
        if self.ciema is not None:
            features = self.ciema(features, *statistics)
        if self.attention is not None:
            features = self.attention(features)
        return features.mean((2, 3))

    def _statistics_can_pass(self) -> bool:
        """Whether MSFF may hand its output's channel statistics to CIEMA past its `__call__`."""
        if type(self.msff) is not fused.FusedMSFF or type(self.ciema) is not fused.FusedCIEMA:
            return False
        return own_call(self.msff) is None and own_call(self.ciema) is None

    def spatial_gate(self, images: torch.Tensor) -> torch.Tensor | None:
        """The gate w (B, G, h, w) of CIEMA over the images; None without CIEMA."""
        return None if self.ciema is None else self.ciema.spatial_gate(self.features(images))


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, buffers not counted."""
    return sum(p.numel() for p in model.parameters())


def _costs(
    model: MobileSteelNet, maps: list[torch.Tensor], published: bool
) -> dict[str, dict[str, Cost]]:
    """Costs of the fused stages, for stage outputs `maps`."""
    target = maps[-1]
    channels, (height, width) = target.shape[1], target.shape[2:]
    stages: list[str] = []
    if model.msff is not None:
        height, width = max(m.shape[2] for m in maps), max(m.shape[3] for m in maps)
        stages.append("msff")
    if model.ciema is not None:
        stages += model.ciema.fused_stages
    problem = Problem(
        *(target.shape[0], channels, height, width),
        groups=1 if model.ciema is None else model.ciema.groups,
        reduction=1 if model.ciema is None else model.ciema.reduction,
        features=tuple((m.shape[1], m.shape[2], m.shape[3]) for m in maps),
        statistics_known=model.msff is not None and not published,
    )
    directions = ("forward", "backward")
    return {
        stage: {d: cost(stage, problem, direction=d, published=published) for d in directions}
        for stage in stages
    }


def describe(model: MobileSteelNet, input_size: int = PAPER_INPUT_SIZE) -> dict[str, Any]:
    """Parameters, FLOP, bytes and backends of one image of `input_size`² pixels.

    FLOP are two a multiply-add; `published` counts the published form, `fused` what the stages
    need with spec.md 5.1. Bytes are device-memory traffic of float32 maps.
    """
    twin = MobileSteelNet.from_config({**model.config, "backend": "auto"}).to("meta").eval()
    images = torch.empty(1, model.config["in_channels"], input_size, input_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        maps = twin.backbone(images)
    backbone = counter.get_total_flops()
    # What the whole network has beyond its backbone and the fused ops is the head and the attention
    # that is computed in plain PyTorch.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(images)
    counts = counter.get_flop_counts()["Global"]
    plain = sum(flop for op, flop in counts.items() if not str(op).startswith("ciema."))
    other = plain - backbone
    costs = _costs(twin, maps, published=False)
    published = _costs(twin, maps, published=True)
    rows: list[dict[str, Any]] = [
        {
            "stage": stage,
            "published_flop": published[stage]["forward"].flop,
            "flop": by["forward"].flop,
            "bytes": by["forward"].bytes,
            "backward_flop": by["backward"].flop,
            "backward_bytes": by["backward"].bytes,
            "saved_bytes": by["forward"].saved,
        }
        for stage, by in costs.items()
    ]
    has_blocks = model.msff is not None or model.ciema is not None
    return {
        "input_size": input_size,
        "parameters": parameter_count(model),
        "float32_bytes": sum(4 * t.numel() for t in model.state_dict().values()),
        "backbone_flop": backbone,
        "other_flop": other,
        "published_flop": backbone + other + sum(row["published_flop"] for row in rows),
        "flop": backbone + other + sum(row["flop"] for row in rows),
        "stages": rows,
        "backends": str(fused.explain(model)) if has_blocks else "no fused blocks",
    }
