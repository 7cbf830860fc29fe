"""Reading picture sets: layout, decoding, duplicates, contrast, datasets."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is not installed")
from picture_cases import (
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
    DataError,
    PictureDataset,
    eval_transform,
    natural_key,
    scan,
    scan_several,
)
from mobilesteelnet.datacheck import contrast_table
from mobilesteelnet.pictures import PictureError, decode

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


# Decoding ---------------------------------------------------------------------------------------


def test_sixteen_bits_are_scaled_not_clipped():
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = np.asarray(decode(encode(Image.fromarray(levels), kind)))
        assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]
        assert (decoded == decoded[..., :1]).all()


@pytest.mark.parametrize("largest", [2**14 - 1, 2**14])
def test_sixteen_bits_that_use_a_quarter_of_their_range(largest):
    greys = encode(Image.fromarray(np.array([[0, largest]], dtype=np.uint16)))
    colours = encode_deep_colours(np.array([[[0, 0, 0], [0, largest, 0]]]))
    for content in (greys, colours):
        if largest < 2**14:
            with pytest.raises(PictureError, match="by 4 if they have 14 bits"):
                decode(content)
        else:
            assert np.asarray(decode(content)).max() == 64


def test_dark_pictures_of_8_bits_are_read():
    for kind in ("PNG", "TIFF", "BMP"):
        dark = encode(Image.new("RGB", (4, 4), (3, 3, 3)), kind)
        assert decode(dark).getpixel((1, 1)) == (3, 3, 3)


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


def test_a_transparent_colour_is_laid_over_white():
    clear = Image.new("RGB", (4, 4), (200, 20, 20))
    stream = io.BytesIO()
    clear.save(stream, "PNG", transparency=(200, 20, 20))
    assert decode(stream.getvalue()).getpixel((1, 1)) == (255, 255, 255)


def test_a_tiff_of_16_bits_whose_zero_is_white():
    content = encode(Image.fromarray(np.array([[0, 65535, 16448]], dtype=np.uint16)), "TIFF")
    black = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert content.count(black) == 1
    inverted = decode(content.replace(black, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
    assert [inverted.getpixel((x, 0))[0] for x in range(3)] == [255, 0, 191]
    assert [decode(content).getpixel((x, 0))[0] for x in range(3)] == [0, 255, 64]


def test_ending_may_differ_from_the_format(write):
    assert len(scan(write({**two_classes(), "dent/really_a_bmp.jpg": picture(7, kind="BMP")}))) == 7


# Duplicates, contrast, dataset ------------------------------------------------------------------


def test_duplicates_are_found_across_formats_and_modes(write):
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    same = {"dent/g.png": encode(grey), "rust/g.bmp": encode(grey.convert("RGB"), "BMP")}
    turned = {"rust/t.png": encode(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(4, 16)))}
    pictures = scan(write({**two_classes(), **same, **turned}))
    groups = [[pictures.items[i].name for i in group] for group in pictures.duplicate_groups()]
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
        "q1": 25.0,
        "q3": 75.0,
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


def test_one_path_for_several_is_that_path(write):
    path = write(two_classes(2))
    for given in (path, str(path), [path]):
        assert scan_several(given).items == scan(path, labelled=False).items
    with pytest.raises(ValueError, match="at least one"):
        scan_several([])
