"""The compiled libraries `fused._cpu` and `fused._cuda`: their ops' schemas, loading, and plan.

The schemas are defined here and the libraries only add implementations, so that a library that is
missing or broken costs its backend and nothing else. The libraries hold no Python module: torch
loads them, which needs neither Python headers at build time nor one build per Python.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .reference import channel_interaction

PACKAGE = Path(__file__).resolve().parents[1]
PLAN_FILE = PACKAGE / "build_plan.json"
OLDEST_TORCH = (2, 10)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_PLANE = 2**31 - 1

SCHEMAS = (
    "channel_statistics(Tensor x) -> (Tensor mean, Tensor max, Tensor argmax)",
    "channel_statistics_backward(Tensor grad_mean, Tensor grad_max, Tensor argmax, Tensor x)"
    " -> Tensor grad_x",
    "coordinate_attention_pack(Tensor weight, Tensor bias) -> Tensor",
    "coordinate_attention_packed(Tensor e, Tensor gate, int groups, float eps)"
    " -> (Tensor alpha_h, Tensor alpha_w, Tensor mean, Tensor rstd)",
    "coordinate_attention_backward(Tensor grad_alpha_h, Tensor grad_alpha_w, Tensor grad_mean,"
    " Tensor grad_rstd, Tensor e, Tensor alpha_h, Tensor alpha_w, Tensor mean, Tensor rstd,"
    " Tensor weight, int groups) -> (Tensor grad_e, Tensor grad_weight, Tensor grad_bias)",
    "cross_spatial_pack(Tensor gn_weight, Tensor gn_bias, Tensor conv3x3_weight,"
    " Tensor conv3x3_bias, Tensor spatial_conv1_weight, Tensor spatial_conv3_weight,"
    " Tensor spatial_conv5_weight, Tensor attention_weight, Tensor attention_bn_weight,"
    " Tensor attention_bn_bias, Tensor attention_running_mean, Tensor attention_running_var,"
    " Tensor reduce_weight, Tensor reduce_bn_weight, Tensor reduce_bn_bias,"
    " Tensor reduce_running_mean, Tensor reduce_running_var, Tensor channel_feat_weight,"
    " Tensor alpha, float attention_eps, float reduce_eps, int height=-1, int width=-1) -> Tensor",
    "cross_spatial_packed(Tensor e, Tensor alpha_h, Tensor alpha_w, Tensor mean, Tensor rstd,"
    " Tensor packed, int groups) -> (Tensor w, Tensor softmax1, Tensor softmax2)",
    "coordinate_cross_spatial_packed(Tensor e, Tensor gate, float eps, Tensor packed, int groups)"
    " -> Tensor w",
    "cross_spatial_train(Tensor e, Tensor alpha_h, Tensor alpha_w, Tensor mean, Tensor rstd,"
    " Tensor[] parameters, int groups, bool pooled, float attention_eps, float reduce_eps)"
    " -> (Tensor w,"
    " Tensor softmax1, Tensor softmax2, Tensor attention_mean, Tensor attention_var,"
    " Tensor reduce_mean, Tensor reduce_var)",
    "cross_spatial_backward(Tensor grad_w, Tensor e, Tensor alpha_h, Tensor alpha_w, Tensor mean,"
    " Tensor rstd, Tensor w, Tensor softmax1, Tensor softmax2, Tensor attention_mean,"
    " Tensor attention_var, Tensor reduce_mean, Tensor reduce_var, Tensor[] parameters,"
    " int groups, bool constants, bool pooled, float attention_eps, float reduce_eps)"
    " -> (Tensor grad_e,"
    " Tensor grad_alpha_h, Tensor grad_alpha_w, Tensor grad_mean, Tensor grad_rstd,"
    " Tensor grad_parameters)",
    # Products on the CPU (csrc/cpu/products.cpp). A packed weight is bytes for this processor;
    # `bfloat16` says that its maps will be, `plane` how many pixels each has. Vectors are float32,
    # maps float32, bfloat16 or float16; an output has the dtype and the memory format of the
    # first map.
    "pack_product_weight(Tensor weight, bool bfloat16, int? plane=None) -> Tensor packed",
    # act(scale * (weight x) + shift), weight (M, K) packed, x (B, K, H, W)
    "pointwise_packed(Tensor x, Tensor packed, Tensor? scale, Tensor? shift, bool relu)"
    " -> Tensor out",
    "channel_interaction_packed(Tensor x, Tensor squeeze_weight, Tensor excite_weight,"
    " Tensor interaction_packed, Tensor? x_mean=None, Tensor? x_maximum=None,"
    " Tensor? x_argmax=None)"
    " -> (Tensor e, Tensor gate, Tensor mean, Tensor maximum, Tensor argmax)",
    # batch norms as scales and shifts; mean_only: the mean of out over the pixels, float32 (B, C)
    "gated_fusion_packed(Tensor e, Tensor w, Tensor squeeze_packed, Tensor squeeze_scale,"
    " Tensor squeeze_shift, Tensor fusion_of_s_packed, Tensor fusion_of_r_packed,"
    " Tensor fusion_scale, Tensor fusion_shift, bool mean_only) -> Tensor out",
    # relu(scale * sum of up(weight_i feature_i) + shift), a packed weight for each feature
    "msff_packed(Tensor[] features, Tensor[] packed, Tensor scale, Tensor shift) -> Tensor out",
    # sum over pixels of grad x^T, float32 (B or 1, M, K); x first as it was for its product
    "product_gradient(Tensor grad, Tensor x, Tensor? gate, Tensor? scale, Tensor? shift,"
    " bool per_sample) -> Tensor out",
    # Training on the CPU (csrc/cpu/products_training.cpp): out = weight x + second_weight second +
    # bias if stored, and the moments of its rows; x times gate, relu(scale v + shift) of second, or
    # of x without one
    "product_moments(Tensor x, Tensor packed, Tensor? gate, Tensor? second,"
    " Tensor? second_packed, Tensor? scale, Tensor? shift, Tensor? bias, bool store,"
    " bool moments) -> (Tensor out, Tensor mean, Tensor var)",
    "norm_relu(Tensor z, Tensor scale, Tensor shift, Tensor like) -> Tensor out",
    "norm_relu_backward(Tensor grad, Tensor z, Tensor mean, Tensor var, Tensor weight,"
    " Tensor bias, float eps, bool training)"
    " -> (Tensor grad_z, Tensor grad_weight, Tensor grad_bias)",
    "norm_gate_backward(Tensor grad, Tensor e, Tensor w, Tensor z, Tensor mean, Tensor var,"
    " Tensor weight, Tensor bias, float eps, bool training)"
    " -> (Tensor grad_z, Tensor grad_weight, Tensor grad_bias)",
    "channel_interaction_input_backward(Tensor grad_e, Tensor gate, Tensor interaction_packed,"
    " Tensor grad_mean, Tensor grad_maximum, Tensor argmax) -> Tensor grad_x",
    "gated_fusion_apply(Tensor e, Tensor w, Tensor logits, Tensor scale, Tensor shift)"
    " -> Tensor out",
    "gated_fusion_input_backward(Tensor grad_out, Tensor e, Tensor w, Tensor logits,"
    " Tensor scale, Tensor shift, Tensor grad_logits, Tensor fusion_packed, Tensor grad_hidden,"
    " Tensor squeeze_packed) -> (Tensor grad_e, Tensor grad_w)",
    "msff_sum(Tensor[] features, Tensor[] packed, bool moments)"
    " -> (Tensor z, Tensor mean, Tensor var)",
    "separable_pack(Tensor weight, bool pairs) -> Tensor",
    "separable_block(Tensor x, Tensor depthwise, Tensor depthwise_bias, Tensor packed, Tensor bias,"
    " int stride, bool inner_relu, bool relu) -> Tensor",
    "stem(Tensor images, Tensor packed, Tensor bias, ScalarType dtype) -> Tensor",
    # the adjoint of bilinear resizing from height × width to the size of grad
    "msff_shrink(Tensor grad, int height, int width) -> Tensor out",
    # Starts an entry of csrc/cuda, see csrc/cuda/launch.h
    "launch(str entry, str names, Tensor(a!)[] buffers, int[] integers, float[] reals) -> ()",
    "cpu_isa() -> str",
    "cpu_isa_available() -> str",
)

_schemas = torch.library.Library("ciema_native", "DEF")
for _schema in SCHEMAS:
    _schemas.define(_schema)


@dataclass(frozen=True)
class NativeLibrary:
    """A compiled library after the attempt to load it.

    Attributes:
        name: "cpu" or "cuda".
        path: the file, or None if the installation has none.
        error: None if it is loaded, else why not, in the loader's words where there are any.
    """

    name: str
    path: Path | None
    error: str | None


def read_plan() -> dict[str, Any] | None:
    """What the build did (see setup.py), or None when run from a tree that was never built."""
    try:
        plan = json.loads(PLAN_FILE.read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(plan, dict) and isinstance(plan.get("skipped"), dict)
    return plan if whole else None


def is_truncated(path: Path) -> bool:
    """Whether an ELF file ends before its section table, as after a copy on a full disk.

    The loader would map it and die of SIGBUS, which no `except` can catch.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return False  # the loader refuses by itself what is no library
    (start,) = struct.unpack_from("<Q", header, 0x28)
    size, count = struct.unpack_from("<HH", header, 0x3A)
    return path.stat().st_size < start + size * count


