"""Prediction: pictures, folders and zips, bad files, batches and the written forms."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is not installed")
from training_cases import (
    CLASSES,
    NORMALISATION,
    SIZE,
    make_pictures,
    one_thread,  # noqa: F401
    small_network,
)

from mobilesteelnet.checkpoint import Checkpoint, CheckpointError
from mobilesteelnet.data import eval_transform, scan
from mobilesteelnet.predict import choose_device, predict
from mobilesteelnet.run_folder import rows_to_csv


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(small_network(), CLASSES, SIZE, NORMALISATION)


def test_one_picture(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "set", per_class=1)
    found = scan(folder / "dark" / "dark_0.png", labelled=False)
    (item,) = predict(checkpoint, found, top_k=2).items
    image = eval_transform(SIZE)(found.open(0))[None]
    with torch.no_grad():
        chances = checkpoint.model(image).softmax(1)[0]
    assert item.probability == pytest.approx(float(chances.max()))
    assert item.label == CLASSES[int(chances.argmax())]
    assert item.top[0] == (item.label, item.probability)
    assert [value for _, value in item.top] == pytest.approx(chances.topk(2).values.tolist())


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_a_folder_with_bad_files(checkpoint: Checkpoint, tmp_path: Path, batch_size: int) -> None:
    folder = make_pictures(tmp_path / "set", per_class=2)
    (folder / "dark" / "broken.png").write_bytes(b"not a picture")
    (folder / "empty.jpg").touch()
    result = predict(checkpoint, scan(folder, labelled=False), batch_size=batch_size)
    assert len(result.items) == 6
    assert {file.name for file in result.bad} == {"dark/broken.png", "empty.jpg"}


def test_a_picture_that_vanishes_after_the_scan(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "set", per_class=2)
    found = scan(folder, labelled=False)
    (folder / found.items[3].name).unlink()
    result = predict(checkpoint, found, batch_size=3)
    assert [item.name for item in result.items] == [
        item.name for place, item in enumerate(found.items) if place != 3
    ]
    assert [file.name for file in result.bad] == [found.items[3].name]


def test_a_zip_gives_what_the_folder_gives(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "set", per_class=2)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(folder).as_posix())
    one = predict(checkpoint, scan(folder, labelled=False))
    other = predict(checkpoint, scan(tmp_path / "set.zip", labelled=False))
    assert one.to_dict() == other.to_dict()


def test_the_written_forms(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "set", per_class=1)
    (folder / 'odd "name", really.png').write_bytes(b"")
    result = predict(checkpoint, scan(folder, labelled=False), top_k=9)
    content = json.loads(json.dumps(result.to_dict()))
    assert len(content["predictions"]) == 3
    assert len(content["predictions"][0]["top"]) == 3
    assert content["bad_files"][0]["name"] == 'odd "name", really.png'
    table = list(csv.DictReader(io.StringIO(rows_to_csv(result.to_rows()))))
    assert len(table) == 4
    assert table[0]["class"] == content["predictions"][0]["class"]
    assert float(table[0]["probability"]) == pytest.approx(result.items[0].probability, abs=1e-6)
    assert table[0]["class_3"] in CLASSES
    assert (table[3]["class"], bool(table[3]["error"])) == ("", True)


def test_cells_are_no_formulas_and_stay_in_their_rows() -> None:
    names = ["=1+1", "+a", "-b", "@c", "\tx", "a\rb", "a\nb", "plain", 'q"uote']
    rows = [{"name": name, "value": -0.5} for name in names]
    found = list(csv.reader(io.StringIO(rows_to_csv(rows), newline="")))
    assert found[0] == ["name", "value"]
    assert [name for name, _ in found[1:6]] == [f"'{name}" for name in names[:5]]
    assert [name for name, _ in found[6:]] == names[5:]
    assert {value for _, value in found[1:]} == {"-0.5"}


def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    broken = Checkpoint(small_network(), CLASSES, SIZE, NORMALISATION)
    with torch.no_grad():
        broken.model.fc.bias[1] = torch.inf
    folder = make_pictures(tmp_path / "set", per_class=1)
    with pytest.raises(CheckpointError, match="not finite"):
        predict(broken, scan(folder, labelled=False))


def test_a_network_for_grey_pictures_is_refused(tmp_path: Path) -> None:
    grey = Checkpoint(small_network(in_channels=1), CLASSES, SIZE, NORMALISATION)
    folder = make_pictures(tmp_path / "set", per_class=1)
    with pytest.raises(CheckpointError, match="in_channels=1"):
        predict(grey, scan(folder, labelled=False))


def test_a_network_in_training_mode_is_put_in_evaluation(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    found = scan(make_pictures(tmp_path / "set", per_class=1), labelled=False)
    want = predict(checkpoint, found).items
    before = {name: buffer.clone() for name, buffer in checkpoint.model.named_buffers()}
    checkpoint.model.train()
    assert predict(checkpoint, found).items == want
    for name, buffer in checkpoint.model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_arguments_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = scan(make_pictures(tmp_path / "set", per_class=1), labelled=False)
    with pytest.raises(ValueError, match="top_k=0"):
        predict(checkpoint, found, top_k=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        predict(checkpoint, found, batch_size=0)
    with pytest.raises(TypeError, match=r"top_k=2\.5"):
        predict(checkpoint, found, top_k=2.5)  # type: ignore[arg-type]
    for index in (-1, len(found)):
        with pytest.raises(ValueError, match=f"indexes: {index} is none of the"):
            predict(checkpoint, found, indexes=[index])
    for device in ("toaster", "cpu:x", ""):
        with pytest.raises(ValueError, match="device="):
            choose_device(device)
    assert choose_device("cpu") == torch.device("cpu")
