"""FusedCIEMA and FusedMSFF: drop-in layers; parameters, keys and mode, but no maths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from . import backends, ops
from .backends.reference.published import (
    CHANNEL_INTERACTION_REDUCTION,
    FUSION_REDUCTION,
    PublishedCIEMA,
    PublishedMSFF,
)
from .batchnorm import update_running_statistics, with_own_buffers
from .contract import check_map
from .evaluation_ops import gated_fusion_mean, spatial_gate
from .fused_block import FusedBlock, in_autocast_dtype, is_cast, own_call, parts_of
from .registration import may_record, needs_gradient

DEFAULT_FACTOR = 32
# Mean, maximum and the maximum's first position of every channel of a map, (B, C) each.
Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _statistics(norm: Any, training: bool) -> tuple[Any, ...]:
    """γ, β and, in evaluation, the running buffers; in training these must not be saved."""
    if training:
        return norm.weight, norm.bias, None, None
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


class FusedCIEMA(FusedBlock, PublishedCIEMA):
    """CIEMA (spec.md 2): drop-in for the published class, same keys, shapes and initialisation.

    Input and output are (B, C, H, W), float32, float64, float16 or bfloat16, any strides; the
    output keeps the input's memory format.

    Args:
        channels: C, at least 4.
        factor: the number of groups G; must divide C.
        reduction: r of the channel-interaction MLP.
        bn_statistics: "sequential" as published, or "pooled", one set of statistics over groups
            and branches (spec.md 3).
        backend: "auto", "cuda", "triton", "cpu" or "reference"; None follows `fused.set_backend`.
        device: of the parameters.
        dtype: of the parameters.
        groups: another name for `factor`.

    Raises:
        ValueError: an argument or an input is out of range; the message names it and its value.
        BackendError: `backend` is unknown, or cannot run and was asked for.
    """

    fused_stages: tuple[str, ...] = (
        *("channel_interaction", "coordinate_attention", "cross_spatial", "gated_fusion"),
    )
    published_parts = parts_of(PublishedCIEMA(4, 1, device="meta"))

    def __init__(
        self,
        channels: int,
        factor: int = DEFAULT_FACTOR,
        reduction: int = CHANNEL_INTERACTION_REDUCTION,
        bn_statistics: str = "sequential",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        groups: int | None = None,
    ) -> None:
        if groups is not None:
            if factor not in (DEFAULT_FACTOR, groups):
                raise ValueError(f"factor={factor} and groups={groups} differ, give one of them")
            factor = groups
        super().__init__(channels, factor, reduction, bn_statistics, device, dtype)
        self._set_backend(backend)

    @classmethod
    def from_module(cls, module: nn.Module, backend: str | None = None) -> FusedCIEMA:
        """A block that takes over the children of a published-style CIEMA block.

        Args:
            module: any class with the published keys; it shares its parameters with the result.
            backend: as in the constructor.

        Raises:
            ValueError: `module` is not a CIEMA block, or the older variant.
        """
        from .convert import ciema_from_module

        return ciema_from_module(module, backend)

    def modular_reason(self) -> str | None:
        """Why this block must call its children one by one; None if their parameters suffice."""
        reason = super().modular_reason()
        chain: Any = self._modules.get("multi_scale_fusion")
        if reason is not None or chain is None:
            return reason
        hidden, published = chain[0].weight.shape[0], self.channels // FUSION_REDUCTION
        if hidden == published:
            return None
        return f"multi_scale_fusion.0 has {hidden} filters, the published form has {published}"

    def probe(self) -> torch.Tensor:
        """A map of one pixel with the block's channels, dtype and device, for `explain`."""
        weight: Any = self.final_fusion[0].weight  # a Parameter, or a plain tensor in its place
        return torch.empty(1, self.channels, 1, 1, dtype=weight.dtype, device=weight.device)

    def forward(self, x: torch.Tensor, statistics: Statistics | None = None) -> torch.Tensor:
        """(B, C, H, W) → (B, C, H, W).

        `statistics`: mean, maximum and argmax of x's channels, where `FusedMSFF.with_statistics`
        has them; they spare a pass over x and change no result.
        """
        self._check_channels(x)
        if self._goes_modular():
            return in_autocast_dtype(PublishedCIEMA.forward(self, x), x)
        e = self._interact(x, statistics)
        return self._fuse(e, self._cross(e, update=True))

    def interact(self, x: torch.Tensor, statistics: Statistics | None = None) -> torch.Tensor:
        """x → e of channel interaction, for `mean_after`: whoever has e can let x go."""
        self._check_channels(x)
        if self._goes_modular():
            return in_autocast_dtype(self.channel_interaction(x), x)
        return self._interact(x, statistics)

    def mean_after(self, e: torch.Tensor) -> torch.Tensor:
        """The mean of `forward(x)` over H×W, (B, C) in float32 or better, from `interact(x)`.

        In evaluation without gradients only, and where `gives_means` is true: the map that the
        mean is of is not written (spec.md 5.6).

        Raises:
            RuntimeError: it is not.
        """
        self._check_channels(e)
        if not self.gives_means(e):
            raise RuntimeError(
                f"{type(self).__name__}.mean_after is for evaluation without gradients and without "
                "hooks, where gives_means(x) is true; else average the block's result"
            )
        eps = (norm.eps for norm in self._fusion_norms())
        args = (e, self._cross(e, update=False), *self._fusion_parameters(training=False), *eps)
        return gated_fusion_mean(*args, backend=self.backend)

    def gives_means(self, x: torch.Tensor) -> bool:
        """Whether `interact` and `mean_after` may stand for a call whose result is averaged."""
        if type(self) is not FusedCIEMA or own_call(self) or self.final_fusion[1].training:
            return False
        if may_record():
            parameters = (
                *(*self._interaction_weights(), *self._gate_weights()),
                *(
                    *self._cross_parameters(training=False),
                    *self._fusion_parameters(training=False),
                ),
            )
            if needs_gradient(x, *parameters):
                return False
        return self.modular_reason() is None

    def spatial_gate(self, x: torch.Tensor) -> torch.Tensor:
        """The gate w (B, G, H, W) in (0, 1) that this block draws over x; no buffer changes."""
        self._check_channels(x)
        if self._goes_modular():
            training = any(part.training for part in self.modules())
            block = with_own_buffers(self) if training else self
            return in_autocast_dtype(block._spatial_gate(block.channel_interaction(x)), x)
        return self._cross(self._interact(x), update=False)

    def frozen_for_inference(self, dtype: torch.dtype | None) -> nn.Module | str:
        """The frozen form of this private copy, or why there is none."""
        from .frozen import FrozenCIEMA

        return self._frozen_as(FrozenCIEMA, dtype)

    def _check_channels(self, x: torch.Tensor) -> None:
        check_map(type(self).__name__, "x", x)
        if x.shape[1] != self.channels:
            raise ValueError(
                f"FusedCIEMA: x has {x.shape[1]} channels, shape {tuple(x.shape)}; "
                f"this block was built for channels={self.channels}"
            )

    def _interact(self, x: torch.Tensor, statistics: Statistics | None = None) -> torch.Tensor:
        weights = self._interaction_weights()
        if statistics is None and is_cast(x):
            # The maximum's gradient goes where x has it: what autocast rounds may tie elsewhere.
            plain = backends.requested(self.backend) == "reference"
            given = x if plain else x.detach()  # the op's backward counts the statistics in
            statistics = ops.channel_statistics(given, backend=self.backend)
        e, *_ = ops.channel_interaction(x, *weights, *(statistics or ()), backend=self.backend)
        return e

    def _interaction_weights(self) -> tuple[Any, ...]:
        stage = self.channel_interaction
        return stage.fc[0].weight, stage.fc[2].weight, stage.channel_interaction.weight

    def _gate_weights(self) -> tuple[Any, Any]:
        return self.conv1x1.weight, self.conv1x1.bias

    def _cross_parameters(self, *, training: bool) -> tuple[Any, ...]:
        net = self.cross_spatial_learning
        attention: Any = net.spatial_attention[1]
        reduce: Any = net.ms_reduce[1]
        return (
            *(self.gn.weight, self.gn.bias),
            *(self.conv3x3.weight, self.conv3x3.bias, net.spatial_conv1.weight),
            *(net.spatial_conv3.weight, net.spatial_conv5.weight),
            *(net.spatial_attention[0].weight, *_statistics(attention, training)),
            *(net.ms_reduce[0].weight, *_statistics(reduce, training)),
            *(net.channel_feat.weight, net.alpha, self.groups, training, self.bn_statistics),
            *(attention.eps, reduce.eps),
        )

    def _cross(self, e: torch.Tensor, *, update: bool) -> torch.Tensor:
        attention: Any = self.cross_spatial_learning.spatial_attention[1]
        reduce: Any = self.cross_spatial_learning.ms_reduce[1]
        training: bool = attention.training
        weight, bias = self._gate_weights()
        parameters = self._cross_parameters(training=training)
        if not training and not needs_gradient(e, weight, bias, *parameters):
            return spatial_gate(e, weight, bias, self.gn.eps, *parameters, backend=self.backend)
        vectors = ops.coordinate_attention(
            e, weight, bias, self.groups, self.gn.eps, backend=self.backend
        )
        w, _, _, *statistics = ops.cross_spatial(e, *vectors, *parameters, backend=self.backend)
        if training and update:
            count = e.shape[0] * e.shape[2] * e.shape[3]
            if self.bn_statistics == "pooled":
                count *= 2 * self.groups
            update_running_statistics(attention, statistics[0], statistics[1], count)
            update_running_statistics(reduce, statistics[2], statistics[3], count)
        return w

    def _fusion_norms(self) -> tuple[Any, Any, Any]:
        return self.multi_scale_fusion[1], self.multi_scale_fusion[4], self.final_fusion[1]

    def _fusion_parameters(self, *, training: bool) -> tuple[Any, ...]:
        squeeze, expand, fusion = (
            *(self.multi_scale_fusion[0], self.multi_scale_fusion[3], self.final_fusion[0]),
        )
        norm1, norm2, norm3 = (_statistics(norm, training) for norm in self._fusion_norms())
        return squeeze.weight, *norm1, expand.weight, *norm2, fusion.weight, *norm3

    def _fuse(self, e: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        norms = self._fusion_norms()
        training: bool = norms[0].training
        parameters = self._fusion_parameters(training=training)
        save = needs_gradient(e, w, *parameters)
        flags = (training, *(norm.eps for norm in norms), save)
        out, _, _, *statistics = ops.gated_fusion(e, w, *parameters, *flags, backend=self.backend)
        if training:
            count = e.shape[0] * e.shape[2] * e.shape[3]
            for norm, mean, var in zip(norms, statistics[::2], statistics[1::2], strict=True):
                update_running_statistics(norm, mean, var, count)
        return out

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return (
            f"channels={self.channels}, groups={self.groups}, reduction={self.reduction}, "
            f"bn_statistics={self.bn_statistics!r}, backend={self.backend!r}"
        )


class FusedMSFF(FusedBlock, PublishedMSFF):
    """MSFF (spec.md 1): drop-in for the published class, same keys, shapes and initialisation.

    Args:
        stage_channels: C_i of each map.
        out_channels: C_out, the largest C_i by default.
        backend: as for FusedCIEMA.
        device: of the parameters.
        dtype: of the parameters.
    """

    fused_stages = ("msff",)
    published_parts = parts_of(PublishedMSFF((1,), device="meta"))

    def __init__(
        self,
        stage_channels: Sequence[int],
        out_channels: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(stage_channels, out_channels, device, dtype)
        self._set_backend(backend)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        stage_channels: Sequence[int] | None = None,
        backend: str | None = None,
    ) -> FusedMSFF:
        """A block that takes over the children of a published-style MSFF block."""
        from .convert import msff_from_module

        return msff_from_module(module, stage_channels, backend)

    def probe(self) -> torch.Tensor:
        """A map of one pixel with the block's channels, dtype and device, for `explain`."""
        weight: Any = self.fusion_conv[0].weight  # a Parameter, or a plain tensor in its place
        return torch.empty(1, weight.shape[1], 1, 1, dtype=weight.dtype, device=weight.device)

    def frozen_for_inference(self, dtype: torch.dtype | None) -> nn.Module | str:
        """The frozen form of this private copy, or why there is none."""
        from .frozen import FrozenMSFF

        return self._frozen_as(FrozenMSFF, dtype)

    def forward(self, features: Iterable[torch.Tensor]) -> torch.Tensor:
        """Maps (B, C_i, H_i, W_i) → (B, C_out, max H_i, max W_i), in the first map's format."""
        return self._run(features, statistics=False)[0]

    def with_statistics(
        self, features: Iterable[torch.Tensor]
    ) -> tuple[torch.Tensor, Statistics | None]:
        """As `forward`, and what `FusedCIEMA.forward` would find out by a pass over its result.

        The statistics are None where this block has to call its children one by one.
        """
        return self._run(features, statistics=True)

    def _run(
        self, features: Iterable[torch.Tensor], *, statistics: bool
    ) -> tuple[torch.Tensor, Statistics | None]:
        maps = self._checked_maps(features)
        if self._goes_modular():
            return in_autocast_dtype(PublishedMSFF.forward(self, maps), maps[0]), None
        conv: Any = self.fusion_conv[0]
        norm: Any = self.fusion_conv[1]
        training: bool = norm.training
        out, mean, var, *of_channels = ops.msff(
            *(maps, conv.weight, *_statistics(norm, training), training, norm.eps),
            statistics,
            backend=self.backend,
        )
        if training:
            count = out.shape[0] * out.shape[2] * out.shape[3]
            update_running_statistics(norm, mean, var, count)
        return out, (of_channels[0], of_channels[1], of_channels[2]) if statistics else None

    def _checked_maps(self, features: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        if isinstance(features, torch.Tensor) or not isinstance(features, Iterable):
            got = "one tensor" if isinstance(features, torch.Tensor) else type(features).__name__
            raise TypeError(f"{type(self).__name__}: features must be a list of maps, got {got}")
        features = list(features)
        if len(features) == 0:
            raise ValueError(
                f"{type(self).__name__}: features is empty, at least one map is needed"
            )
        for index, feature in enumerate(features):
            check_map(type(self).__name__, f"features[{index}]", feature)
        if self.stage_channels is not None:
            channels = [f.shape[1] for f in features]
            if channels != list(self.stage_channels):
                raise ValueError(
                    f"FusedMSFF: features have {channels} channels, this block was built for "
                    f"stage_channels={list(self.stage_channels)}"
                )
        return features

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return (
            f"stage_channels={self.stage_channels}, out_channels={self.out_channels}, "
            f"backend={self.backend!r}"
        )
