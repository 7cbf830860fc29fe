"""Weights of the published network: files of another program, told from their keys."""

from __future__ import annotations

import mimetypes
import pickle
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch

# The published transforms normalise with these; data.py holds the same numbers for training.
PUBLISHED_NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PUBLISHED_INPUT_SIZE = 224
MAX_CLASSES = 100_000
_PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\0", b"MM\0*")


class CheckpointError(ValueError):
    """A file is not a checkpoint that this package can use; the message says why."""


def read_published(file: Path) -> dict[str, torch.Tensor]:
    """The weights of a published file, which is never unpickled as code.

    Raises:
        CheckpointError: It holds no plain weights; of a picture the message says so.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error says enough
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if _is_picture(file):
            raise CheckpointError(
                f"{str(file)!r} is a picture, not a checkpoint: predict takes one picture, a "
                "folder or a zip"
            ) from None
        # torch.load raises a dozen different types on damaged bytes; all mean the same to a user.
        raise CheckpointError(
            f"checkpoint {str(file)!r} is neither a safetensors file nor one of plain weights that "
            f"torch can read without running code: {why_torch_refuses(error)}"
        ) from None
    if isinstance(content, dict) and "pytorch-lightning_version" in content:
        raise CheckpointError(
            f"checkpoint {str(file)!r} is the state of a training: use best.safetensors "
            "beside it, or continue with: mobilesteelnet train --resume "
            f"{str(file.parent)!r}"
        )
    for key in ("state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"checkpoint {str(file)!r} holds a {type(content).__name__}, no weights"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"checkpoint {str(file)!r}: {key!r:.80} is a {type(value).__name__}, no weight"
            )
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(
                f"checkpoint {str(file)!r}: {key!r:.80} is sparse, quantised or without values"
            )
        if not value.is_floating_point() and not key.endswith("num_batches_tracked"):
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"checkpoint {str(file)!r}: {key!r:.80} holds {kind}, weights are real numbers"
            )
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def published_metadata(tensors: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    """What the weights of the published network tell about it, in the form of our metadata."""
    if any("cross_spatial_conv" in key for key in tensors):
        raise CheckpointError(
            f"checkpoint {name!r} is of the older published variant of CIEMA (keys with "
            "'cross_spatial_conv', no 'alpha'), a different network from that of the paper; the "
            "variant that can be read has the keys 'channel_feat', 'alpha' and 'ms_reduce'"
        )
    for key, dimensions in (("fc.weight", 2), ("initial_conv.0.weight", 4)):
        if key not in tensors or tensors[key].dim() != dimensions:
            raise CheckpointError(
                f"checkpoint {name!r} is of another network: {key!r} does not fit"
            )
    num_classes = int(tensors["fc.weight"].shape[0])
    if not 1 <= num_classes <= MAX_CLASSES:
        raise CheckpointError(f"checkpoint {name!r}: fc.weight has {num_classes} rows")
    return {
        "model": {
            "num_classes": num_classes,
            "in_channels": int(tensors["initial_conv.0.weight"].shape[1]),
            "attention": "ciema" if any(key.startswith("ciema.") for key in tensors) else "none",
            "fusion": "msff" if any(key.startswith("msff.") for key in tensors) else "none",
        },
        "classes": [f"class_{index}" for index in range(num_classes)],
        "input_size": PUBLISHED_INPUT_SIZE,
        "normalisation": {key: list(value) for key, value in PUBLISHED_NORMALISATION.items()},
        "training": {"source": "published form", "file": Path(name).name},
    }


def _is_picture(file: Path) -> bool:
    kind, _ = mimetypes.guess_type(file.name)
    with file.open("rb") as handle:
        start = handle.read(4)
    return start.startswith(_PICTURE_STARTS) or (kind or "").startswith("image/")


def why_torch_refuses(error: Exception) -> str:
    """What ``torch.load`` did not like, without its advice to run the code that a file holds."""
    text = str(error)
    if not isinstance(error, pickle.UnpicklingError) and "weights_only" not in text:
        return first_line(error)
    named = re.search(r"GLOBAL (\S+)", text)
    if named is None:
        return "it is damaged or holds something else"
    return f"it needs {named[1]}; save the network's state_dict() alone"


def first_line(error: BaseException) -> str:
    """An error on one line, with its type."""
    lines = str(error).strip().splitlines()
    shown = textwrap.shorten(lines[0], 200, placeholder=" ...") if lines else "no details"
    return f"{type(error).__name__}: {shown}"
