"""The frozen backbone's convolutions: 3×3 stem, and depthwise 3×3 → pointwise 1×1 as one op.

Natively (csrc/cpu/separable.cpp) where the maps are on a CPU, else by torch with folded weights.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .contract import product_dtype
from .folding import Product


def _rounded(product: Product, dtype: torch.dtype) -> Product:
    weight, bias = product.to(dtype)
    if weight.device.type == "cpu":
        weight = weight.contiguous(memory_format=torch.channels_last)
    return Product(weight, bias)


class Stem:
    """3×3 convolution of stride 2 with ReLU: images in any layout and dtype → map of `dtype`."""

    def __init__(self, product: Product, dtype: torch.dtype) -> None:
        self.dtype = dtype
        probe = product.weight.new_empty(0, dtype=dtype)
        self.product = _rounded(product, product_dtype(probe))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, I, H, W) → (B, O, ceil(H/2), ceil(W/2)), channels_last on a CPU."""
        x = images.to(self.dtype).to(self.product.weight.dtype)
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, *self.product, stride=2, padding=1).relu_().to(self.dtype)


class Separable:
    """Depthwise 3×3, pointwise 1×1, both with folded norms; ReLU behind both, or nowhere."""

    def __init__(
        self, depthwise: Product, pointwise: Product, stride: int, relu: bool, dtype: torch.dtype
    ) -> None:
        self.stride, self.relu, self.dtype = stride, relu, dtype
        product = product_dtype(depthwise.weight.new_empty(0, dtype=dtype))
        self.depthwise, self.pointwise = _rounded(depthwise, product), _rounded(pointwise, product)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, I, H, W) → (B, O, ceil(H/stride), ceil(W/stride))."""
        weight, bias = self.depthwise
        x = x.to(weight.dtype)
        x = F.conv2d(x, weight, bias, self.stride, 1, groups=weight.shape[0])
        x = F.conv2d(x.relu_() if self.relu else x, *self.pointwise)
        return (x.relu_() if self.relu else x).to(self.dtype)
