"""Cross-spatial learning and cross-attention (spec.md 2.3): e and its gates → w (B, G, H, W).

Maps of a block are laid out (2 branches, samples, groups, channels, H, W); the small network sees
branches, samples and groups as one batch, its batch norms see them apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...contract import product_dtype, statistics_dtype
from . import normalisation
from .blocks import Block, assemble, blocks
from .products import convolve, library_layout


class Network(NamedTuple):
    """The weights of `cross_spatial_learning`, shared by groups and branches."""

    spatial_conv1_weight: torch.Tensor
    spatial_conv3_weight: torch.Tensor
    spatial_conv5_weight: torch.Tensor
    attention_weight: torch.Tensor
    attention_bn_weight: torch.Tensor
    attention_bn_bias: torch.Tensor
    reduce_weight: torch.Tensor
    reduce_bn_weight: torch.Tensor
    reduce_bn_bias: torch.Tensor
    channel_feat_weight: torch.Tensor
    alpha: torch.Tensor


class Statistics(NamedTuple):
    """Means and biased variances of the two batch norms, broadcast against a block's maps.

    `dims` are those over which the statistics were taken, None when they are running statistics.
    """

    attention: tuple[torch.Tensor, torch.Tensor] | None
    reduce: tuple[torch.Tensor, torch.Tensor] | None
    dims: tuple[int, ...] | None


class Maps(NamedTuple):
    """What the network computes of a block, kept while its backward runs."""

    features: torch.Tensor
    attention_logits: torch.Tensor
    attention: torch.Tensor
    reduced: torch.Tensor
    channel_feat: torch.Tensor
    y: torch.Tensor
    attention_statistics: tuple[torch.Tensor, torch.Tensor]
    reduce_statistics: tuple[torch.Tensor, torch.Tensor]


def statistics_dims(bn_statistics: str, training: bool) -> tuple[int, ...] | None:
    """Dimensions of (branch, sample, group, channel, H, W) that share one set of statistics."""
    if not training:
        return None
    return (1, 4, 5) if bn_statistics == "sequential" else (0, 1, 2, 4, 5)


def column(vector: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(c,) → broadcast along (branch, sample, group, c, H, W)."""
    return vector.to(dtype)[:, None, None]


