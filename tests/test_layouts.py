"""The usual layouts of NEU-DET and of other sets: which class every picture gets."""

from __future__ import annotations

import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")

from mobilesteelnet.layouts import NEU_CLASSES, object_names, recognise
from mobilesteelnet.pictures import DataError, PictureError

SHORT = {
    "Cr": "crazing",
    "In": "inclusion",
    "Pa": "patches",
    "PS": "pitted_surface",
    "RS": "rolled-in_scale",
    "Sc": "scratches",
}


def annotation(*names: str) -> bytes:
    objects = "".join(
        f"<object><name>{name}</name><part><name>x</name></part></object>" for name in names
    )
    return f"<annotation><folder>cr</folder>{objects}</annotation>".encode()


def no_file(name: str) -> bytes:
    raise AssertionError(f"{name} must not be read")


def classes(names):
    return recognise(names, no_file).classes


NEU_LAYOUTS = {
    "plain": lambda c, s: f"{c}/{c}_1.jpg",
    "wrapped": lambda c, s: f"NEU-DET/{c}/{c}_1.jpg",
    "wrapped_twice": lambda c, s: f"download/NEU-CLS/{c}/{s}_1.bmp",
    "short_directories": lambda c, s: f"{s}/{s}_1.bmp",
    "capitals_and_spaces": lambda c, s: f"{c.title().replace('_', ' ')}/1.png",
    "underscores": lambda c, s: f"{c.replace('-', '_')}/1.png",
    "last_word_left_out": lambda c, s: f"{c.split('_')[0].replace('-in', '').title()}/1.png",
    "flat_short": lambda c, s: f"{s}_1.bmp",
    "flat_wrapped": lambda c, s: f"NEU-CLS/{s}_21.bmp",
    "flat_long": lambda c, s: f"IMAGES/{c}_1.jpg",
    "flat_in_splits": lambda c, s: f"NEU/{'train' if s < 'P' else 'test'}/{s}_1.bmp",
    "one_split_directory": lambda c, s: f"NEU-DET/train/images/{c}/{c}_1.jpg",
}


@pytest.mark.parametrize("layout", sorted(NEU_LAYOUTS))
def test_neu_under_its_usual_layouts(layout):
    names = {NEU_LAYOUTS[layout](c, s): c for s, c in SHORT.items()}
    assert classes(names) == names
    assert set(names.values()) == set(NEU_CLASSES)


def test_split_directories_are_merged():
    names = {}
    for n, side in enumerate(("train", "validation")):
        for c in NEU_CLASSES:
            names[f"NEU-DET/{side}/images/{c}/{c}_{n}.jpg"] = c
    notes = [f"NEU-DET/train/annotations/{c}_0.xml" for c in NEU_CLASSES]
    layout = recognise([*names, *notes], no_file)
    assert layout.classes == names
    assert layout.bad == {}


@pytest.mark.parametrize(
    "directories",
    [
        ("Cr", "In", "Pa"),  # three of the six only: may be anything
        ("Cr", "In", "Pa", "PS", "RS", "Sc", "Ox"),
        ("OK", "not ok"),
        ("1", "2", "10"),
        ("test", "dent"),
        ("Größe", "キズ"),
    ],
)
def test_other_class_names_are_taken_as_they_are(directories):
    names = {f"{d}/{n}.png": d for d in directories for n in range(2)}
    assert classes(names) == names


def test_directories_inside_a_class_belong_to_it():
    names = {"dent/left/1.png": "dent", "dent/2.png": "dent", "rust/a/b/3.png": "rust"}
    assert classes(names) == names


def test_files_that_belong_nowhere_are_reported():
    names = ["w/dent/1.png", "w/dent/2.gif", "w/dent/3", "w/rust/1.png", "w/rust/n.txt", "w/x.png"]
    layout = recognise([*names, "w/setup.exe", "x.doc"], no_file)
    assert set(layout.classes) == {"w/dent/1.png", "w/rust/1.png"}
    assert set(layout.bad) == {"w/dent/2.gif", "w/dent/3", "w/x.png"}
    assert "none of .bmp" in layout.bad["w/dent/2.gif"]


def test_flat_picture_without_a_neu_name_is_reported():
    layout = recognise(["Cr_1.bmp", "In_2.bmp", "holiday.jpg"], no_file)
    assert layout.classes == {"Cr_1.bmp": "crazing", "In_2.bmp": "inclusion"}
    assert list(layout.bad) == ["holiday.jpg"]


@pytest.mark.parametrize("names", [[], ["a.png"], ["train/a.png", "val/b.png"], ["images/a.png"]])
def test_no_classes_is_an_error(names):
    with pytest.raises(DataError, match="no classes found"):
        recognise(names, no_file)


# VOC --------------------------------------------------------------------------------------------


def voc(files: dict[str, bytes], pictures: list[str]):
    return recognise([*files, *pictures], files.__getitem__)


@pytest.mark.parametrize("root", ["", "NEU-DET/", "NEU-DET/train/"])
def test_voc_takes_the_class_from_the_annotation(root):
    files = {f"{root}ANNOTATIONS/p{n}.xml": annotation(c, c) for n, c in enumerate(NEU_CLASSES)}
    pictures = {f"{root}IMAGES/p{n}.jpg": c for n, c in enumerate(NEU_CLASSES)}
    layout = voc(files, list(pictures))
    assert layout.classes == pictures
    assert layout.bad == {}


