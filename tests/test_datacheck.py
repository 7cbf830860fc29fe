"""The report of `data check`: its facts, JSON, terminal form and box plot."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image

from mobilesteelnet.data import DataError, scan
from mobilesteelnet.datacheck import check, contrast_box_plot


@pytest.fixture
def mixed(tmp_path):
    """Two classes: a duplicate inside one, a picture that is in both, two bad files."""
    rng = np.random.default_rng(0)
    root = tmp_path / "set [red]"
    for name in ("dent", "rust [bold]"):
        (root / name).mkdir(parents=True)
        for n in range(3):
            pixels = rng.integers(0, 256, (8 + n % 2, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{n}.png")
    dent, rust = root / "dent", root / "rust [bold]"
    (dent / "copy.png").write_bytes((dent / "1.png").read_bytes())
    (rust / "both.png").write_bytes((dent / "2.png").read_bytes())
    (dent / "empty.png").write_bytes(b"")
    (rust / "page.gif").write_bytes(b"GIF")
    return root


def shown(report) -> str:
    console = pytest.importorskip("rich.console", reason="rich is not installed")
    stream = io.StringIO()
    # Wide enough for any temporary folder's name: what is tested is the text, not its wrapping.
    console.Console(file=stream, width=400).print(report)
    return stream.getvalue()


def test_report_holds_the_facts(mixed):
    report = check(scan(mixed))
    assert (report.pictures, report.layout, report.ok) == (8, "class directories", False)
    assert report.sizes == {"8 x 8": 5, "8 x 9": 3}
    assert [(row["class"], row["count"]) for row in report.contrast] == [
        ("dent", 4),
        ("rust [bold]", 4),
    ]
    assert report.duplicates == [
        ["dent/1.png", "dent/copy.png"],
        ["dent/2.png", "rust [bold]/both.png"],
    ]
    assert report.conflicts == [["dent/2.png", "rust [bold]/both.png"]]
    assert [file["name"] for file in report.bad] == ["dent/empty.png", "rust [bold]/page.gif"]


def test_report_is_plain_json(mixed):
    report = check(scan(mixed))
    assert json.loads(report.to_json()) == report.to_dict()
    assert report.to_dict()["ok"] is False


def test_terminal_form_names_everything_and_reads_no_markup(mixed):
    text = shown(check(scan(mixed)))
    for part in (
        "set [red]: 8 pictures in 2 classes, class directories",
        "rust [bold]",
        "8 x 8 (5), 8 x 9 (3)",
        "exact duplicates: 2",
        "dent/1.png = dent/copy.png",
        "same picture in two classes: 1",
        "bad files: 2",
        "dent/empty.png is empty",
        "see above before training",
    ):
        assert part in text


def test_a_clean_set_is_ok(mixed):
    for name in ("dent/copy.png", "dent/empty.png", "rust [bold]/both.png", "rust [bold]/page.gif"):
        (mixed / name).unlink()
    report = check(scan(mixed))
    assert report.ok
    assert "bad files: none" in shown(report)
    assert "usable as it is" in shown(report)


def test_long_lists_are_cut_on_the_terminal_only(mixed):
    for n in range(30):
        (mixed / "dent" / f"bad_{n}.png").write_bytes(b"x")
    report = check(scan(mixed))
    assert len(report.bad) == 32
    text = shown(report)
    assert "bad files: 32" in text
    assert "… and 12 more" in text


def test_box_plot_is_a_picture(mixed, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = contrast_box_plot(scan(mixed), tmp_path / "contrast.png")
    image = Image.open(path)
    assert image.format == "PNG"
    assert image.width > 500
    assert np.asarray(image.convert("L")).std() > 5


def test_unlabelled_sets_are_refused(mixed, tmp_path):
    pictures = scan(mixed, labelled=False)
    for action in (
        lambda: check(pictures),
        lambda: contrast_box_plot(pictures, tmp_path / "c.png"),
    ):
        with pytest.raises(DataError, match="without labels"):
            action()
