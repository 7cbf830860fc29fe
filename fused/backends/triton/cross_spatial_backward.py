"""Launches of cross_spatial's backward, ten: two of the forward's, and those of its own kernels.

Nothing but e, vectors and w was saved: the branches, f and R are computed again into scratch. The
maths is told in cross_spatial_gradients.py and cross_spatial_parameters.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...contract import memory_format
from . import configs
from .cross_spatial import branches, pack
from .cross_spatial_gradients import (
    cross_spatial_attention_backward_kernel,
    cross_spatial_features_backward_kernel,
    cross_spatial_inputs_backward_kernel,
)
from .cross_spatial_parameters import (
    TAP_ROWS,
    cross_spatial_branches_backward_kernel,
    cross_spatial_convolutions_backward_kernel,
)
from .cross_spatial_recompute import (
    cross_spatial_recompute_kernel,
    cross_spatial_vectors_kernel,
)
from .launch import cdiv, dot_precision, flat, launch, multiprocessors, strides
from .reduction import sum_partials

_SCRATCH = (
    *("sheets", "features", "reduced", "sums", "packed", "vectors", "totals", "partials"),
    *("grad_features", "grad_sheets", "slopes", "means"),
)


@dataclass(frozen=True)
class _Norms:
    """Parameters and statistics of the two batch norms, and how statistics were shared.

    `batch`: they are the batch's, so gradients go through them; `count` values shared a set.
    """

    attention: tuple[torch.Tensor, ...]  # weight, bias, mean, var
    reduce: tuple[torch.Tensor, ...]
    eps: tuple[float, float]
    batch: bool
    per_group: bool
    count: int


class _Backward:
    """The scratch and the launches of one backward, in order."""

    def __init__(
        self, e: torch.Tensor, groups: int, packed: torch.Tensor, sheets: torch.Tensor
    ) -> None:
        batch, channels, self.height, self.width = e.shape
        self.e, self.groups, self.packed, self.sheets = e, groups, packed, sheets
        self.c, self.slabs, self.block = channels // groups, batch * groups, packed.shape[1]
        self.pixels = self.height * self.width
        self.features = e.new_empty((2 * self.slabs, 3, self.pixels, self.block))
        self.grad_features = torch.empty_like(self.features)
        self.reduced = e.new_empty((2 * self.slabs, self.pixels, self.block))
        self.vectors = self.floats(2 * self.slabs, 4, self.block)
        self.totals = self.floats(2 * groups, 2, self.block)

    def floats(self, *shape: int) -> torch.Tensor:
        """Uninitialised float32 scratch."""
        return torch.empty(shape, dtype=torch.float32, device=self.e.device)

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constexprs: Any) -> None:
        """Launch with the stage's usual block sizes."""
        config = configs.choose(kernel.__name__, self.e, self.pixels)
        launch(
            kernel,
            grid,
            *args,
            config=config,
            scratch=_SCRATCH,
            BLOCK_C=self.block,
            **constexprs,
        )

    def through_gate(
        self,
        grad_w: torch.Tensor,
        w: torch.Tensor,
        softmaxes: tuple[torch.Tensor, torch.Tensor],
        norms: _Norms,
        alpha: torch.Tensor,
    ) -> torch.Tensor:
        """Recompute f and R; y's gradient as vectors. Returns partials (G, 2c + c·c + 1)."""
        sizes = (self.slabs, self.groups, self.height, self.width, self.c)
        sums = self.floats(2 * self.slabs, 5, self.block)
        self.launch(
            cross_spatial_recompute_kernel,
            (2 * self.slabs,),
            *(self.sheets, self.features, self.reduced, sums, self.packed, grad_w, w),
            *(*norms.attention, norms.reduce[2], *sizes, norms.eps[0]),
            PER_GROUP=norms.per_group,
            PRECISION=dot_precision(self.e),
        )
        partials = self.floats(self.groups, 2 * self.c + self.c**2 + 1)
        weight, bias, _, var = norms.reduce
        self.launch(
            cross_spatial_vectors_kernel,
            (self.groups,),
            *(sums, self.vectors, self.totals, partials, self.packed, *softmaxes),
            *(weight, bias, var, alpha, self.slabs, self.groups, self.pixels, self.c),
            norms.eps[1],
            PER_GROUP=norms.per_group,
        )
        return partials

    def through_attention(
        self, grad_w: torch.Tensor, w: torch.Tensor, norms: _Norms
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradient of f; T0 and T1 of A's norm (2·slabs, 2·3c), partials of Wr and of Wa."""
        sums = self.floats(2 * self.slabs, 6 * self.c)
        of_reduce = self.floats(2 * self.slabs, 3 * self.c**2)
        of_attention = self.floats(2 * self.slabs, 9 * self.c**2)
        sizes = (self.slabs, self.groups, self.height, self.width, self.c, norms.count)
        weight, _, *statistics = norms.reduce
        slopes, means = (self.floats(2 * self.slabs, n, self.block) for n in (12, 18))
        maps = (self.features, self.reduced)
        rest = (self.packed, grad_w, w, *norms.attention)
        common = {
            "BATCH": norms.batch,
            "PER_GROUP": norms.per_group,
            "PRECISION": dot_precision(self.e),
        }
        rows = (2 * self.slabs,)
        self.launch(
            cross_spatial_attention_backward_kernel,
            (*rows, 3),
            *(*maps, self.vectors, self.totals, slopes, sums, of_reduce, *rest),
            *(weight, *statistics, *sizes, *norms.eps),
            **common,
        )
        self.launch(
            cross_spatial_features_backward_kernel,
            (*rows, 3),
            *(*maps, slopes, sums, means, self.grad_features, of_attention, *rest),
            *(*sizes, norms.eps[0]),
            **common,
        )
        return sums, of_reduce, of_attention

    def through_convolutions(self, grad_w: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Gradient of X (2·slabs, P, BLOCK_C)."""
        config = configs.choose("cross_spatial_inputs_backward_kernel", self.e, self.pixels)
        grad_sheets = torch.empty_like(self.reduced)
        self.launch(
            cross_spatial_inputs_backward_kernel,
            (2 * self.slabs, cdiv(self.pixels, config.blocks["BLOCK_P"])),
            *(self.grad_features, grad_sheets, self.vectors, self.packed, grad_w, w),
            *(self.slabs, self.height, self.width),
            PRECISION=dot_precision(self.e),
        )
        return grad_sheets

    def through_branches(
        self,
        grad_sheets: torch.Tensor,
        vectors: list[torch.Tensor],
        grad_e: torch.Tensor,
        grad_vectors: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """Fill the gradients of e and its vectors; partials (slabs, 3c) of γ, β and b3."""
        partials = self.floats(self.slabs, 3 * self.c)
        self.launch(
            cross_spatial_branches_backward_kernel,
            (self.slabs,),
            *(self.e, grad_sheets, self.packed, *vectors, grad_e, *grad_vectors, partials),
            *(self.slabs, self.groups, self.height, self.width, self.c),
            *(*strides(self.e), *strides(grad_e)),
            PRECISION=dot_precision(self.e),
        )
        return partials

    def of_convolutions(self, grad_sheets: torch.Tensor) -> torch.Tensor:
        """Partials (shares, 44·c·c) of the four convolutions' gradients."""
        shares = min(2 * self.slabs, cdiv(4 * multiprocessors(self.e.device), TAP_ROWS))
        partials = self.floats(shares, 44 * self.c**2)
        self.launch(
            cross_spatial_convolutions_backward_kernel,
            (TAP_ROWS, shares),
            *(self.sheets, self.grad_features, grad_sheets, partials),
            *(self.slabs, self.height, self.width, self.c, shares),
            PRECISION=dot_precision(self.e),
        )
        return partials


def _norms(
    attention: tuple[torch.Tensor, torch.Tensor],
    reduce: tuple[torch.Tensor, torch.Tensor],
    saved: tuple[torch.Tensor, ...],
    running: tuple[torch.Tensor | None, ...],
    training: bool,
    bn_statistics: str,
    eps: tuple[float, float],
    values: tuple[int, int],
) -> _Norms:
    """Saved statistics in training, else running ones; `values` of a (branch, group), and sets."""
    # The contract refuses evaluation without running statistics.
    statistics = saved if training else tuple(s for s in running if s is not None)
    per_group = training and bn_statistics == "sequential"
    count = values[0] if per_group else values[0] * values[1]
    return _Norms(
        (*attention, *statistics[:2]), (*reduce, *statistics[2:]), eps, training, per_group, count
    )


def backward(
    grad_w: torch.Tensor,
    e: torch.Tensor,
    alpha_h: torch.Tensor,
    alpha_w: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    w: torch.Tensor,
    softmax1: torch.Tensor,
    softmax2: torch.Tensor,
    attention_mean: torch.Tensor,
    attention_var: torch.Tensor,
    reduce_mean: torch.Tensor,
    reduce_var: torch.Tensor,
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
    """As the reference's: gradients of e, four vectors and fifteen parameters."""
    grad_e = torch.empty_like(e, memory_format=memory_format(e))
    e, grad_w, w = flat(e), grad_w.contiguous(), w.contiguous()
    batch, channels, height, width = e.shape
    c = channels // groups
    norms = _norms(
        (attention_bn_weight, attention_bn_bias),
        (reduce_bn_weight, reduce_bn_bias),
        (attention_mean, attention_var, reduce_mean, reduce_var),
        (
            *(attention_running_mean, attention_running_var),
            *(reduce_running_mean, reduce_running_var),
        ),
        *(training, bn_statistics, (attention_eps, reduce_eps)),
        (batch * height * width, 2 * groups),
    )
    packed, _ = pack(
        *(e, groups, conv3x3_weight, spatial_conv1_weight, spatial_conv3_weight),
        *(spatial_conv5_weight, attention_weight, reduce_weight, channel_feat_weight),
    )
    vectors = [v.contiguous() for v in (alpha_h, alpha_w, mean, rstd)]
    sheets = branches(e, [*vectors, gn_weight, gn_bias, conv3x3_bias], packed, groups)
    run = _Backward(e, groups, packed, sheets)
    softmaxes = (softmax1.contiguous(), softmax2.contiguous())
    of_gate = run.through_gate(grad_w, w, softmaxes, norms, alpha)
    of_norm, of_reduce, of_attention = run.through_attention(grad_w, w, norms)
    grad_sheets = run.through_convolutions(grad_w, w)
    grad_vectors = tuple(torch.empty_like(v) for v in vectors)
    of_branches = run.through_branches(grad_sheets, [*vectors, gn_weight], grad_e, grad_vectors)
    of_kernels = run.of_convolutions(grad_sheets)
    # In the op's order: the partial sums of every parameter and their first column.
    columns = (
        *((gn_weight, of_branches, 0), (gn_bias, of_branches, c)),
        *((conv3x3_weight, of_kernels, 35 * c * c), (conv3x3_bias, of_branches, 2 * c)),
        *(
            (spatial_conv1_weight, of_kernels, 34 * c * c),
            (spatial_conv3_weight, of_kernels, 25 * c * c),
        ),
        *((spatial_conv5_weight, of_kernels, 0), (attention_weight, of_attention, 0)),
        *((attention_bn_weight, of_norm, 3 * c), (attention_bn_bias, of_norm, 0)),
        *((reduce_weight, of_reduce, 0), (reduce_bn_weight, of_gate, 0)),
        *((reduce_bn_bias, of_gate, c), (channel_feat_weight, of_gate, 2 * c)),
        (alpha, of_gate, 2 * c + c * c),
    )
    grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p, _, _ in columns]
    parts = zip(columns, grads, strict=True)
    sum_partials(e, [(partials, first, grad) for (_, partials, first), grad in parts])
    return (grad_e, *grad_vectors, *grads)