def load(name: str) -> NativeLibrary:
    """Load `fused._<name>`; never raises, the error is in the result."""
    files = sorted(p for end in ("so", "pyd", "dll") for p in PACKAGE.glob(f"_{name}*.{end}"))
    if not files:
        plan = read_plan()
        why = plan["skipped"].get(name, "its file is gone") if plan else "no build plan"
        return NativeLibrary(name, None, f"fused._{name} is not built: {why}")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        error = f"fused._{name} needs torch >= {needed}, this is {torch.__version__}"
        return NativeLibrary(name, files[0], error)
    try:
        if is_truncated(files[0]):
            raise OSError(f"{files[0]}: file is truncated")
        torch.ops.load_library(str(files[0]))
    except (OSError, RuntimeError) as error:
        return NativeLibrary(name, files[0], f"fused._{name} does not load: {error}")
    return NativeLibrary(name, files[0], None)


def why_not(
    library: NativeLibrary,
    device: str,
    kernels: Collection[str],
    op: str,
    x: torch.Tensor,
) -> str | None:
    """None if a native kernel of `device` can run `op` on `x` (B, C, H, W), else the reason."""
    if library.error is not None:
        return library.error
    if op not in kernels:
        return f"{op} has no {library.name} kernel yet"
    if x.device.type != device:
        return f"the input is on {x.device.type}, the {library.name} kernels run on {device}"
    if x.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"{x.dtype} is not supported, the {library.name} kernels know {known}"
    if x.dim() == 4 and x.shape[2] * x.shape[3] > LARGEST_PLANE:
        return f"H*W = {x.shape[2] * x.shape[3]} is over {LARGEST_PLANE}"
    return None


def kernels() -> dict[str, Callable[..., object]]:
    """The ops that the native libraries speed up, by name; the inputs' device picks the library.

    Channel interaction is its own pass over x for the statistics; the product stays with the
    library that torch calls for it.
    """
    statistics = kernel("channel_statistics")
    backward = kernel("channel_statistics_backward")
    return {
        "channel_statistics": statistics,
        "channel_statistics_backward": backward,
        "channel_interaction": partial(channel_interaction.forward, statistics=statistics),
        "channel_interaction_backward": partial(
            channel_interaction.backward, statistics_backward=backward
        ),
    }


def kernel(name: str) -> Callable[..., Any]:
    """The native op of this name, dispatched by its inputs' device."""
    op: Callable[..., Any] = getattr(torch.ops.ciema_native, name).default
    return op
