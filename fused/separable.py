"""The frozen backbone's convolutions: 3×3 stem, and depthwise 3×3 → pointwise 1×1 as one op.

Each comes natively (csrc/cpu/separable.cpp) and in plain PyTorch with folded weights; both give
channels_last maps on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .backends import cpu, native
from .contract import product_dtype
from .folding import Product

Layer = Callable[[torch.Tensor], torch.Tensor]
Relus = tuple[bool, bool]  # behind the depthwise, and behind the pointwise convolution


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the native kernels run maps of `dtype` on `device`, else the reason."""
    if cpu.LIBRARY.error is not None:
        return cpu.LIBRARY.error
    if device.type != "cpu":
        return f"the maps are on {device.type}, the native kernels run on cpu"
    if dtype not in native.DTYPES:
        return f"{dtype} is not supported by the native kernels"
    return None


def stem(product: Product, dtype: torch.dtype, *, natively: bool) -> Layer:
    """3×3 convolution of stride 2 with ReLU: images in any layout and dtype → map of `dtype`."""
    return NativeStem(product, dtype) if natively else Stem(product, dtype)


def separable(
    depthwise: Product,
    pointwise: Product,
    stride: int,
    relus: Relus,
    dtype: torch.dtype,
    *,
    natively: bool,
) -> Layer:
    """Depthwise 3×3, pointwise 1×1, both with folded norms and, where `relus` says so, ReLU."""
    if natively:
        return NativeSeparable(depthwise, pointwise, stride, relus, dtype)
    return Separable(depthwise, pointwise, stride, relus, dtype)


# ------------------------------------------------------------------------------------------ native


def _floats(product: Product) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (O, I·k·k) and bias (O,), float32; the native kernels round where they need to."""
    weight = product.weight.flatten(1).float().contiguous()
    return weight, weight.new_zeros(len(weight)) if product.bias is None else product.bias.float()


class NativeStem:
    """See `stem`."""

    def __init__(self, product: Product, dtype: torch.dtype) -> None:
        self.dtype = dtype
        weight, self.bias = _floats(product)
        self.packed = native.kernel("separable_pack")(weight, False)
        self.kernel = native.kernel("stem")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, I, H, W) → (B, O, ceil(H/2), ceil(W/2)), channels_last."""
        images = images if images.dtype in native.DTYPES else images.to(self.dtype)
        out: torch.Tensor = self.kernel(images, self.packed, self.bias, self.dtype)
        return out


class NativeSeparable:
    """See `separable`."""

    def __init__(
        self, depthwise: Product, pointwise: Product, stride: int, relus: Relus, dtype: torch.dtype
    ) -> None:
        weight, self.depthwise_bias = _floats(depthwise)
        self.depthwise = weight.mT.contiguous()
        weight, self.bias = _floats(pointwise)
        self.packed = native.kernel("separable_pack")(weight, dtype == torch.bfloat16)
        self.kernel = native.kernel("separable_block")
        self.stride, self.relus = stride, relus

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, I, H, W) → (B, O, ceil(H/stride), ceil(W/stride)), channels_last."""
        weights = (self.depthwise, self.depthwise_bias, self.packed, self.bias)
        out: torch.Tensor = self.kernel(x, *weights, self.stride, *self.relus)
        return out


# ------------------------------------------------------------------------------------------- torch


def _rounded(product: Product, dtype: torch.dtype) -> Product:
    weight, bias = product.to(dtype)
    if weight.device.type == "cpu":
        weight = weight.contiguous(memory_format=torch.channels_last)
    return Product(weight, bias)


class Stem:
    """See `stem`."""

    def __init__(self, product: Product, dtype: torch.dtype) -> None:
        self.dtype = dtype
        probe = product.weight.new_empty(0, dtype=dtype)
        self.product = _rounded(product, product_dtype(probe))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, I, H, W) → (B, O, ceil(H/2), ceil(W/2))."""
        x = images.to(self.dtype).to(self.product.weight.dtype)
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, *self.product, stride=2, padding=1).relu_().to(self.dtype)


class Separable:
    """See `separable`."""

    def __init__(
        self, depthwise: Product, pointwise: Product, stride: int, relus: Relus, dtype: torch.dtype
    ) -> None:
        self.stride, self.relus, self.dtype = stride, relus, dtype
        product = product_dtype(depthwise.weight.new_empty(0, dtype=dtype))
        self.depthwise, self.pointwise = _rounded(depthwise, product), _rounded(pointwise, product)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, I, H, W) → (B, O, ceil(H/stride), ceil(W/stride))."""
        weight, bias = self.depthwise
        x = x.to(weight.dtype)
        x = F.conv2d(x, weight, bias, self.stride, 1, groups=weight.shape[0])
        x = F.conv2d(x.relu_() if self.relus[0] else x, *self.pointwise)
        return (x.relu_() if self.relus[1] else x).to(self.dtype)
