"""Bad files, unusable sets, odd zips and hostile bytes: a name and a reason, never a crash."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL", reason="Pillow is not installed")
from picture_cases import (
    JPEG,
    PNG,
    encode,
    encode_deep_colours,
    picture,
    two_classes,
    write,  # noqa: F401
    write_folder,
    write_zip,
)
from PIL import Image

from mobilesteelnet.data import (
    BadFile,
    DataError,
    PictureDataset,
    eval_transform,
    scan,
)
from mobilesteelnet.pictures import PictureError, decode

# Bad files --------------------------------------------------------------------------------------

BAD = {
    "empty": (b"", "is empty"),
    "text": (b"not a picture at all", "is not a JPEG, PNG, BMP or TIFF picture"),
    "truncated_png": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "truncated_jpeg": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "header_only": (PNG[:30], "cannot be decoded|is not a JPEG"),
    "gif": (encode(Image.new("L", (5, 5)), "GIF"), "is not a JPEG, PNG, BMP or TIFF picture"),
    "float": (encode(Image.new("F", (5, 5)), "TIFF"), "has floating-point pixels"),
    "12_bits_in_16": (
        encode(Image.fromarray(np.array([[0, 3000]], dtype=np.uint16))),
        "has no value above 3000 of 65535 .* multiply them by 16 if they have 12 bits",
    ),
    "8_bits_in_32": (
        encode(Image.fromarray(np.array([[0, 200]], dtype=np.int32)), "TIFF"),
        "has no value above 200 of 65535 .* multiply them by 257 if they have 8 bits",
    ),
    "12_bit_colours_in_16": (
        encode_deep_colours(np.full((5, 5, 3), 4095)),
        "has no value above 4095 of 65535",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_file_is_skipped_by_name_or_fatal(write, case):
    content, reason = BAD[case]
    path = write({**two_classes(), "dent/dent_9.png": content})
    pictures = scan(path)
    assert len(pictures) == 6
    (bad,) = pictures.bad
    assert isinstance(bad, BadFile)
    assert bad.name == "dent/dent_9.png"
    with pytest.raises(DataError, match=f"dent/dent_9.png ({reason})"):
        scan(path, on_bad_file="fatal")


def test_fatal_names_every_bad_file(write):
    path = write({**two_classes(), "dent/x.png": b"", "rust/y.gif": b"z", "stray.png": PNG})
    with pytest.raises(DataError) as caught:
        scan(path, on_bad_file="fatal")
    for name in ("3 bad files", "dent/x.png", "rust/y.gif", "stray.png"):
        assert name in str(caught.value)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("limit", [100, 30])
def test_decompression_bomb_is_a_bad_file(write, monkeypatch, limit):
    path = write({**two_classes(), "rust/bomb.png": encode(Image.new("L", (40, 40)))})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    monkeypatch.setattr("mobilesteelnet.pictures.MAX_FILE_BYTES", 10**6)
    assert [file.name for file in scan(path).bad] == ["rust/bomb.png"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match="no usable pictures"):
        scan(path)


def test_file_larger_than_the_limit_is_not_read(write, monkeypatch):
    path = write({**two_classes(), "rust/long.bmp": picture(1, (60, 60), "BMP")})
    monkeypatch.setattr("mobilesteelnet.pictures.MAX_FILE_BYTES", 10_000)
    (bad,) = scan(path).bad
    assert bad.name == "rust/long.bmp"
    assert "more than the 10000" in bad.reason


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_not_waited_for(tmp_path):
    root = write_folder(tmp_path, two_classes())
    os.mkfifo(root / "rust" / "pipe.png")
    (root / "rust" / "gone.png").symlink_to(root / "nowhere.png")
    gone, pipe = scan(root).bad
    assert (gone.name, pipe.name) == ("rust/gone.png", "rust/pipe.png")
    assert gone.reason.startswith("cannot be read: No such file")
    assert pipe.reason == "is not a regular file"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no classes found"),
        ({"dent/a.png": PNG}, "one class only, 'dent'"),
        ({"a.png": PNG, "b.png": PNG}, "no classes found"),
        ({"train/a.png": PNG, "test/b.png": PNG}, "no classes found"),
        ({"dent/a.png": b"", "rust/b.png": b""}, "no usable pictures"),
        ({"dent/a.png": PNG, "rust/b.png": PNG, "pits/c.png": b""}, "class 'pits' has bad files"),
    ],
)
def test_sets_without_classes_are_refused(write, files, message):
    path = write({"readme.txt": b"", **files})
    with pytest.raises(DataError, match=message):
        scan(path)


def test_unusable_paths_and_arguments_are_named(tmp_path):
    note = tmp_path / "note.zip"
    note.write_bytes(b"not a zip")
    single = tmp_path / "one.png"
    single.write_bytes(PNG)
    for path, message in [
        (tmp_path / "nowhere", "nowhere' does not exist"),
        (note, "note.zip' is not a readable zip"),
        (single, "neither a folder nor a zip"),
        ("a\0b", "path="),
    ]:
        with pytest.raises(DataError, match=message):
            scan(path)
    with pytest.raises(ValueError, match="on_bad_file='ignore'"):
        scan(tmp_path, on_bad_file="ignore")


# Zips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/x.png", "C:\\x.png", "a\\..\\x"]
)
def test_zip_with_names_that_lead_outside_is_refused(tmp_path, name):
    path = write_zip(tmp_path / "set.zip", {**two_classes(), name: PNG})
    with pytest.raises(DataError, match="unsafe name"):
        scan(path)


def test_encrypted_zip_is_refused(tmp_path):
    path = write_zip(tmp_path / "set.zip", two_classes())
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        scan(path)


def test_damaged_zip_entry_is_a_bad_file(tmp_path):
    path = write_zip(tmp_path / "set.zip", two_classes())
    content = bytearray(path.read_bytes())
    content[content.index(b"dent/dent_2.png") + 60] ^= 0xFF
    path.write_bytes(content)
    (bad,) = scan(path).bad
    assert bad.name == "dent/dent_2.png"
    assert "cannot be unpacked" in bad.reason


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_name_stored_twice_is_a_bad_file(tmp_path):
    path = write_zip(tmp_path / "set.zip", two_classes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("dent/dent_1.png", picture(50))
    pictures = scan(path)
    assert [(f.name, f.reason) for f in pictures.bad] == [
        ("dent/dent_1.png", "is stored more than once in the zip")
    ]
    assert len(pictures) == 5


def test_zip_with_backslashes_is_read(tmp_path):
    files = {name.replace("/", "\\"): content for name, content in two_classes().items()}
    assert scan(write_zip(tmp_path / "set.zip", files)).classes == ["dent", "rust"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataset_works_in_worker_processes(write, method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {method} processes")
    pictures = scan(write(two_classes(8)))
    dataset = PictureDataset(pictures, range(16), eval_transform(8))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, num_workers=2, multiprocessing_context=method
    )
    images, labels = zip(*loader, strict=True)
    alone = torch.stack([dataset[i][0] for i in range(16)])
    assert torch.equal(torch.cat(images), alone)
    assert torch.cat(labels).tolist() == pictures.labels


def test_pickled_set_opens_pictures(write):
    pictures = scan(write(two_classes()))
    again = pickle.loads(pickle.dumps(pictures))
    assert again.items == pictures.items
    assert np.array_equal(np.asarray(again.open(2)), np.asarray(pictures.open(2)))


def test_picture_that_vanishes_after_the_scan_is_named(tmp_path):
    root = write_folder(tmp_path, two_classes())
    pictures = scan(root)
    (root / "dent" / "dent_2.png").unlink()
    with pytest.raises(DataError, match=r"dent_2\.png.*No such file"):
        pictures.open(1)


# Hostile input ----------------------------------------------------------------------------------

SEEDS = [PNG, JPEG, picture(1, kind="BMP"), picture(2, kind="TIFF")]


@st.composite
def damaged(draw):
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 12))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=200), damaged()))
def test_decode_gives_rgb_or_picture_error(content):
    try:
        outcome = decode(content).mode
    except PictureError as error:
        outcome = f"refused: {error}"
    assert outcome == "RGB" or len(outcome) > len("refused: ")


NAMES = st.lists(
    st.one_of(
        st.sampled_from(["train", "images", "IMAGES", "ANNOTATIONS", "Cr", "dent", "..", ".", ""]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    ),
    min_size=1,
    max_size=4,
).flatmap(
    lambda parts: st.sampled_from(["", ".png", "_1.png", ".JPG", ".xml", ".gif"]).map(
        lambda ending: "/".join(parts) + ending
    )
)


@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(NAMES, st.one_of(st.binary(max_size=40), damaged())), max_size=8))
def test_scan_of_any_zip_gives_a_set_or_data_error(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("fuzz") / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(name.replace("\0", "_") or "_", content)
    for labelled in (True, False):
        try:
            pictures = scan(path, labelled=labelled)
        except DataError:
            continue
        assert not {p.name for p in pictures.items} & {file.name for file in pictures.bad}
        for i in range(len(pictures)):
            assert pictures.open(i).mode == "RGB"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_scan_of_a_damaged_zip_gives_a_set_or_data_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "set.zip"
    write_zip(path, {name: content[:80] for name, content in two_classes(2).items()})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        pictures = scan(path, labelled=False)
    except DataError:
        return
    assert len(pictures.items) + len(pictures.bad) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_a_class_whose_name_cannot_be_shown_is_told(tmp_path):
    folder = write_folder(tmp_path, {**two_classes(), "k/1.png": PNG})
    os.rename(folder / "k", os.fsencode(folder) + b"/k\xe9")
    found = scan(folder)
    assert found.classes == ["dent", "rust"]
    assert [(file.name, file.reason) for file in found.bad] == [
        ("k\\udce9/", "the name is not valid Unicode")
    ]
    with pytest.raises(DataError, match="1 bad files"):
        scan(folder, on_bad_file="fatal")


def test_folders_that_cannot_be_listed_are_named_and_hidden_ones_not_entered(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, {**two_classes(), ".Trash-0/x/1.png": PNG, "k/1.png": PNG})
    listed = os.scandir

    def scandir(path):
        if os.path.basename(path) in (".Trash-0", "k"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for labelled in (True, False):
        found = scan(folder, labelled=labelled)
        assert len(found) == 6
        assert found.bad == [BadFile("k/", "cannot be listed: Permission denied")]
    with pytest.raises(DataError, match="cannot be listed"):
        scan(folder / "k")


def test_empty_folders_are_named_in_folders_and_zips(tmp_path):
    folder = write_folder(tmp_path, two_classes())
    (folder / "burr").mkdir()
    (folder / "dent" / "none").mkdir()
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as written:
        for name in ("./", "burr/", "dent/", "dent/none/", ".hidden/"):
            written.writestr(name, "")
        for name, content in two_classes().items():
            written.writestr(name, content)
    for path in (folder, archive):
        assert scan(path).bad == [BadFile("burr/", "is an empty folder")]
    for path in (folder / "rust").iterdir():
        path.unlink()
    with pytest.raises(
        DataError, match=r"one class only, 'dent'; two are needed\n  burr/ is an .*\n  rust/ is an"
    ):
        scan(folder)
