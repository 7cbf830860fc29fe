"""Checkpoints: one safetensors file with everything that classifying a picture needs.

The file's metadata holds one JSON text under the key ``mobilesteelnet``: the network's constructor
arguments, the class names, the input size, the normalisation and a summary of the training.
Weights of the published network (``.pth``: a plain state dict, or one under ``state_dict`` or
``model_state_dict``, with or without a ``module.`` prefix) are read too, never unpickling code.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .published import (
    MAX_CLASSES,
    CheckpointError,
    first_line,
    published_metadata,
    read_published,
)
from .quantisation import restore
from .run_folder import write_atomically

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
METADATA_KEY = "mobilesteelnet"
Store = Callable[[dict[str, torch.Tensor]], tuple[dict[str, torch.Tensor], dict[str, Any]]]
MAX_INPUT_SIZE = 8192


@dataclass
class Checkpoint:
    """A network with what is needed to use it.

    Attributes:
        model: The network, in evaluation mode, on the device asked for.
        classes: Class names in the order of the logits.
        input_size: Height and width in pixels that pictures are resized to.
        normalisation: ``{"mean": [3 floats], "std": [3 floats]}`` on pixels in 0..1.
        training: Summary of the training (epoch, validation figures, options); may be empty.
        named_classes: False when the file holds no class names and they are ``class_0``, ....
        temperature: What logits are divided by before the softmax, so that probabilities say how
            often the network is right (see :func:`mobilesteelnet.calibration.fit_temperature`).
    """

    model: nn.Module
    classes: list[str]
    input_size: int
    normalisation: dict[str, list[float]]
    training: dict[str, Any] = field(default_factory=dict)
    named_classes: bool = True
    temperature: float = 1.0

    def frozen(self, dtype: torch.dtype | None = None) -> Checkpoint:
        """The same with the frozen, fastest form of the network (fused.optimize_for_inference).

        A network that has none, as those of the paper's table 4, stays as it is.
        """
        from fused import optimize_for_inference
        from fused.inference import NothingToFreezeError

        try:
            return replace(self, model=optimize_for_inference(self.model, dtype))
        except NothingToFreezeError:
            return self


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    classes: list[str],
    input_size: int,
    normalisation: dict[str, list[float]],
    training: dict[str, Any],
    temperature: float = 1.0,
    store: Store | None = None,
) -> None:
    """Write a checkpoint; ``path`` is replaced only once the new file is complete.

    Args:
        path: Where to write; ends in ``.safetensors``.
        model: A network with a JSON-able ``config`` attribute, as ``MobileSteelNet`` has.
        classes: Class names in the order of the logits.
        input_size: Height and width of the network's input in pixels.
        normalisation: ``{"mean": [...], "std": [...]}``, three numbers each.
        training: JSON-able summary of the training.
        temperature: See :class:`Checkpoint`.
        store: Turns the weights into those of the file, and gives the JSON-able record from which
            :func:`mobilesteelnet.quantisation.restore` has them back; None writes them as they are.

    Raises:
        CheckpointError: The arguments do not describe the network, or a weight is not finite.
        OSError: The file cannot be written; what was there before is untouched.
    """
    safetensors = _safetensors()
    from safetensors import SafetensorError

    # The backend is a choice of the machine that runs the network, not a property of the weights.
    options: Any = model.config
    config = {key: value for key, value in options.items() if key != "backend"}
    metadata = {
        "format": FORMAT,
        "model": config,
        "classes": list(classes),
        "input_size": input_size,
        "normalisation": normalisation,
        "training": training,
        "temperature": temperature,
    }
    _check_metadata(metadata, str(path))
    # An own copy of each tensor: safetensors refuses tensors that share memory.
    tensors = {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in model.state_dict().items()
    }
    _check_finite(tensors, str(path))
    if store is not None:
        tensors, metadata["storage"] = store(tensors)
    try:
        text = json.dumps(metadata, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"training= or model.config cannot be written as JSON: {error}"
        ) from None

    def write(part: Path) -> None:
        try:
            safetensors.save_file(tensors, str(part), {METADATA_KEY: text})
        except SafetensorError as error:  # its writer hides the OSError
            raise OSError(f"writing {str(path)!r} failed: {error}") from error

    write_atomically(path, write)


def load_checkpoint(
    path: str | os.PathLike[str],
    map_location: str | torch.device = "cpu",
    *,
    classes: list[str] | None = None,
    backend: str | None = None,
) -> Checkpoint:
    """Read a checkpoint of this package, or the weights of the published network.

    The kind of file is told from its first bytes, not from its name.

    Args:
        path: A ``.safetensors`` file of :func:`save_checkpoint`, or a published ``.pth``.
        map_location: Device of the returned network.
        classes: Class names for a file that has none; for others they must agree in number.
        backend: Backend of the fused stages; None lets the registry choose.

    Raises:
        CheckpointError: The file is missing, corrupt, foreign, or of the older published variant.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist or is not a file")
    if _is_safetensors(file):
        tensors, metadata = _read_safetensors(file)
        tensors = _restore(tensors, metadata, str(file))
        named = True
    else:
        tensors = read_published(file)
        metadata = published_metadata(tensors, str(file))
        named = False
    _check_finite(tensors, str(file))
    if classes is not None:
        names = [item for item in classes if isinstance(item, str) and item]
        if not len(metadata["classes"]) == len(classes) == len(set(names)):
            raise CheckpointError(
                f"classes={classes!r}: checkpoint {str(file)!r} has {len(metadata['classes'])} "
                "classes, as many different names are needed"
            )
        metadata["classes"] = list(classes)
        named = True
    model = _build(metadata["model"], tensors, backend, str(file)).to(map_location).eval()
    return Checkpoint(
        model=model,
        classes=metadata["classes"],
        input_size=metadata["input_size"],
        normalisation=metadata["normalisation"],
        training=metadata["training"],
        named_classes=named,
        temperature=metadata.get("temperature", 1.0),
    )


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'checkpoints need safetensors: pip install "mobilesteelnet[cli]"', name="safetensors"
        ) from None
    return safetensors.torch


