"""The weights that come with the package: reading them, and making the files of a release.

``mobilesteelnet/weights/`` holds ``mobilesteelnet.safetensors``, ``card.json`` (checksum, figures,
training) and ``CARD.md`` (the same for people). :func:`load_shipped` needs no network connection.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from .data import PictureSet
from .evaluate import SPLITS, WHOSE, Evaluation, evaluate
from .predict import Progress
from .quantisation import choose_bits, quantise
from .run_folder import write_json, write_text
from .splits import recognise

SHIPPED = "shipped"
"""What the command line takes in place of a checkpoint's path for the weights of the package."""
WEIGHTS, CARD, CARD_TEXT = "mobilesteelnet.safetensors", "card.json", "CARD.md"
FILES = (WEIGHTS, CARD, CARD_TEXT)
STORAGES = ("int8", "float16", "float32")


def shipped_folder() -> Path:
    """Where the package's weights lie, if it brings some."""
    return Path(str(resources.files(__package__).joinpath("weights")))


def is_shipped(source: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint's path is the word for the package's weights, and no such file."""
    return str(source) == SHIPPED and not Path(source).exists()


def load_shipped(
    device: str | torch.device = "cpu",
    *,
    backend: str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """The network with the package's weights, checked against their checksum.

    Args:
        device: Where the network is put.
        backend: Backend of the fused stages; None lets the registry choose.
        folder: Of the files; None takes the package's own.

    Raises:
        CheckpointError: This version brings no weights, or they are damaged.
    """
    place = shipped_folder() if folder is None else Path(folder)
    file, card = place / WEIGHTS, place / CARD
    if not file.is_file() or not card.is_file():
        raise CheckpointError(
            "no trained weights come with this version: give a checkpoint, or train one with: "
            "mobilesteelnet train --data PICTURES"
        )
    try:
        wanted = json.loads(card.read_text("utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the card {str(card)!r} cannot be read: {error}") from None
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != wanted:
        raise CheckpointError(
            f"the weights {str(file)!r} are damaged: sha256 {found}, but their card says {wanted}; "
            "install the package again"
        )
    return load_checkpoint(file, device, backend=backend)


def unseen_pictures(checkpoint: Checkpoint, pictures: PictureSet) -> tuple[str, list[int]]:
    """The pictures that a fair figure may be measured on: a part's name, and its indexes.

    ``test``, without those that the training saw, if some of them are here; else ``all``: the set
    is another one, or the checkpoint does not say what it saw.
    """
    parts = recognise(checkpoint.training.get("seen"), pictures)
    return ("all", list(range(len(pictures)))) if parts is None else ("test", parts["test"])


def unlearnt_pictures(checkpoint: Checkpoint, pictures: PictureSet) -> tuple[str, list[int]]:
    """The pictures that a temperature may be fitted to: their parts' names, and their indexes.

    ``val+test``, or the one of the two that is here: all that the training did not learn from;
    ``all`` as for :func:`unseen_pictures`.
    """
    parts = recognise(checkpoint.training.get("seen"), pictures)
    if parts is None:
        return "all", list(range(len(pictures)))
    names = [side for side in ("val", "test") if parts[side]] or ["val", "test"]
    return "+".join(names), sorted(index for side in names for index in parts[side])


@dataclass(frozen=True)
class PackagedWeights:
    """What :func:`package_weights` made.

    Attributes:
        file: The weights.
        bytes: Their size.
        before, after: The evaluations of the checkpoint and of what was stored.
    """

    file: Path
    bytes: int
    before: Evaluation
    after: Evaluation

    @property
    def loss(self) -> float:
        """Points (of 100) of average accuracy that the storage costs."""
        return 100 * (self.before.average_accuracy - self.after.average_accuracy)


def package_weights(
    checkpoint: Checkpoint,
    pictures: PictureSet,
    indexes: list[int],
    out: str | os.PathLike[str],
    *,
    split: str = "test",
    storage: str = "int8",
    max_bytes: int | None = None,
    tolerance: float = 0.3,
    note: str = "",
    overwrite: bool = False,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> PackagedWeights:
    """Write weights as a release holds them, once it is sure that they are as good.

    Args:
        checkpoint: The trained network. Where its file names no classes, those of the pictures
            are taken, in their order.
        pictures: The labelled set.
        indexes: What the accuracies are measured on.
        out: Folder of the files; made if missing.
        split: What that part is of the training's pictures, for the card: ``test``, ``val``,
            ``train`` or ``all``.
        storage: ``int8`` (weights only, see :mod:`mobilesteelnet.quantisation`), ``float16`` or
            ``float32``.
        max_bytes: Largest size of the file; with ``int8`` large weights get seven bits to fit.
        tolerance: Points of average accuracy that may be lost.
        note: A sentence on the pictures for the card: where they are from, whom to cite.
        overwrite: Replace the files of earlier weights in ``out``.
        batch_size: Pictures a forward.
        progress: Called with (done, total) of each of both evaluations.

    Raises:
        ValueError: An option is unknown, weights lie in ``out``, or the new ones are too large or
            lose too much; nothing of ``out`` was changed.
        DataError, CheckpointError: As :func:`mobilesteelnet.evaluate.evaluate`.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: must be 0 or more")
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r}: must be one of {', '.join(STORAGES)}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}")
    if not checkpoint.named_classes:
        checkpoint = replace(checkpoint, classes=pictures.classes, named_classes=True)
    folder = Path(out)
    there = [name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise ValueError(f"{str(folder / there[0])!r} exists: replace it with --overwrite")
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    take: dict[str, Any] = {"split": split, "batch_size": batch_size, "progress": progress}
    try:
        # All three are whole before the first of them replaces an earlier one.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".drafts-") as place:
            draft = Path(place) / WEIGHTS
            size = _write_draft(draft, checkpoint, storage, max_bytes)
            device = next(checkpoint.model.parameters()).device
            before = evaluate(checkpoint, pictures, indexes, **take)
            after = evaluate(load_checkpoint(draft, device), pictures, indexes, **take)
            made = PackagedWeights(folder / WEIGHTS, size, before, after)
            if made.loss > tolerance:
                raise ValueError(
                    f"storage={storage!r} costs {made.loss:.2f} points of accuracy, more than "
                    f"tolerance={tolerance}"
                )
            facts = _card(draft, made, checkpoint, storage, note)
            write_json(draft.with_name(CARD), facts)
            write_text(draft.with_name(CARD_TEXT), _card_text(facts))
            for name in FILES:
                os.replace(draft.with_name(name), folder / name)
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()
    return made


def _write_draft(draft: Path, checkpoint: Checkpoint, storage: str, max_bytes: int | None) -> int:
    """Write the weights, and say how many bytes the file has."""
    room = max_bytes
    while True:
        save_checkpoint(
            draft,
            checkpoint.model,
            classes=checkpoint.classes,
            input_size=checkpoint.input_size,
            normalisation=checkpoint.normalisation,
            training=checkpoint.training,
            temperature=checkpoint.temperature,
            store=partial(_store, storage=storage, max_bytes=room),
        )
        size = draft.stat().st_size
        if max_bytes is None or room is None or size <= max_bytes:
            return size
        if storage != "int8":
            raise ValueError(f"max_bytes={max_bytes}: the file has {size} bytes as {storage}")
        room -= size - max_bytes  # names, shapes and the card in the file's header


def _store(
    tensors: dict[str, torch.Tensor], *, storage: str, max_bytes: int | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if storage == "int8":
        return quantise(tensors, choose_bits(tensors, max_bytes))
    if storage == "float32":
        return tensors, {"bits": {}, "shapes": {}}
    half = {k: t.half() if t.is_floating_point() else t for k, t in tensors.items()}
    return half, {"bits": {}, "shapes": {}}


def _card(
    draft: Path, made: PackagedWeights, checkpoint: Checkpoint, storage: str, note: str
) -> dict[str, Any]:
    def figures(result: Evaluation) -> dict[str, Any]:
        calibration = result.calibration
        return {
            "average_accuracy": result.average_accuracy,
            "overall_accuracy": result.overall_accuracy,
            "calibration_error": None if calibration is None else calibration.expected_error,
            "classes": {item.name: item.accuracy for item in result.per_class},
            "coverage": [] if calibration is None else [asdict(at) for at in calibration.coverage],
        }

    return {
        "file": WEIGHTS,
        "sha256": hashlib.sha256(draft.read_bytes()).hexdigest(),
        "bytes": made.bytes,
        "storage": storage,
        "classes": checkpoint.classes,
        "input_size": checkpoint.input_size,
        "network": dict(getattr(checkpoint.model, "config", {})),
        "data": made.after.about.get("data"),
        "split": made.after.split,
        "pictures": len(made.after.predictions),
        "float32": figures(made.before),
        "stored": figures(made.after),
        "temperature": checkpoint.temperature,
        "training": checkpoint.training,
        "note": note,
    }


def _card_text(card: dict[str, Any]) -> str:
    stored, plain = card["stored"], card["float32"]
    rows = "\n".join(
        f"| {name} | {100 * value:.2f} |"
        for name, value in stored["classes"].items()
        if value is not None
    )
    accepted = "\n".join(
        f"| {at['threshold']:g} | {100 * at['coverage']:.2f} | {100 * at['accuracy']:.2f} |"
        for at in stored["coverage"]
        if at["accuracy"] is not None
    )
    options = card["training"].get("options", {})
    shown = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
    parts = [
        "# MobileSteelNet, trained weights",
        f"`{card['file']}`: {card['bytes']:,} bytes, weights stored as {card['storage']}, sha256 "
        f"`{card['sha256']}`.",
        f"**What for.** Telling {len(card['classes'])} kinds of pictures apart "
        f"({', '.join(card['classes'])}), {card['input_size']} pixels wide and high. It always "
        "names one of them: another defect, another material or a sound surface is not recognised "
        "as such. Pictures that hold two defects have one label in the data. Try it on pictures of "
        "your own line before you rely on it.",
        f"**How good.** On {card['pictures']} pictures ({card['split']} of `{card['data']}`), "
        f"{WHOSE[card['split']]}: average accuracy {100 * stored['average_accuracy']:.2f} % (in "
        f"float32 {100 * plain['average_accuracy']:.2f} %), expected calibration error "
        f"{100 * stored['calibration_error']:.2f} % (logits divided by "
        f"{card.get('temperature', 1.0):g} before the softmax).",
        f"| class | accuracy, % |\n|---|---:|\n{rows}",
        "**When a person has to look.** What `predict --min-confidence` accepts, and how much of "
        f"that is right:\n\n| confidence | accepted, % | right, % |\n|---:|---:|---:|\n{accepted}",
        f"**How made.** `mobilesteelnet train`, then `mobilesteelnet package-weights`. {shown}.",
        f"**Data.** {card['note']}" if card["note"] else "",
        "Licence of the weights: Apache-2.0.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