def test_voc_with_several_objects_falls_back_on_the_file_name():
    files = {
        "Annotations/scratches_1.xml": annotation("inclusion", "scratches"),
        "Annotations/inclusion_1.xml": annotation("inclusion"),
        "Annotations/patches_3.xml": annotation(),
        "Annotations/photo_1.xml": annotation("inclusion", "scratches"),
    }
    stems = ["scratches_1", "inclusion_1", "patches_3", "photo_1", "scratches_2", "photo_2"]
    layout = voc(files, [f"JPEGImages/{stem}.jpg" for stem in stems])
    assert layout.classes == {
        "JPEGImages/scratches_1.jpg": "scratches",
        "JPEGImages/inclusion_1.jpg": "inclusion",
        "JPEGImages/patches_3.jpg": "patches",
        "JPEGImages/scratches_2.jpg": "scratches",
    }
    assert "names 2 classes" in layout.bad["JPEGImages/photo_1.jpg"]
    assert "is missing" in layout.bad["JPEGImages/photo_2.jpg"]


def test_voc_of_another_set_uses_its_own_names():
    files = {"ANNOTATIONS/a.xml": annotation("Deep Dent"), "ANNOTATIONS/b.xml": annotation("rust")}
    layout = voc(
        files, ["IMAGES/a.png", "IMAGES/b.png", "IMAGES/deep-dent_7.png", "IMAGES/cr_1.png"]
    )
    assert layout.classes == {
        "IMAGES/a.png": "Deep Dent",
        "IMAGES/b.png": "rust",
        "IMAGES/deep-dent_7.png": "Deep Dent",
    }
    assert list(layout.bad) == ["IMAGES/cr_1.png"]


BOMB = b"""<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>
<annotation><object><name>&b;</name></object></annotation>"""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, "document type"),
        (b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', "document type"),
        (b"<annotation><object>", "not well-formed"),
        (b"", "not well-formed"),
        (b'<?xml version="1.0" encoding="no-such"?><a/>', "not well-formed"),
        (b"<a>" + b" " * 2**20 + b"</a>", "longer than"),
        (b"\xff\xfe\x00", "not well-formed"),
    ],
)
def test_hostile_annotations_are_refused(content, reason):
    with pytest.raises(PictureError, match=reason):
        object_names(content)
    files = {"ANNOTATIONS/a.xml": content, "ANNOTATIONS/b.xml": annotation("rust")}
    layout = voc(files, ["IMAGES/a.png", "IMAGES/b.png"])
    assert "its annotation 'ANNOTATIONS/a.xml'" in layout.bad["IMAGES/a.png"]
    assert layout.classes == {"IMAGES/b.png": "rust"}


def test_object_names_are_those_of_objects_only():
    assert object_names(annotation("b", " a ", "b")) == ["a", "b"]
    assert object_names("<a><object><name>Größe &amp; x</name></object></a>".encode()) == [
        "Größe & x"
    ]


# Folders beside those of classes ----------------------------------------------------------------


def test_folders_in_which_nothing_is_read_are_named():
    names = ["dent/1.png", "rust/2.png", "hole/1.webp", "hole/2.webp", "notes/a.txt", "w/x/3.gif"]
    layout = recognise(names, no_file, empty=["burr", "dent/none", "other/deep"])
    assert set(layout.classes.values()) == {"dent", "rust"}
    assert layout.bad == {
        "hole/": "holds no picture that is read: 2 other files, such as '1.webp'",
        "w/": "holds no picture that is read: 1 other files, such as '3.gif'",
        "burr/": "is an empty folder",
    }
    wrapped = recognise([f"w/{name}" for name in names] + ["tools/x.exe"], no_file, ["burr"])
    assert set(wrapped.bad) == {"w/hole/", "w/w/"}


def test_parts_of_a_split_beside_another_folder_are_no_classes():
    parts = ["train/good/1.png", "test/good/2.png", "test/crack/3.png"]
    with pytest.raises(DataError, match=r"'test', 'train' hold folders.*'ground_truth' beside"):
        recognise([*parts, "ground_truth/crack/3_mask.png"], no_file)
    assert set(classes(parts).values()) == {"good", "crack"}
    vehicles = {"train/1.png": "train", "car/2.png": "car"}
    assert classes(vehicles) == vehicles


def test_parts_of_a_split_that_are_merged_are_told_of():
    names = [f"{part}/{c}/{c}_1.jpg" for part in ("train", "test") for c in ("a", "b")]
    assert recognise(names, no_file).kind == "class directories, test, train taken together"
    assert recognise(names[:2], no_file).kind == "class directories"
    voc = [f"{part}/IMAGES/{c}_1.jpg" for part in ("train", "val") for c in ("a", "b")]
    notes = [name.replace("IMAGES", "ANNOTATIONS").replace(".jpg", ".xml") for name in voc]
    read = {note: annotation(note.rpartition("/")[2][0]) for note in notes}
    kind = recognise([*voc, *notes], read.__getitem__).kind
    assert kind == "VOC (pictures and XML annotations), train, val taken together"