def _is_safetensors(file: Path) -> bool:
    # A safetensors file starts with the length of its JSON header (u64) and the header's "{".
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            head = handle.read(9)
    except OSError as error:
        raise CheckpointError(f"checkpoint {str(file)!r} cannot be read: {error}") from None
    if len(head) < 9:
        raise CheckpointError(f"checkpoint {str(file)!r} is empty or cut off ({size} bytes)")
    return head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= size


def _read_safetensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    _safetensors()
    from safetensors import safe_open

    try:
        with safe_open(str(file), framework="pt", device="cpu") as handle:
            texts = handle.metadata() or {}
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {str(file)!r} is corrupt or cut off: {first_line(error)}"
        ) from None
    if METADATA_KEY not in texts:
        raise CheckpointError(
            f"checkpoint {str(file)!r} is a safetensors file of another program: it has no "
            f"{METADATA_KEY!r} metadata"
        )
    try:
        metadata = json.loads(texts[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {str(file)!r}: metadata is not JSON: {error}") from None
    _check_metadata(metadata, str(file))
    return tensors, metadata


def _restore(
    tensors: dict[str, torch.Tensor], metadata: dict[str, Any], name: str
) -> dict[str, torch.Tensor]:
    """The weights in float32, whatever they were stored as."""
    record = metadata.get("storage")
    if record is None:
        return tensors
    try:
        tensors = restore(tensors, record if isinstance(record, dict) else {})
    except ValueError as error:
        raise CheckpointError(f"checkpoint {name!r}: {error}") from None
    return {k: t.float() if t.dtype == torch.float16 else t for k, t in tensors.items()}


def _check_metadata(metadata: Any, name: str) -> None:
    """Check every value that later code relies on.

    Raises:
        CheckpointError: Naming the first value that is not as :func:`save_checkpoint` writes it.
    """

    def refuse(key: str, value: object, wanted: str) -> None:
        raise CheckpointError(f"checkpoint {name!r}: {key}={value!r:.120} is not {wanted}")

    if not isinstance(metadata, dict):
        refuse("metadata", metadata, "a JSON object")
    if metadata.get("format") != FORMAT:
        refuse("format", metadata.get("format"), f"{FORMAT} (written by a newer version?)")
    classes = metadata.get("classes")
    if (
        not isinstance(classes, list)
        or not 1 <= len(classes) <= MAX_CLASSES
        or not all(isinstance(item, str) and item for item in classes)
        or len(set(classes)) != len(classes)
    ):
        refuse("classes", classes, "a list of different names")
    size = metadata.get("input_size")
    if type(size) is not int or not 1 <= size <= MAX_INPUT_SIZE:
        refuse("input_size", size, f"a whole number from 1 to {MAX_INPUT_SIZE}")
    normalisation = metadata.get("normalisation")
    if not isinstance(normalisation, dict) or set(normalisation) != {"mean", "std"}:
        refuse("normalisation", normalisation, '{"mean": [...], "std": [...]}')
    for key in ("mean", "std"):
        numbers = normalisation[key]
        if (
            not isinstance(numbers, list)
            or len(numbers) != 3
            or not all(type(number) in (int, float) and abs(number) < 1e6 for number in numbers)
            or (key == "std" and min(numbers) <= 0)
        ):
            refuse(f"normalisation[{key!r}]", numbers, "three finite numbers (std above 0)")
    temperature = metadata.get("temperature", 1.0)  # files of before there was one have none
    if type(temperature) not in (int, float) or not 1e-6 < temperature < 1e6:
        refuse("temperature", temperature, "a finite number above 0")
    for key in ("model", "training"):
        if not isinstance(metadata.get(key), dict):
            refuse(key, metadata.get(key), "a JSON object")
    if metadata["model"].get("num_classes", len(classes)) != len(classes):
        refuse(
            "classes", classes, f"of length num_classes={metadata['model']['num_classes']!r:.40}"
        )


def _build(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], backend: str | None, name: str
) -> nn.Module:
    from .networks import build_network

    config = {**config, "backend": backend}
    try:
        # Without memory first, so that a hostile width or class count costs nothing.
        with torch.device("meta"):
            skeleton = build_network({**config, "backend": None})
    except ModuleNotFoundError as error:
        raise CheckpointError(f"checkpoint {name!r}: {error}") from None
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {name!r}: network {config!r:.200} cannot be built: {first_line(error)}"
        ) from None
    wanted = {key: tuple(value.shape) for key, value in skeleton.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    problems = [f"{key} is missing" for key in wanted if key not in found]
    problems += [f"{key} is not known" for key in found if key not in wanted]
    problems += [
        f"{key} has shape {found[key]}, not {shape}"
        for key, shape in wanted.items()
        if key in found and found[key] != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"checkpoint {name!r} does not fit the network: {'; '.join(problems[:3])}{more}"
        )
    model = build_network(config)
    model.load_state_dict(tensors, strict=True)
    return model


def _check_finite(tensors: dict[str, torch.Tensor], name: str) -> None:
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"checkpoint {name!r}: {key!r} holds values that are not finite")
