"""The running buffers of a batch norm, from the statistics that an op returned (spec.md 3)."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def with_own_buffers(module: M) -> M:
    """A stand-in for `module` whose calls change no buffer of it: the stand-in's are copies.

    Parameters, hooks and all else are the module's. Neither the buffers themselves nor where they
    are held is written to: autograd may have saved them, and other threads may call the module.
    """
    made: dict[nn.Module, nn.Module] = {}  # a part may stand in several places

    def stand_in(part: nn.Module) -> nn.Module:
        if part not in made:
            twin = made[part] = type(part).__new__(type(part))
            twin.__dict__.update(part.__dict__)
            buffers = part._buffers.items()
            children = part._modules.items()
            twin._buffers = {k: None if b is None else b.clone() for k, b in buffers}
            twin._modules = {k: None if c is None else stand_in(c) for k, c in children}
        return made[part]

    twin: M = stand_in(module)  # type: ignore[assignment]
    return twin


def update_running_statistics(
    norm: nn.BatchNorm2d, mean: torch.Tensor, var: torch.Tensor, count: int
) -> None:
    """Update `norm` as a sequence of n calls would, each with its own statistics.

    `running ← (1−ρ)ⁿ·running + Σ_k ρ(1−ρ)^(n−k)·t_k`, or the cumulative average if the momentum ρ
    is None; `num_batches_tracked += n`.

    Args:
        norm: its buffers change in place; without running buffers nothing happens.
        mean: (n, C) means in the order of the calls, or (C,) for one call.
        var: (n, C) or (C,) biased variances.
        count: values a channel in each call; the variance enters unbiased.
    """
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    # Detached, and not under no_grad, which an exported training step could not be stored with.
    means = mean.detach().reshape(-1, norm.num_features)
    variances, unbiased = var.detach().reshape(-1, norm.num_features), count / (count - 1)
    calls, dtype = means.shape[0], means.dtype
    tracked = norm.num_batches_tracked
    if norm.momentum is None:
        if tracked is None:
            return  # PyTorch's own does nothing either
        # Cumulative average: every call of all history weighs the same.
        total = (tracked + calls).to(dtype)
        keep = tracked.to(dtype) / total
        weights = (1 / total).expand(calls)
        tracked.add_(calls)
        for running, values in (
            (norm.running_mean, means),
            (norm.running_var, variances * unbiased),
        ):
            running.copy_(running.to(dtype) * keep + weights @ values)
        return
    rho = norm.momentum
    # Made on the device: a copy from the host would wait for it, and no CUDA graph could hold it.
    weights = means.new_ones(1)
    if calls > 1:
        age = torch.arange(calls - 1, -1, -1, dtype=dtype, device=means.device)
        weights = torch.pow(1 - rho, age)
    if tracked is not None:
        tracked.add_(calls)
    for running, values, scale in (
        (norm.running_mean, means, rho),
        (norm.running_var, variances, rho * unbiased),
    ):
        rest = (1 - rho) ** calls
        if running.dtype == dtype:
            running.addmv_(values.mT, weights, beta=rest, alpha=scale)
        else:
            running.copy_(
                torch.addmv(running.to(dtype), values.mT, weights, beta=rest, alpha=scale)
            )
