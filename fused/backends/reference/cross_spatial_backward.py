"""Backward of cross_spatial: every map of a block is recomputed from e and the saved vectors."""

from __future__ import annotations

import torch

from ...contract import memory_format, product_dtype, statistics_dtype
from . import normalisation
from .blocks import Block, assemble, blocks
from .cross_spatial import (
    BlockInput,
    Maps,
    Network,
    Statistics,
    column,
    constant,
    run_network,
    statistics_dims,
)
from .products import convolve_input_backward, convolve_weight_backward, library_layout

Gradients = dict[str, torch.Tensor]


def _sets(statistic: torch.Tensor, block: Block, groups: int) -> torch.Tensor:
    """Saved statistics (n, c) → those of a block, broadcast over (2, b, g, c, H, W)."""
    if statistic.shape[0] == 1:
        return statistic[None, None, :, :, None, None]
    per_group = statistic.reshape(groups, 2, -1)[block.groups].transpose(0, 1)
    return per_group[:, None, :, :, None, None]


def _cross_attention_backward(
    grad_w: torch.Tensor,
    w: torch.Tensor,
    softmax1: torch.Tensor,
    softmax2: torch.Tensor,
    y: torch.Tensor,
) -> torch.Tensor:
    """Gradient for y (2, b, g, c, H, W) from that of w (b, g, H, W)."""
    grad_logits = grad_w * w * (1 - w)
    pixels = y.shape[4] * y.shape[5]
    grads = []
    for own, other, own_y_other in ((softmax1, softmax2, y[1]), (softmax2, softmax1, y[0])):
        grad_softmax = torch.einsum("bghw,bgchw->bgc", grad_logits, own_y_other)
        inner = (own * grad_softmax).sum(2, keepdim=True)
        grad_mean = own * (grad_softmax - inner) / pixels
        direct = other[..., None, None] * grad_logits[:, :, None]
        grads.append(direct + grad_mean[..., None, None])
    return torch.stack(grads)


def _network_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    maps: Maps,
    net: Network,
    dims: tuple[int, ...] | None,
    eps: tuple[float, float],
    grads: Gradients,
) -> torch.Tensor:
    """Gradient for x; those of the network's parameters are added to `grads`."""
    dtype, product, over = grad_y.dtype, product_dtype(x), (0, 1, 2, 4, 5)
    flat = x.flatten(0, 2)
    grads["alpha"] += (grad_y * maps.channel_feat).sum()
    grad_feat = (grad_y * net.alpha.to(dtype)).flatten(0, 2).to(product)
    grads["channel_feat_weight"] += convolve_weight_backward(grad_feat, flat, 1)
    grad_x = convolve_input_backward(grad_feat, net.channel_feat_weight).to(dtype)

    mean, var = maps.reduce_statistics
    n = normalisation.normalised(maps.reduced, mean, var, eps[1])
    grads["reduce_bn_weight"] += (grad_y * n).sum(over)
    grads["reduce_bn_bias"] += grad_y.sum(over)
    gamma = column(net.reduce_bn_weight, dtype)
    grad_reduced = normalisation.backward(grad_y, n, var, gamma, eps[1], dims)
    grad_reduced = grad_reduced.flatten(0, 2).to(product)
    attention = maps.attention.flatten(0, 2)
    weighted = (attention * maps.features).to(product)
    grads["reduce_weight"] += convolve_weight_backward(grad_reduced, weighted, 1)
    grad_weighted = convolve_input_backward(grad_reduced, net.reduce_weight).to(dtype)

    grad_attention = grad_weighted * maps.features * attention * (1 - attention)
    grad_attention = grad_attention.reshape(maps.attention.shape)
    mean, var = maps.attention_statistics
    n = normalisation.normalised(maps.attention_logits, mean, var, eps[0])
    grads["attention_bn_weight"] += (grad_attention * n).sum(over)
    grads["attention_bn_bias"] += grad_attention.sum(over)
    gamma = column(net.attention_bn_weight, dtype)
    grad_logits = normalisation.backward(grad_attention, n, var, gamma, eps[0], dims)
    grad_logits = grad_logits.flatten(0, 2).to(product)
    grads["attention_weight"] += convolve_weight_backward(grad_logits, maps.features, 1)
    grad_features = grad_weighted * attention
    grad_features = grad_features + convolve_input_backward(grad_logits, net.attention_weight)

    names = ("spatial_conv1_weight", "spatial_conv3_weight", "spatial_conv5_weight")
    for name, part in zip(names, grad_features.to(product).chunk(3, 1), strict=True):
        kernel = getattr(net, name)
        grads[name] += convolve_weight_backward(part, flat, kernel.shape[-1])
        grad_x = grad_x + convolve_input_backward(part, kernel)
    return grad_x.reshape(x.shape)


