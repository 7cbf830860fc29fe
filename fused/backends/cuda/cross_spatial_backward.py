"""cross_spatial's backward on CUDA, thirteen launches: the forward again, then its gradients.

Nothing but e, vectors and w was saved. The maths is told in csrc/cuda/cross_spatial_backward*.cuh.
"""

from __future__ import annotations

import torch

from ...contract import memory_format
from ..maps import readable
from .cross_spatial_training import Stage, branches, pack
from .launch import floats, geometry
from .parameter_sums import sum_partials

# Blocks that walk all rows for a weight's gradient, each with a row of partial results.
WALKERS = 128
POINTS = 64  # pixels of a step of the pointwise products
GATE_SUMS, GRADIENT_VECTORS = 5, 4


class _Backward:
    """The scratch and the launches of one backward, in order."""

    def __init__(
        self,
        stage: Stage,
        norms: dict[str, torch.Tensor],
        gate: dict[str, torch.Tensor],
        packed: dict[str, torch.Tensor],
        sheets: torch.Tensor,
        numbers: dict[str, int | float],
    ) -> None:
        self.stage, self.norms, self.gate, self.numbers = stage, norms, gate, numbers
        self.packed = {"packed": packed["packed"]}
        self.counters = {"counters": packed["counters"]}
        self.sheets, self.rows = sheets, 2 * stage.slabs
        self.features, self.reduced = stage.sheet(self.rows, 3), stage.sheet(self.rows)
        self.vectors = stage.floats(self.rows, GRADIENT_VECTORS, stage.padded)

    def launch(
        self,
        entry: str,
        reads: dict[str, torch.Tensor],
        writes: dict[str, torch.Tensor],
        updates: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Launch with what most kernels read."""
        common = {**self.packed, **self.norms, **self.gate}
        self.stage.launch(entry, {**common, **reads}, writes, updates, self.numbers)

    def through_gate(self, of_gate: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """f and R again; y's gradient as vectors. Returns T0, T1 of R's norm; partials (G, …)."""
        stage, c = self.stage, self.stage.c
        sums = stage.partials(GATE_SUMS, stage.padded)
        maps = {"features": self.features, "reduced": self.reduced}
        self.launch("recompute", {"sheets": self.sheets}, {**maps, "sums": sums})
        totals = stage.floats(stage.groups, 2, 2, stage.padded)
        partials = stage.floats(stage.groups, 2 * c + c * c + 1)
        results = {"reduce_totals": totals, "group_partials": partials}
        self.launch(
            "vectors", {"sums": sums, **of_gate}, {"gradient_vectors": self.vectors, **results}
        )
        return totals, partials

    def through_attention(
        self, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """f's gradient; T0, T1 of A's norm (sets, 6c), partials of Wr and of Wa."""
        stage = self.stage
        weighted = torch.empty_like(self.features)
        norm_sums = stage.partials(6 * stage.padded)
        of_norm = stage.floats(stage.sets, 6 * stage.c)
        self.launch(
            "attention_backward",
            {
                **{"features": self.features, "gradient_vectors": self.vectors},
                "reduce_totals": totals,
            },
            {"weighted": weighted, "norm_sums": norm_sums, "attention_totals": of_norm},
            {"reduced": self.reduced, **self.counters},
        )
        of_reduce = self.pointwise(weighted, self.reduced, 1)
        grad_features = torch.empty_like(self.features)
        self.launch(
            "features_backward",
            {"features": self.features, "reduced": self.reduced, "attention_totals": of_norm},
            {"weighted": weighted, "grad_features": grad_features},
        )
        return grad_features, of_norm, of_reduce, self.pointwise(self.features, weighted, 3)

    def pointwise(
        self, inputs: torch.Tensor, gradients: torch.Tensor, gradient_parts: int
    ) -> torch.Tensor:
        """Partials (…, parts·c·3c) of a 1×1 convolution of three parts."""
        stage = self.stage
        walkers = min(WALKERS, -(-self.rows * stage.pixels // POINTS))
        splits = 128 // stage.padded  # of a block's pixels
        partials = stage.floats(walkers * splits, gradient_parts * 3 * stage.c**2)
        stage.launch(
            *("pointwise", {"inputs": inputs, "gradients": gradients}, {"partials": partials}),
            numbers={"rows": self.rows, "walkers": walkers, "gradient_parts": gradient_parts},
        )
        return partials

    def through_convolutions(self, grad_features: torch.Tensor) -> torch.Tensor:
        """Gradient of X."""
        grad_sheets = self.stage.sheet(self.rows)
        reads = {"grad_features": grad_features, "gradient_vectors": self.vectors}
        self.launch("inputs_backward", reads, {"grad_sheets": grad_sheets})
        return grad_sheets

    def through_branches(
        self,
        grad_sheets: torch.Tensor,
        vectors: dict[str, torch.Tensor],
        grad_e: torch.Tensor,
        grad_vectors: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Fill the gradients of e and its vectors; partials (slabs, 3c) of γ, β and b3."""
        stage = self.stage
        partials = stage.floats(stage.slabs, 3 * stage.c)
        stage.launch(
            "branches_backward",
            {"e": stage.e, "grad_sheets": grad_sheets, **self.packed, **vectors},
            {"grad_e": grad_e, **grad_vectors, "partials": partials},
            numbers={**geometry("e", stage.e), **geometry("grad", grad_e)},
        )
        return partials

    def taps(self, inputs: torch.Tensor, gradients: torch.Tensor, network: bool) -> torch.Tensor:
        """Partials of the network's convolutions (…, 35·c·c) or the map's (…, 9·c·c), by tap."""
        stage, rows = self.stage, inputs.shape[0]
        walkers = min(WALKERS, rows * stage.tiles)
        partials = stage.floats(walkers, (35 if network else 9) * stage.c**2)
        stage.launch(
            *("taps", {"inputs": inputs, "gradients": gradients}, {"partials": partials}),
            numbers={
                **{"rows": rows, "walkers": walkers},
                **{"network": int(network), "gradient_parts": 1},
            },
        )
        return partials


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
    per_group = training and bn_statistics == "sequential"
    stage = Stage(readable(e), groups, per_group)
    statistics: tuple[torch.Tensor | None, ...] = (
        (attention_mean, attention_var, reduce_mean, reduce_var)
        if training
        # The contract refuses evaluation without running statistics.
        else (
            *(attention_running_mean, attention_running_var),
            *(reduce_running_mean, reduce_running_var),
        )
    )
    names = ("attention_mean", "attention_var", "reduce_mean", "reduce_var")
    norms = {name: floats(s) for name, s in zip(names, statistics, strict=True) if s is not None}
    norms |= {
        "attention_weight": floats(attention_bn_weight),
        "attention_bias": floats(attention_bn_bias),
        **{"reduce_weight": floats(reduce_bn_weight), "reduce_bias": floats(reduce_bn_bias)},
    }
    packed = pack(
        stage,
        {
            **{"gn_weight": gn_weight, "gn_bias": gn_bias},
            **{"conv3x3_weight": conv3x3_weight, "conv3x3_bias": conv3x3_bias},
            "spatial_conv1_weight": spatial_conv1_weight,
            "spatial_conv3_weight": spatial_conv3_weight,
            "spatial_conv5_weight": spatial_conv5_weight,
            **{"attention_weight": attention_weight, "reduce_weight": reduce_weight},
            **{"channel_feat_weight": channel_feat_weight, "alpha": alpha},
        },
        backward=True,
    )
    vectors = {"alpha_h": alpha_h, "alpha_w": alpha_w, "mean": mean, "rstd": rstd}
    vectors = {name: floats(v) for name, v in vectors.items()}
    sheets = branches(stage, packed, vectors, copies_e=True)
    gate = {"grad_w": grad_w.to(e.dtype).contiguous(), "w": w.contiguous()}
    sets_of_values = 1 if per_group else 2 * groups
    run = _Backward(
        *(stage, norms, gate, packed, sheets),
        {
            **{"batch_statistics": int(training)},
            "count": e.shape[0] * stage.pixels * sets_of_values,
            **{"attention_eps": float(attention_eps), "reduce_eps": float(reduce_eps)},
        },
    )
    totals, of_gate = run.through_gate(
        {
            **{"softmax1": floats(softmax1), "softmax2": floats(softmax2)},
            **{"channel_feat": floats(channel_feat_weight), "alpha": floats(alpha)},
        }
    )
    grad_features, of_norm, of_reduce, of_attention = run.through_attention(totals)
    grad_sheets = run.through_convolutions(grad_features)
    grad_vectors = {f"grad_{name}": torch.empty_like(v) for name, v in vectors.items()}
    vectors["gn_weight"] = floats(gn_weight)
    of_branches = run.through_branches(grad_sheets, vectors, grad_e, grad_vectors)
    of_network = run.taps(sheets[: 2 * stage.slabs], grad_features, True)
    of_map = run.taps(sheets[2 * stage.slabs :], grad_sheets[stage.slabs :], False)
    # In the op's order: the partial sums of every parameter and their first column.
    c = stage.c
    columns = (
        *((gn_weight, of_branches, 0), (gn_bias, of_branches, c)),
        *((conv3x3_weight, of_map, 0), (conv3x3_bias, of_branches, 2 * c)),
        *((spatial_conv1_weight, of_network, 34 * c * c),),
        *((spatial_conv3_weight, of_network, 25 * c * c), (spatial_conv5_weight, of_network, 0)),
        *((attention_weight, of_attention, 0), (attention_bn_weight, of_norm, 3 * c)),
        *((attention_bn_bias, of_norm, 0), (reduce_weight, of_reduce, 0)),
        *((reduce_bn_weight, of_gate, 0), (reduce_bn_bias, of_gate, c)),
        *((channel_feat_weight, of_gate, 2 * c), (alpha, of_gate, 2 * c + c * c)),
    )
    grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p, _, _ in columns]
    parts = zip(columns, grads, strict=True)
    sum_partials(
        [(partials, first, grad) for (_, partials, first), grad in parts],
        taps=[p.shape[2] * p.shape[3] if p.dim() == 4 else 1 for p, _, _ in columns],
    )
    return (grad_e, *grad_vectors.values(), *grads)