def constant(vector: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A running statistic (c,) → broadcast along (branch, sample, group, c, H, W)."""
    assert vector is not None  # the contract refuses evaluation without running statistics
    return column(vector, dtype)[None, None, None]


def run_network(
    x: torch.Tensor, net: Network, statistics: Statistics, eps: tuple[float, float]
) -> Maps:
    """Run the shared network on x (2, b, g, c, H, W); spec.md 2.3 up to y."""
    dtype = statistics_dtype(x.dtype)
    lead, spatial = x.shape[:3], x.shape[4:]
    flat = x.flatten(0, 2)
    kernels = (net.spatial_conv1_weight, net.spatial_conv3_weight, net.spatial_conv5_weight)
    features = torch.cat([convolve(flat, kernel) for kernel in kernels], 1)

    logits = convolve(features, net.attention_weight).to(dtype).reshape(*lead, -1, *spatial)
    attention_statistics = statistics.attention
    if attention_statistics is None:
        assert statistics.dims is not None
        attention_statistics = normalisation.batch_statistics(logits, statistics.dims)
    gamma, beta = column(net.attention_bn_weight, dtype), column(net.attention_bn_bias, dtype)
    attention = normalisation.affine(logits, *attention_statistics, gamma, beta, eps[0]).sigmoid()

    weighted = (attention.flatten(0, 2) * features).to(product_dtype(x))
    reduced = convolve(weighted, net.reduce_weight).to(dtype).reshape(*lead, -1, *spatial)
    reduce_statistics = statistics.reduce
    if reduce_statistics is None:
        assert statistics.dims is not None
        reduce_statistics = normalisation.batch_statistics(reduced, statistics.dims)
    gamma, beta = column(net.reduce_bn_weight, dtype), column(net.reduce_bn_bias, dtype)
    m = normalisation.affine(reduced, *reduce_statistics, gamma, beta, eps[1])

    channel_feat = convolve(flat, net.channel_feat_weight).to(dtype).reshape(m.shape)
    y = m + net.alpha.to(dtype) * channel_feat
    return Maps(
        *(features, logits, attention, reduced, channel_feat, y),
        *(attention_statistics, reduce_statistics),
    )


def _cross_attention(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w (b, g, H, W), and the two softmax vectors (b, g, c)."""
    softmax1, softmax2 = (branch.mean((3, 4)).softmax(2) for branch in y)
    logits = torch.einsum("bgc,bgchw->bghw", softmax1, y[1])
    logits = logits + torch.einsum("bgc,bgchw->bghw", softmax2, y[0])
    return logits.sigmoid(), softmax1, softmax2


class BlockInput(NamedTuple):
    """A block's slice of the stage's inputs, in float32 or better but for `e`."""

    e: torch.Tensor  # (b, C', H, W)
    alpha_h: torch.Tensor  # (b, C', H, 1)
    alpha_w: torch.Tensor  # (b, C', 1, W)
    mean: torch.Tensor  # (b, C', 1, 1)
    rstd: torch.Tensor
    gn_weight: torch.Tensor  # (C', 1, 1)
    gn_bias: torch.Tensor
    groups: int

    @staticmethod
    def cut(
        block: Block,
        groups: int,
        e: torch.Tensor,
        alpha_h: torch.Tensor,
        alpha_w: torch.Tensor,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        gn_weight: torch.Tensor,
        gn_bias: torch.Tensor,
    ) -> BlockInput:
        """Slice every tensor to the block's samples and channels."""
        size = e.shape[1] // groups
        span = (block.samples, slice(block.groups.start * size, block.groups.stop * size))
        members = block.groups.stop - block.groups.start
        dtype = statistics_dtype(e.dtype)
        gamma, beta = gn_weight.to(dtype).repeat(members), gn_bias.to(dtype).repeat(members)
        return BlockInput(
            e[span],
            alpha_h[span][..., None],
            alpha_w[span][:, :, None, :],
            mean[span][:, :, None, None],
            rstd[span][:, :, None, None],
            gamma[:, None, None],
            beta[:, None, None],
            members,
        )

    def branches(self, conv3x3_weight: torch.Tensor, conv3x3_bias: torch.Tensor) -> torch.Tensor:
        """x1 and x2 of spec.md 2.2 and 2.3, (2, b, g, c, H, W) in the products' dtype."""
        dtype = product_dtype(self.e)
        u = self.e.to(self.rstd.dtype) * self.alpha_h * self.alpha_w
        scale = self.rstd * self.gn_weight
        # u − mean first: rounding would leave something of a map without spread.
        x1 = torch.addcmul(self.gn_bias, u - self.mean, scale).to(dtype)
        lead, size = self.e.shape[0] * self.groups, conv3x3_weight.shape[0]
        slabs = library_layout(self.e.reshape(lead, size, *self.e.shape[2:]).to(dtype))
        x2 = convolve(slabs, conv3x3_weight, conv3x3_bias).to(dtype)
        both = library_layout(torch.cat([x1.reshape(slabs.shape), x2]))
        return both.reshape(2, self.e.shape[0], self.groups, *slabs.shape[1:])


def forward(
    e: torch.Tensor,
    alpha_h: torch.Tensor,
    alpha_w: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gn_weight: torch.Tensor,
    gn_bias: torch.Tensor,
    conv3x3_weight: torch.Tensor,
    conv3x3_bias: torch.Tensor,
    spatial_conv1_weight: torch.Tensor,
    spatial_conv3_weight: torch.Tensor,
    spatial_conv5_weight: torch.Tensor,
    attention_weight: torch.Tensor,
    attention_bn_weight: torch.Tensor,
    attention_bn_bias: torch.Tensor,
    attention_running_mean: torch.Tensor | None,
    attention_running_var: torch.Tensor | None,
    reduce_weight: torch.Tensor,
    reduce_bn_weight: torch.Tensor,
    reduce_bn_bias: torch.Tensor,
    reduce_running_mean: torch.Tensor | None,
    reduce_running_var: torch.Tensor | None,
    channel_feat_weight: torch.Tensor,
    alpha: torch.Tensor,
    groups: int,
    training: bool,
    bn_statistics: str,
    attention_eps: float,
    reduce_eps: float,
) -> tuple[torch.Tensor, ...]:
    """Return w, the softmax vectors (B, G, c), and means and biased variances of both norms.

    In training the statistics are (n, 3c) and (n, c): n = 2G in the order of the published calls
    (x1 of group 0, x2 of group 0, …) or n = 1 when pooled. In evaluation n = 0.
    """
    dtype = statistics_dtype(e.dtype)
    net = Network(
        *(spatial_conv1_weight, spatial_conv3_weight, spatial_conv5_weight),
        *(attention_weight, attention_bn_weight, attention_bn_bias),
        *(reduce_weight, reduce_bn_weight, reduce_bn_bias, channel_feat_weight, alpha),
    )
    statistics = Statistics(None, None, statistics_dims(bn_statistics, training))
    if not training:
        statistics = Statistics(
            (constant(attention_running_mean, dtype), constant(attention_running_var, dtype)),
            (constant(reduce_running_mean, dtype), constant(reduce_running_var, dtype)),
            None,
        )
    pooled = training and bn_statistics == "pooled"
    gates, softmaxes1, softmaxes2, batch_statistics = [], [], [], []
    for block in blocks(e, groups, whole_batch=training, whole=pooled):
        part = BlockInput.cut(block, groups, e, alpha_h, alpha_w, mean, rstd, gn_weight, gn_bias)
        x = part.branches(conv3x3_weight, conv3x3_bias)
        maps = run_network(x, net, statistics, (attention_eps, reduce_eps))
        w, softmax1, softmax2 = _cross_attention(maps.y)
        gates.append((block, w.to(e.dtype)))
        softmaxes1.append((block, softmax1))
        softmaxes2.append((block, softmax2))
        batch_statistics.append([*maps.attention_statistics, *maps.reduce_statistics])
    results = (assemble(gates), assemble(softmaxes1), assemble(softmaxes2))
    if not training:
        size = alpha_h.new_empty((0, e.shape[1] // groups))
        wide = alpha_h.new_empty((0, 3 * e.shape[1] // groups))
        return (*results, wide, torch.empty_like(wide), size, torch.empty_like(size))
    # (2 or 1, 1, groups or 1, c, 1, 1) of each block → (calls, c) in the published order.
    ordered = [
        torch.cat(s, 2)[:, 0, :, :, 0, 0].transpose(0, 1)
        for s in zip(*batch_statistics, strict=True)
    ]
    return (*results, *(s.flatten(0, 1).contiguous() for s in ordered))