def _branches_backward(
    grad_x: torch.Tensor, part: BlockInput, conv3x3_weight: torch.Tensor, grads: Gradients
) -> tuple[torch.Tensor, ...]:
    """Gradients of a block for e, alpha_h, alpha_w, mean and rstd."""
    size = conv3x3_weight.shape[0]
    slabs = library_layout(part.e.reshape(-1, size, *part.e.shape[2:]))
    grad_x2 = grad_x[1].flatten(0, 1).to(product_dtype(part.e))
    grads["conv3x3_weight"] += convolve_weight_backward(grad_x2, slabs, 3)
    grads["conv3x3_bias"] += grad_x[1].sum((0, 1, 3, 4))
    grad_e = convolve_input_backward(grad_x2, conv3x3_weight).reshape(part.e.shape)

    grad_x1 = grad_x[0].reshape(part.e.shape)
    values = part.e.to(grad_x1.dtype)
    centred = values * part.alpha_h * part.alpha_w - part.mean
    per_channel = (grad_x1 * centred).sum((2, 3))
    rstd, total = part.rstd[:, :, 0, 0], grad_x1.sum((2, 3))
    grads["gn_weight"] += (per_channel * rstd).reshape(-1, size).sum(0)
    grads["gn_bias"] += total.reshape(-1, size).sum(0)
    gamma = part.gn_weight[:, 0, 0]
    grad_u = grad_x1 * (part.rstd * part.gn_weight)
    through = grad_u * values
    return (
        torch.addcmul(grad_e.to(grad_u.dtype), grad_u, part.alpha_h * part.alpha_w),
        (through * part.alpha_w).sum(3),
        (through * part.alpha_h).sum(2),
        -total * gamma * rstd,
        per_channel * gamma,
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
    """Gradients for the five maps and vectors and the fifteen parameters, in the op's order."""
    dtype = statistics_dtype(e.dtype)
    net = Network(
        *(spatial_conv1_weight, spatial_conv3_weight, spatial_conv5_weight),
        *(attention_weight, attention_bn_weight, attention_bn_bias),
        *(reduce_weight, reduce_bn_weight, reduce_bn_bias, channel_feat_weight, alpha),
    )
    parameters = {
        "gn_weight": gn_weight,
        "gn_bias": gn_bias,
        "conv3x3_weight": conv3x3_weight,
        "conv3x3_bias": conv3x3_bias,
        **net._asdict(),
    }
    grads = {k: torch.zeros_like(v, dtype=dtype) for k, v in parameters.items()}
    dims, eps = statistics_dims(bn_statistics, training), (attention_eps, reduce_eps)
    pieces: list[list[tuple[Block, torch.Tensor]]] = [[], [], [], [], []]
    whole = training and bn_statistics == "pooled"
    for block in blocks(e, groups, whole_batch=training, whole=whole):
        if training:
            saved = (attention_mean, attention_var, reduce_mean, reduce_var)
            constants = [_sets(s, block, groups) for s in saved]
        else:
            running = (attention_running_mean, attention_running_var)
            constants = [constant(s, dtype) for s in running]
            constants += [constant(s, dtype) for s in (reduce_running_mean, reduce_running_var)]
        statistics = Statistics((constants[0], constants[1]), (constants[2], constants[3]), dims)
        part = BlockInput.cut(block, groups, e, alpha_h, alpha_w, mean, rstd, gn_weight, gn_bias)
        x = part.branches(conv3x3_weight, conv3x3_bias)
        maps = run_network(x, net, statistics, eps)
        span = (block.samples, block.groups)
        grad_y = _cross_attention_backward(
            *(grad_w[span].to(dtype), w[span].to(dtype)), softmax1[span], softmax2[span], maps.y
        )
        grad_x = _network_backward(grad_y, x, maps, net, dims, eps, grads)
        results = _branches_backward(grad_x, part, conv3x3_weight, grads)
        for piece, result in zip(pieces, results, strict=True):
            piece.append((block, result))
    grad_e, *vectors = (assemble(piece) for piece in pieces)
    return (
        grad_e.to(e.dtype).contiguous(memory_format=memory_format(e)),
        *vectors,
        *(grads[k].to(v.dtype) for k, v in parameters.items()),
    )
