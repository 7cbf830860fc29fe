"""Block sizes, warps and stages of every kernel: one table, chosen by dtype, architecture, shape.

A kernel's candidates stand in order of preference; the first that fits the device's shared memory
and the map's size is taken. FUSED_TRITON_AUTOTUNE=1 times the fitting candidates instead and keeps
the winner in a file (`autotune.py`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel.

    Attributes:
        blocks: the kernel's `BLOCK_*` arguments.
        num_warps: warps of a program (of 32 threads; AMD's are counted likewise by Triton).
        num_stages: depth of the software pipeline of its loads.
        shared_bytes: shared memory that a block of the device must offer.
        fp_fusion: whether a product and a sum may become one rounding.
        pixels: least number of pixels of a map for which it pays.
        registers: of a thread at most, on NVIDIA; 0 leaves it to the compiler, which spills a few
            to admit more warps where it thinks that pays.
    """

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    shared_bytes: int = 0
    fp_fusion: bool = True
    pixels: int = 0
    registers: int = 0


Candidates = tuple[Config, ...]
# (kernel, "half" or "single") → candidates; "single" is float32.
TABLE: dict[tuple[str, str], Candidates] = {}


def _add(kernel: str, half: Candidates, single: Candidates | None = None) -> None:
    TABLE[kernel, "half"] = half
    TABLE[kernel, "single"] = half if single is None else single


# ------------------------------------------------------------- coordinate_attention, cross_spatial

# AMD offers 64 KiB, and its compiler spills the large tiles: this keeps a candidate to NVIDIA.
_NVIDIA = 65 * 1024

_add(
    "coordinate_attention_forward_kernel",
    (
        Config({"BLOCK_W": 32}, 8, 2, fp_fusion=False),
        Config({"BLOCK_W": 16}, 4, 2, fp_fusion=False, registers=128),
    ),
)
_add(
    "coordinate_attention_backward_kernel",
    (
        Config({"BLOCK_W": 32}, 8, 2, fp_fusion=False),
        Config({"BLOCK_W": 16}, 4, 2, fp_fusion=False),
    ),
)
_add("sum_partials_kernel", (Config({"BLOCK_N": 256}, 4, 1),))
_add("cross_spatial_pack_kernel", (Config({"BLOCK_N": 256}, 4, 1),))
# Three float32 features of a tile fill the registers, so "single" has small tiles.
_add(
    "cross_spatial_forward_kernel",
    (Config({"BLOCK_P": 128}, 8, 2, shared_bytes=_NVIDIA), Config({"BLOCK_P": 64}, 8, 1)),
    (Config({"BLOCK_P": 16}, 4, 1),),
)
_add(
    "cross_spatial_features_kernel",
    (Config({"BLOCK_P": 128}, 8, 3, shared_bytes=_NVIDIA), Config({"BLOCK_P": 64}, 8, 1)),
    (Config({"BLOCK_P": 16}, 4, 1),),
)
_add(
    "cross_spatial_recompute_kernel",
    (Config({"BLOCK_P": 128}, 8, 2, shared_bytes=_NVIDIA), Config({"BLOCK_P": 32}, 8, 1)),
    (Config({"BLOCK_P": 16}, 4, 1),),
)
_add(
    "cross_spatial_reduce_kernel",
    (
        Config({"BLOCK_P": 64, "BLOCK_R": 16}, 8, 2, shared_bytes=_NVIDIA),
        Config({"BLOCK_P": 16, "BLOCK_R": 16}, 4, 1),
    ),
    (Config({"BLOCK_P": 16, "BLOCK_R": 16}, 4, 2),),
)
_add(
    "cross_spatial_branches_kernel",
    (Config({"BLOCK_P": 128}, 8, 3), Config({"BLOCK_P": 64}, 4, 2)),
    (Config({"BLOCK_P": 32}, 4, 2),),
)
_add(
    "cross_spatial_inputs_backward_kernel",
    (Config({"BLOCK_P": 128}, 4, 3), Config({"BLOCK_P": 64}, 4, 2)),
    (Config({"BLOCK_P": 64}, 4, 2), Config({"BLOCK_P": 32}, 4, 2)),
)
_add(
    "cross_spatial_convolutions_backward_kernel",
    (Config({"BLOCK_P": 128}, 4, 3, shared_bytes=_NVIDIA), Config({"BLOCK_P": 64}, 4, 2)),
    (Config({"BLOCK_P": 32}, 4, 2),),
)
_add("cross_spatial_vectors_kernel", (Config({}, 4, 1),))
_add(
    "cross_spatial_attention_backward_kernel",
    (
        Config({"BLOCK_P": 128}, 8, 2, shared_bytes=_NVIDIA),
        Config({"BLOCK_P": 64}, 4, 2, registers=255),
    ),
    (Config({"BLOCK_P": 32}, 8, 2, shared_bytes=_NVIDIA), Config({"BLOCK_P": 16}, 4, 1)),
)
_add(
    "cross_spatial_features_backward_kernel",
    (Config({"BLOCK_P": 128}, 8, 2, shared_bytes=_NVIDIA), Config({"BLOCK_P": 32}, 8, 1)),
    (Config({"BLOCK_P": 16}, 8, 1),),
)
_add(
    "cross_spatial_branches_backward_kernel",
    (Config({"BLOCK_W": 32}, 4, 2),),
    (Config({"BLOCK_W": 32}, 8, 2),),
)
_add("cross_spatial_gate_kernel", (Config({"BLOCK_P": 128, "BLOCK_R": 16}, 4, 1),))

