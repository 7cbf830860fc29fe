"""The report: self-contained, escaped, accessible, and right about its figures."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
from PIL import Image
from training_cases import (
    CLASSES,
    NORMALISATION,
    SIZE,
    make_pictures,
    one_thread,  # noqa: F401
    small_network,
)

from mobilesteelnet import figures
from mobilesteelnet.checkpoint import Checkpoint
from mobilesteelnet.data import scan
from mobilesteelnet.evaluate import Evaluation, evaluate
from mobilesteelnet.report import ReportFiles, write_report
from mobilesteelnet.run_folder import RunFolder

HOSTILE = "<script>alert('x')</script> & $x^2$ ü"
VOID = {"meta", "img", "source", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects tags and checks that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportFiles, Evaluation]:
    folder = make_pictures(tmp_path_factory.mktemp("set") / "pictures", per_class=4)
    (folder / "lines").rename(folder / HOSTILE.replace("/", "|"))
    pictures = scan(folder)
    training = {"epoch": 2, "options": {"a": 1}}
    checkpoint = Checkpoint(
        small_network(), pictures.classes, SIZE, NORMALISATION, training, temperature=1.25
    )
    evaluation = evaluate(checkpoint, pictures, range(len(pictures)), split="test")
    run = RunFolder(tmp_path_factory.mktemp("run"))
    row: dict[str, Any] = {"train_loss": 1.0, "train_accuracy": 0.5, "val_accuracy": 0.25}
    run.write_rows([{"epoch": epoch, **row, "val_loss": 2.0 / epoch} for epoch in (1, 2, 3)])
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    files = write_report(out, evaluation, checkpoint, pictures, run=run, command="eval <x>")
    return files, evaluation


def test_the_page_needs_nothing_else(made: tuple[ReportFiles, Evaluation]) -> None:
    text = made[0].page.read_text(encoding="utf-8")
    page = Page(text)
    assert "<th scope=row>logits divided by</th><td>1.25</td>" in text
    assert "$" not in re.sub(r"\$x\^2\$", "", re.sub(r"base64,[^\"]+", "", text))
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object"}
        for key in ("src", "srcset", "href"):
            value = attributes.get(key)
            assert value is None or value.startswith("data:image/"), (tag, value)
    assert "url(" not in text
    assert not re.search(r"https?://", text)


def test_user_text_is_escaped(made: tuple[ReportFiles, Evaluation]) -> None:
    text = made[0].page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in text
    assert "eval &lt;x&gt;" in text


def test_every_image_has_words_and_can_be_shown(made: tuple[ReportFiles, Evaluation]) -> None:
    page = Page(made[0].page.read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) >= 3 + len(made[1].wrong)
    for attributes in images:
        assert attributes.get("alt")
        source = attributes["src"]
        assert source is not None
        content = base64.b64decode(source.partition("base64,")[2])
        Image.open(io.BytesIO(content)).load()
    assert dict(page.tags[0][1])["lang"] == "en"


def test_the_figures_are_those_of_the_evaluation(made: tuple[ReportFiles, Evaluation]) -> None:
    files, evaluation = made
    words = " ".join(Page(files.page.read_text(encoding="utf-8")).texts)
    assert f"{100 * evaluation.average_accuracy:.2f} %" in words
    assert f"{len(evaluation.wrong)} of 12" in words
    assert "Where the network looks" in words
    assert "epoch 2" in words
    for item in evaluation.per_class:
        assert item.accuracy is not None
        assert f"{100 * item.accuracy:.2f}" in words
    content = json.loads(files.json.read_text(encoding="utf-8"))
    assert content == json.loads(json.dumps(evaluation.to_dict()))
    names = {path.name for path in files.images}
    drawn = ("confusion_matrix", "class_accuracy", "training_curves", "calibration")
    assert names == {f"{name}.png" for name in drawn}
    assert evaluation.calibration is not None
    assert f"{100 * evaluation.calibration.expected_error:.2f} %" in words
    assert "gate laid over them" in words
    for path in files.images:
        assert min(Image.open(path).size) > 200


def test_without_gate_run_or_mistakes(tmp_path: Path) -> None:
    pictures = scan(make_pictures(tmp_path / "set", per_class=2))
    model = small_network(attention="none", fusion="none")
    checkpoint = Checkpoint(model, CLASSES, SIZE, NORMALISATION)
    right = evaluate(checkpoint, pictures, range(len(pictures)))
    perfect = [
        item.__class__(item.name, item.true, item.true, [1, 0, 0]) for item in right.predictions
    ]
    right = Evaluation(**{**right.__dict__, "predictions": perfect})
    files = write_report(tmp_path / "out", right, checkpoint, pictures)
    words = " ".join(Page(files.page.read_text(encoding="utf-8")).texts)
    assert "Where the network looks" not in words
    assert "Training" not in words
    assert "None." in words
    drawn = ["confusion_matrix.png", "class_accuracy.png", "calibration.png"]
    assert [path.name for path in files.images] == drawn


@pytest.mark.parametrize("number", [2, 24])
def test_figures_of_few_and_many_classes(number: int) -> None:
    from mobilesteelnet.evaluate import ClassResult

    names = [f"a rather long name of class {place} $\\frac$" for place in range(number)]
    matrix = np.eye(number, dtype=int) * 5
    matrix[0, 1] = 3
    classes = [ClassResult(name, 5, 0.5, 0.5, None) for name in names]
    evaluation = Evaluation("all", names, 0, 0, 0, 0, 0, classes, matrix.tolist(), [], 1.0)
    for theme in (figures.LIGHT, figures.DARK):
        for draw in (figures.confusion_matrix, figures.class_bars):
            assert Image.open(io.BytesIO(draw(evaluation, theme))).format == "PNG"


def test_the_gate_is_bright_where_it_is_open() -> None:
    picture = Image.new("RGB", (60, 40), (128, 128, 128))
    gate = np.zeros((4, 6), dtype=np.float32) + 0.4
    gate[:, 4:] = 0.6
    overlay = np.asarray(figures.gate_overlay(picture, gate).convert("L"), dtype=float)
    assert overlay.shape == (40, 60)
    assert overlay[:, 50:].mean() > overlay[:, :20].mean() + 50
    flat = figures.gate_overlay(picture, np.full((4, 6), 0.5, dtype=np.float32))
    assert len(np.unique(np.asarray(flat).reshape(-1, 3), axis=0)) == 1
