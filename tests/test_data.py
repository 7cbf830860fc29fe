"""Reading picture sets: decoding, sources, bad files, duplicates, datasets; never a crash."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image

from mobilesteelnet.data import (
    BadFile,
    DataError,
    PictureDataset,
    contrast_table,
    duplicate_groups,
    eval_transform,
    natural_key,
    scan,
)
from mobilesteelnet.pictures import PictureError, decode

SHARED_ZIP = Path(__file__).resolve().parents[2] / "shared" / "data" / "neu-det.zip"


def picture(seed: int = 0, size: tuple[int, int] = (12, 10), kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return encode(image, kind)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def two_classes(each: int = 3) -> dict[str, bytes]:
    names = [f"{name}/{name}_{n}.png" for name in ("dent", "rust") for n in range(1, each + 1)]
    return {name: picture(seed) for seed, name in enumerate(names)}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


WRITERS = {
    "folder": lambda root, files: write_folder(root / "set", files),
    "zip": lambda root, files: write_zip(root / "set.zip", files),
}


@pytest.fixture(params=sorted(WRITERS))
def write(request, tmp_path):
    return lambda files: WRITERS[request.param](tmp_path, files)


# Sets as they should be -------------------------------------------------------------------------


def test_scan_reads_classes_labels_and_pixels(write):
    files = two_classes(11)
    pictures = scan(write(files))
    assert pictures.classes == ["dent", "rust"]
    assert [p.name for p in pictures.items] == sorted(files, key=natural_key)
    assert pictures.items[1].name == "dent/dent_2.png"
    assert pictures.labels == [0] * 11 + [1] * 11
    assert len(pictures) == 22
    assert pictures.bad == []
    opened = pictures.open(4)
    assert opened.mode == "RGB"
    expected = Image.open(io.BytesIO(files[pictures.items[4].name]))
    assert np.array_equal(np.asarray(opened), np.asarray(expected))
    assert (pictures.items[4].width, pictures.items[4].height) == (10, 12)


def test_system_files_and_notes_are_passed_over(write):
    noise = ["__MACOSX/dent/._dent_1.png", "dent/.DS_Store", "dent/Thumbs.db", ".git/a.png"]
    noise += ["README.md", "dent/dent_1.xml", "dent/notes.txt", "licence"]
    pictures = scan(write({**two_classes(), **dict.fromkeys(noise, b"x")}))
    assert len(pictures) == 6
    assert pictures.bad == []


def test_progress_counts_every_picture(write):
    calls = []
    scan(write(two_classes()), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 6) for n in range(1, 7)]


def test_exception_in_progress_ends_the_scan(write):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(write(two_classes(20)), progress=stop)


def test_a_zip_needs_no_zip_ending(tmp_path):
    assert len(scan(write_zip(tmp_path / "upload.bin", two_classes()))) == 6


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    root = write_folder(tmp_path / "set", two_classes())
    try:
        (root / "dent" / "up").symlink_to(root, target_is_directory=True)
        (root / "linked").symlink_to(root / "rust", target_is_directory=True)
    except OSError as error:
        pytest.skip(f"no symbolic links here: {error}")
    pictures = scan(root)
    assert pictures.classes == ["dent", "linked", "rust"]
    assert len(pictures) == 9


@pytest.mark.parametrize("single", [True, False])
def test_unlabelled_sets_take_pictures_at_any_depth(write, tmp_path, single):
    files = {"a.png": picture(1), "b/c/d.JPG": picture(2, kind="JPEG"), "b/no.txt": b"x"}
    path = write(files)
    if single:
        path = tmp_path / "one.bmp"
        path.write_bytes(picture(3, kind="BMP"))
    pictures = scan(path, labelled=False)
    assert [p.name for p in pictures.items] == (["one.bmp"] if single else ["a.png", "b/c/d.JPG"])
    assert {p.label for p in pictures.items} == {None}
    assert pictures.classes == []
    with pytest.raises(DataError, match="without labels"):
        _ = pictures.labels


def test_unlabelled_set_of_bad_files_only_names_them(tmp_path):
    path = tmp_path / "one.png"
    path.write_bytes(b"no picture")
    pictures = scan(path, labelled=False)
    assert len(pictures) == 0
    assert [file.name for file in pictures.bad] == ["one.png"]


# Bad files --------------------------------------------------------------------------------------

PNG = picture(99)
JPEG = picture(99, (64, 64), "JPEG")
BAD = {
    "empty": (b"", "is empty"),
    "text": (b"not a picture at all", "is not a JPEG, PNG, BMP or TIFF picture"),
    "truncated_png": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "truncated_jpeg": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "header_only": (PNG[:30], "cannot be decoded|is not a JPEG"),
    "gif": (encode(Image.new("L", (5, 5)), "GIF"), "is not a JPEG, PNG, BMP or TIFF picture"),
    "float": (encode(Image.new("F", (5, 5)), "TIFF"), "has floating-point pixels"),
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


# Decoding ---------------------------------------------------------------------------------------


def test_sixteen_bits_are_scaled_not_clipped():
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = np.asarray(decode(encode(Image.fromarray(levels), kind)))
        assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]
        assert (decoded == decoded[..., :1]).all()


def test_thirty_two_bits_are_refused():
    content = encode(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF")
    with pytest.raises(PictureError, match="32-bit"):
        decode(content)


def test_palette_transparency_and_cmyk_become_rgb():
    red = Image.new("RGB", (4, 4), (200, 20, 20))
    assert decode(encode(red.quantize(4))).getpixel((1, 1)) == (200, 20, 20)
    clear = Image.new("RGBA", (4, 4), (200, 20, 20, 0))
    assert decode(encode(clear)).getpixel((1, 1)) == (255, 255, 255)
    half = Image.new("LA", (4, 4), (0, 128))
    assert decode(encode(half)).getpixel((1, 1)) == (127, 127, 127)
    assert decode(encode(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)
    cyan = decode(encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG")).getpixel((8, 8))
    assert cyan[0] < 60
    assert cyan[1] > 150
    grey = decode(encode(Image.new("L", (4, 4), 77), "BMP"))
    assert (grey.mode, grey.getpixel((0, 0))) == ("RGB", (77, 77, 77))


def test_ending_may_differ_from_the_format(write):
    assert len(scan(write({**two_classes(), "dent/really_a_bmp.jpg": picture(7, kind="BMP")}))) == 7


# Duplicates, contrast, dataset ------------------------------------------------------------------


def test_duplicates_are_found_across_formats_and_modes(write):
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    same = {"dent/g.png": encode(grey), "rust/g.bmp": encode(grey.convert("RGB"), "BMP")}
    turned = {"rust/t.png": encode(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(4, 16)))}
    pictures = scan(write({**two_classes(), **same, **turned}))
    groups = [[pictures.items[i].name for i in group] for group in duplicate_groups(pictures)]
    assert groups == [["dent/g.png", "rust/g.bmp"]]


def test_contrast_is_the_deviation_of_grey_levels(write):
    flat = Image.new("L", (6, 6), 90)
    half = Image.fromarray(np.repeat([[0, 200]], 2, axis=0).astype(np.uint8))
    files = {"a/1.png": encode(flat), "a/2.png": encode(half), "b/1.png": encode(flat)}
    first, second = contrast_table(scan(write(files)))
    assert first == {
        "class": "a",
        "count": 2,
        "min": 0.0,
        "max": 100.0,
        "mean": 50.0,
        "median": 50.0,
        "std": 50.0,
    }
    assert (second["class"], second["count"], second["max"]) == ("b", 1, 0.0)


def test_dataset_gives_tensor_and_label_and_checks_indexes(write):
    pictures = scan(write(two_classes()))
    dataset = PictureDataset(pictures, [5, 0], eval_transform(16))
    tensor, label = dataset[0]
    assert (len(dataset), label, dataset[1][1]) == (2, 1, 0)
    assert (tensor.shape, tensor.dtype) == ((3, 16, 16), torch.float32)
    with pytest.raises(DataError, match="holds 6"):
        PictureDataset(pictures, [6], eval_transform(16))


def test_natural_order_of_names():
    names = ["a_10.png", "a_9.png", "a_09.png", "a_123456789012345678901234567890.png", "b1", "a"]
    assert sorted(names, key=natural_key) == [
        "a",
        "a_09.png",
        "a_9.png",
        "a_10.png",
        "a_123456789012345678901234567890.png",
        "b1",
    ]


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