# -------------------------------------------------------- channel_statistics, channel_interaction

_add(
    "channel_statistics_forward_kernel",
    (Config({"BLOCK_C": 16, "BLOCK_P": 256, "BLOCK_HIDDEN": 64}, 8),),
    (Config({"BLOCK_C": 8, "BLOCK_P": 256, "BLOCK_HIDDEN": 64}, 8),),
)
_add(
    "channel_statistics_backward_kernel",
    (Config({"BLOCK_C": 32, "BLOCK_P": 128}),),
    (Config({"BLOCK_C": 32, "BLOCK_P": 64}),),
)
# Float32 weights of a half-precision map take the most shared memory: two stages of them.
_POINTWISE = (
    Config(
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, 8, 3, shared_bytes=96 * 1024, pixels=1024
    ),
    Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64}, 4, 3),
)
_POINTWISE_SINGLE = (
    Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16}, 8, 2, pixels=1024),
    Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, 4, 3),
)


def _with(candidates: Candidates, **blocks: int) -> Candidates:
    return tuple(replace(c, blocks={**c.blocks, **blocks}) for c in candidates)


_WIDE = Config(
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 8, 3, shared_bytes=120 * 1024, pixels=2048
)
_add(
    "channel_interaction_forward_kernel",
    (
        *_with((_WIDE,), BLOCK_HIDDEN=32, BLOCK_TILES=32),
        *_with(
            (_POINTWISE[0], replace(_POINTWISE[1], num_warps=8)), BLOCK_HIDDEN=64, BLOCK_TILES=32
        ),
    ),
    _with(_POINTWISE_SINGLE, BLOCK_HIDDEN=32, BLOCK_TILES=32),
)
_add("channel_interaction_outer_kernel", _POINTWISE, _POINTWISE_SINGLE)
_add(
    "channel_interaction_backward_kernel",
    _with((_WIDE, _POINTWISE[0], replace(_POINTWISE[1], num_warps=8)), BLOCK_HIDDEN=16),
    _with(_POINTWISE_SINGLE, BLOCK_HIDDEN=16),
)
_add(
    "channel_interaction_hidden_kernel",
    (Config({"BLOCK_C": 128, "BLOCK_HIDDEN": 16, "BLOCK_TILES": 16}),),
)

# -------------------------------------------------------------------------------------------- msff

_POINTWISE_SINGLE = (
    Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16}, 8, 2, pixels=1024),
    Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, 4, 3),
)
_add(
    "msff_product_kernel",
    (
        Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 64}, 8, 3, 80 * 1024, True, 1024, 192),
        Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64}, 8, 3),
    ),
    (_POINTWISE_SINGLE[0], replace(_POINTWISE_SINGLE[1], registers=168)),
)
_add(
    "msff_weight_kernel",
    (_POINTWISE[0], replace(_POINTWISE[1], registers=168)),
    _POINTWISE_SINGLE,
)
for _kernel in ("forward", "backward"):
    _add(  # four neighbours of every small map are in flight: tiles for a few values a thread
        f"msff_{_kernel}_kernel",
        (
            Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, 8, 3, _NVIDIA, True, 1024, 240),
            Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64}, 8, 3),
        ),
        (
            Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 8, 2, pixels=1024),
            Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 2),
        ),
    )
for _kernel in ("moments", "sums"):
    _add(f"msff_{_kernel}_kernel", (Config({"BLOCK_C": 16, "BLOCK_PARTS": 64}),))
