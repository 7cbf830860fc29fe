"""Checkpoints: round trip, the published form, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors", reason="safetensors is not installed")
from PIL import Image
from safetensors.torch import load_file, save_file
from training_cases import (
    CLASSES,
    NORMALISATION,
    SIZE,
    one_thread,  # noqa: F401
    program_environment,
    save_small,
    small_network,
)

from mobilesteelnet.checkpoint import (
    METADATA_KEY,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from mobilesteelnet.model import MobileSteelNet
from mobilesteelnet.run_folder import write_atomically


def images() -> torch.Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def test_round_trip_gives_the_same_logits_and_card(tmp_path: Path) -> None:
    model = save_small(tmp_path / "a.safetensors", training={"epoch": 7, "note": "ü"})
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(loaded.model(images()), model(images()))
    assert not loaded.model.training
    assert (loaded.classes, loaded.input_size, loaded.named_classes) == (CLASSES, SIZE, True)
    assert loaded.normalisation == NORMALISATION
    assert loaded.training == {"epoch": 7, "note": "ü"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_same_network_gives_the_same_file(tmp_path: Path) -> None:
    save_small(tmp_path / "a.safetensors")
    save_small(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_weights_in_channels_last_and_shared_memory_are_saved(tmp_path: Path) -> None:
    model = small_network().to(memory_format=torch.channels_last)
    model.fc.bias = torch.nn.Parameter(model.fc.weight.detach()[:, 0])
    card: dict[str, Any] = {"input_size": SIZE, "normalisation": NORMALISATION, "training": {}}
    save_checkpoint(tmp_path / "a.safetensors", model, classes=CLASSES, **card)
    loaded = load_checkpoint(tmp_path / "a.safetensors").model
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_the_backend_is_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    model = small_network(backend="reference")
    card: dict[str, Any] = {"input_size": SIZE, "normalisation": NORMALISATION, "training": {}}
    save_checkpoint(tmp_path / "a.safetensors", model, classes=CLASSES, **card)
    assert load_checkpoint(tmp_path / "a.safetensors").model.config["backend"] is None
    chosen = load_checkpoint(tmp_path / "a.safetensors", backend="reference").model
    assert chosen.config["backend"] == "reference"


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model_state_dict", "module."])
def test_published_weights(tmp_path: Path, wrap: str) -> None:
    torch.manual_seed(2)
    model = MobileSteelNet(num_classes=4).eval()
    state = model.state_dict()
    content: dict[str, Any] = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model_state_dict": {"model_state_dict": state},
        "module.": {f"module.{key}": value for key, value in state.items()},
    }[wrap]
    torch.save(content, tmp_path / "published.pth")
    loaded = load_checkpoint(tmp_path / "published.pth")
    assert loaded.classes == ["class_0", "class_1", "class_2", "class_3"]
    assert not loaded.named_classes
    assert loaded.input_size == 224
    assert torch.equal(loaded.model(images()), model(images()))
    named = load_checkpoint(tmp_path / "published.pth", classes=["a", "b", "c", "d"])
    assert named.classes == ["a", "b", "c", "d"]
    assert named.named_classes


def test_the_older_variant_is_refused_by_name(tmp_path: Path) -> None:
    state = {"ciema.cross_spatial_learning.cross_spatial_conv.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match="older published variant"):
        load_checkpoint(tmp_path / "old.pth")


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "hacked",)

    torch.save({"state_dict": Attack()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="without running code"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("content", ["code", "model", "text", "script", "tar"])
def test_no_message_advises_to_run_the_code_of_a_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "foreign.pth"
    if content == "code":
        torch.save({"weights": Path("a")}, path)
    elif content == "model":
        torch.save(small_network(), path, _use_new_zipfile_serialization=False)
    elif content == "text":
        path.write_bytes(b"\xffno weights at all")
    elif content == "script":
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("constants.pkl", "data.pkl", "version"):
                archive.writestr(f"archive/{name}", b"3\n")
    else:
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "weights_only" not in message
    assert ("state_dict() alone" in message) == (content in ("code", "model"))


@pytest.mark.parametrize("name", ["plate.jpg", "plate.png", "plate.BMP", "plate.tif", "plate"])
def test_a_picture_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    kind = "JPEG" if name.endswith("jpg") else "PNG"
    Image.new("RGB", (20, 20)).save(tmp_path / name, kind)
    with pytest.raises(CheckpointError, match="is a picture, not a checkpoint: predict takes one"):
        load_checkpoint(tmp_path / name)
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"no picture, and no weights")
    with pytest.raises(CheckpointError, match="is a picture, not a checkpoint"):
        load_checkpoint(damaged)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pytorch-lightning_version": "2.6", "state_dict": {}}, "state of a training"),
        ({"weights": 3}, "is a int, no weight"),
        ({}, "holds a dict, no weights"),
        ([1, 2], "holds a list, no weights"),
        ({"fc.weight": torch.eye(3).to_sparse()}, "sparse, quantised or without values"),
        ({"fc.weight": torch.eye(3, device="meta")}, "sparse, quantised or without values"),
        (
            {"fc.weight": torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)},
            "sparse, quantised or without values",
        ),
        ({"fc.weight": torch.eye(3).int()}, "'fc.weight' holds int32, weights are real numbers"),
        ({"fc.weight": torch.eye(3).cfloat()}, "'fc.weight' holds complex64"),
        ({"conv1.weight": torch.zeros(3)}, "another network"),
        ({"fc.weight": torch.zeros(6, 4), "initial_conv.0.weight": torch.zeros(1)}, "does not fit"),
    ],
)
def test_foreign_torch_files(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "foreign.pth")


def change_metadata(path: Path, **changes: object) -> None:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as handle:
        metadata = json.loads(handle.metadata()[METADATA_KEY])
    tensors = load_file(path)
    metadata.update(changes)
    save_file(tensors, path, {METADATA_KEY: json.dumps(metadata)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format=99"),
        ({"classes": ["a", "a", "b"]}, "classes="),
        ({"classes": ["a", "b"]}, "of length num_classes=3"),
        ({"classes": "abc"}, "classes='abc'"),
        ({"input_size": 0}, "input_size=0"),
        ({"input_size": 10**9}, "input_size=1000000000"),
        ({"input_size": True}, "input_size=True"),
        ({"normalisation": {"mean": [0, 0, 0]}}, "normalisation="),
        ({"normalisation": {"mean": [0, 0, 0], "std": [1, 1, 0]}}, "std"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": "warm"}, "temperature='warm'"),
        ({"temperature": 1e300}, "temperature=1e"),
        ({"training": None}, "training=None"),
        ({"model": {"num_classes": 3, "width": 1e9}}, "cannot be built"),
        ({"model": {"num_classes": 3, "colour": "red"}}, "cannot be built"),
        ({"model": {"num_classes": 3, "width": 2.0}}, "does not fit the network"),
        ({"model": {"num_classes": 3, "width": 0.0625, "attention": "none"}}, "is not known"),
    ],
)
def test_wrong_metadata_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.safetensors"
    save_small(path)
    change_metadata(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_safetensors_of_another_program(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="another program"):
        load_checkpoint(tmp_path / "other.safetensors")


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, message in (("none", "does not exist"), ("empty", "cut off"), (".", "not a file")):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / name)


def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = save_small(path)
    before = path.read_bytes()
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    card: dict[str, Any] = {"input_size": SIZE, "normalisation": NORMALISATION, "training": {}}
    with pytest.raises(CheckpointError, match=r"'fc\.bias' holds values that are not finite"):
        save_checkpoint(path, model, classes=CLASSES, **card)
    assert path.read_bytes() == before
    tensors = load_file(path)
    tensors["fc.bias"][0] = float("inf")
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as handle:
        metadata = handle.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="not finite"):
        load_checkpoint(path)


@pytest.mark.parametrize("classes", [["a"], ["a", "b", "b"]])
def test_classes_that_do_not_fit(tmp_path: Path, classes: list[str]) -> None:
    save_small(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="as many different names"):
        load_checkpoint(tmp_path / "a.safetensors", classes=classes)


def test_training_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="JSON"):
        save_small(tmp_path / "a.safetensors", training={"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    save_small(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from training_cases import save_small\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    save_small(Path(sys.argv[1]))\n"
        "except OSError as error:\n"
        "    print('OSError', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.safetensors")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=program_environment(),
        check=True,
    )
    assert done.stdout.startswith("OSError"), done.stdout + done.stderr
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=400))
def test_random_bytes_are_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fuzz").write_bytes(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "fuzz")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_checkpoints_load_or_are_refused(
    tmp_path: Path, place: float, byte: int, cut: bool
) -> None:
    """A changed byte among the weights cannot be seen; anything else has to be told."""
    whole = tmp_path / "whole.safetensors"
    if not whole.exists():
        save_small(whole)
    content = bytearray(whole.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    position = int(place * header)
    content[position] = byte
    if cut:
        del content[header + position :]
    (tmp_path / "fuzz").write_bytes(bytes(content))
    try:
        loaded = load_checkpoint(tmp_path / "fuzz")
    except CheckpointError:
        return
    assert not cut
    assert len(loaded.classes) == 3
