"""Weights in few bits: per-channel symmetric integers, restored to float32 when they are read.

A weight of two dimensions and more is stored as q with w ≈ scale·q, one float32 scale for each
index of its first dimension, |q| < 2^(bits−1), the bits of all q one after the other. Everything
else (biases, batch norms) stays as it is. Computing is done in float32 as ever; what shrinks is the
file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

SCALE_SUFFIX = ".scale"
FEWEST_BITS, MOST_BITS = 2, 8
# A scale for so many weights at least costs less than the bits that it saves.
FEWEST_WEIGHTS = 64

Tensors = dict[str, torch.Tensor]


def choose_bits(
    tensors: Mapping[str, torch.Tensor], most_bytes: int | None = None
) -> dict[str, int]:
    """Eight bits for each weight, and one less for the largest ones until they fit.

    Args:
        tensors: A network's state.
        most_bytes: What the tensors may take; None sets no limit.

    Raises:
        ValueError: They do not fit with seven bits everywhere.
    """
    bits = {
        key: MOST_BITS
        for key, value in tensors.items()
        if value.is_floating_point() and value.dim() > 1 and value.numel() >= FEWEST_WEIGHTS
    }
    if most_bytes is None:
        return bits
    for key in sorted(bits, key=lambda key: (-tensors[key].numel(), key)):
        if stored_bytes(tensors, bits) <= most_bytes:
            return bits
        bits[key] -= 1
    if stored_bytes(tensors, bits) > most_bytes:
        raise ValueError(
            f"max_bytes={most_bytes}: the weights take {stored_bytes(tensors, bits)} bytes even "
            f"with {MOST_BITS - 1} bits each"
        )
    return bits


def stored_bytes(tensors: Mapping[str, torch.Tensor], bits: Mapping[str, int]) -> int:
    """Bytes of the tensors as :func:`quantise` stores them."""
    total = 0
    for key, value in tensors.items():
        if key in bits:
            total += -(-value.numel() * bits[key] // 8) + 4 * value.shape[0]
        else:
            total += value.numel() * value.element_size()
    return total


def quantise(
    tensors: Mapping[str, torch.Tensor], bits: Mapping[str, int]
) -> tuple[Tensors, dict[str, Any]]:
    """The tensors to store, and the JSON-able record that :func:`restore` needs.

    Args:
        tensors: A network's state.
        bits: Of each weight that is to be quantised, from 2 to 8.
    """
    stored: Tensors = {}
    shapes: dict[str, list[int]] = {}
    for key, value in tensors.items():
        if key not in bits:
            stored[key] = value
            continue
        largest = 2 ** (bits[key] - 1) - 1
        rows = value.detach().to("cpu", torch.float32).flatten(1)
        scale = rows.abs().amax(1) / largest
        # A row of zeros has no scale; any will do.
        steps = torch.where(scale > 0, scale, torch.ones_like(scale))
        levels = (rows / steps[:, None]).round().clamp(-largest, largest).to(torch.int16)
        stored[key] = _pack(levels.numpy(), bits[key])
        stored[key + SCALE_SUFFIX] = steps
        shapes[key] = list(value.shape)
    return stored, {"bits": dict(bits), "shapes": shapes}


def restore(stored: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> Tensors:
    """The network's state in float32.

    Raises:
        ValueError: The record does not fit the tensors.
    """
    bits, shapes = record.get("bits"), record.get("shapes")
    if not isinstance(bits, dict) or not isinstance(shapes, dict) or set(bits) != set(shapes):
        raise ValueError("the record of the stored weights is damaged")
    scales = {key + SCALE_SUFFIX for key in bits}
    tensors: Tensors = {}
    for key, value in stored.items():
        if key in scales:
            continue
        if key in bits:
            value = _restored(key, value, stored.get(key + SCALE_SUFFIX), bits[key], shapes[key])
        tensors[key] = value
    lacking = sorted(set(bits) - set(tensors))
    if lacking:
        raise ValueError(f"{lacking[0]} is missing")
    return tensors


def _restored(
    key: str, packed: torch.Tensor, scale: torch.Tensor | None, bits: object, shape: object
) -> torch.Tensor:
    sound = (
        type(bits) is int
        and FEWEST_BITS <= bits <= MOST_BITS
        and isinstance(shape, list)
        and len(shape) > 1
        and all(type(length) is int and 0 < length < 2**31 for length in shape)
    )
    if not sound or scale is None:
        raise ValueError(f"the record of {key} is damaged")
    assert isinstance(bits, int)
    assert isinstance(shape, list)
    count = math.prod(shape)
    fits = packed.dtype == torch.uint8 and packed.dim() == 1 and scale.shape == (shape[0],)
    if not fits or packed.numel() != -(-count * bits // 8) or not scale.is_floating_point():
        raise ValueError(f"{key} does not have the size that its record says")
    levels = _unpack(packed.numpy(), bits, count).reshape(shape[0], -1)
    return (torch.from_numpy(levels).float() * scale.float()[:, None]).reshape(shape)


def _pack(levels: np.ndarray, bits: int) -> torch.Tensor:
    unsigned = (levels + 2 ** (bits - 1)).astype(np.uint8).reshape(-1, 1)
    return torch.from_numpy(np.packbits(np.unpackbits(unsigned, axis=1)[:, 8 - bits :]))


def _unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    found = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    unsigned = np.packbits(np.pad(found, ((0, 0), (8 - bits, 0))), axis=1)[:, 0]
    return unsigned.astype(np.int16) - 2 ** (bits - 1)