_add("msff_statistics_kernel", (Config({"BLOCK_C": 16, "BLOCK_TILES": 64}, 4, 1),))
_add(
    "msff_resize_backward_kernel",
    (Config({"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 64}, 8),),
    (Config({"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 32}),),
)

# ------------------------------------------------------------------------------------ gated_fusion

_LARGE = {"BLOCK_P": 128, "BLOCK_O": 128, "BLOCK_K": 32}
_SMALL = {"BLOCK_P": 64, "BLOCK_O": 64, "BLOCK_K": 32}
_SINGLE = (Config({**_SMALL, "BLOCK_K": 16}, 8, 2),)
# Four warps of AMD's lack registers for the backward's tile of 64 by 64: the narrow one is theirs.
_SMALL_BACKWARD = (
    Config(_SMALL, 4, 3, shared_bytes=_NVIDIA),
    Config({**_SMALL, "BLOCK_O": 32}, 4, 3),
)
for _kernel in ("fold", "gate", "hidden", "logits", "grad_expanded", "grad_hidden"):
    _small = (Config(_SMALL, 4, 4 if _kernel == "logits" else 3),)
    _add(
        f"gated_fusion_{_kernel}_kernel",
        (
            Config(_LARGE, 8, 4, shared_bytes=96 * 1024, pixels=3072),
            *(_SMALL_BACKWARD if _kernel == "grad_hidden" else _small),
        ),
        _SINGLE,
    )
_add(
    "gated_fusion_expand_kernel",
    (
        Config({**_LARGE, "BLOCK_P": 64}, 8, 3, shared_bytes=96 * 1024, pixels=3072),
        Config(_SMALL, 8, 3),
    ),
    _SINGLE,
)
_add(  # its epilogue holds five tiles
    "gated_fusion_grad_input_kernel",
    (
        Config({**_LARGE, "BLOCK_O": 64}, 8, 4, shared_bytes=96 * 1024, pixels=3072),
        *_SMALL_BACKWARD,
    ),
    _SINGLE,
)
_MERGE = {"BLOCK_C": 16, "BLOCK_ROWS": 32}
_add("gated_fusion_norm_kernel", (Config({**_MERGE, "BLOCK_N": 1024}, 4, 2),))
for _kernel in ("mean", "grad_norm"):
    _add(f"gated_fusion_{_kernel}_kernel", (Config(_MERGE, 4, 2),))
_WALK = {"BLOCK_P": 64, "BLOCK_C": 32}
_add("gated_fusion_sums_kernel", (Config({**_WALK, "BLOCK_N": 1024}, 4, 2),))
for _kernel in ("out", "grad_logits"):
    _add(f"gated_fusion_{_kernel}_kernel", (Config({**_WALK, "BLOCK_ROWS": 16}, 4, 2),))
_add(
    "gated_fusion_weights_kernel",
    (
        Config({"BLOCK_P": 32, "BLOCK_I": 128, "BLOCK_O": 128}, 8, 3, shared_bytes=96 * 1024),
        Config({"BLOCK_P": 32, "BLOCK_I": 64, "BLOCK_O": 64}, 4, 2),
    ),
    (Config({"BLOCK_P": 16, "BLOCK_I": 64, "BLOCK_O": 64}, 8, 2),),
)
_add("gated_fusion_reduce_kernel", (Config({"BLOCK_N": 1024}, 4, 2),))

_forced: list[int] = []


def precision_class(dtype: torch.dtype) -> str:
    """Row of the table: "single" for float32, "half" for float16 and bfloat16."""
    return "single" if dtype == torch.float32 else "half"


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one block may ask for; a CPU (interpreter) offers the smallest GPU's."""
    if device.type != "cuda":
        return 64 * 1024
    properties = torch.cuda.get_device_properties(device)
    # ROCm knows no larger limit that a kernel could ask for; its 64 KiB are what there is.
    return int(getattr(properties, "shared_memory_per_block_optin", 64 * 1024))


def choose(kernel: str, x: torch.Tensor, pixels: int) -> Config:
    """The configuration of `kernel` for maps like `x` with `pixels` pixels each."""
    candidates = TABLE[kernel, precision_class(x.dtype)]
    if _forced:
        return candidates[_forced[-1] % len(candidates)]
    room = shared_bytes(x.device)
    for config in candidates:
        if config.shared_bytes <= room and config.pixels <= pixels:
            return config
    return candidates[-1]


@contextlib.contextmanager
def forced(index: int) -> Iterator[None]:
    """Take candidate `index` (modulo their number) of every kernel: tests go through all."""
    _forced.append(index)
    try:
        yield
    finally:
        _forced.pop()
