"""The real pictures: what the set holds, and the whole command line on it, killed in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, shared_path

pytest.importorskip("PIL", reason="Pillow is not installed")

from mobilesteelnet.data import (
    PictureSet,
    scan,
    stratified_split,
)
from mobilesteelnet.datacheck import check, contrast_table


@pytest.fixture(scope="module")
def archive() -> Path:
    return shared_path("data", "neu-det.zip")


@pytest.fixture(scope="module")
def pictures(archive: Path) -> PictureSet:
    return scan(archive, on_bad_file="fatal")


def test_is_read_whole(pictures: PictureSet) -> None:
    assert pictures.classes == [
        "crazing",
        "inclusion",
        "patches",
        "pitted_surface",
        "rolled-in_scale",
        "scratches",
    ]
    assert [pictures.labels.count(label) for label in range(6)] == [300] * 6
    assert {(p.width, p.height) for p in pictures.items} == {(200, 200)}
    (group,) = pictures.duplicate_groups()
    assert [pictures.items[i].name for i in group] == [
        "patches/patches_101.jpg",
        "patches/patches_105.jpg",
    ]


def test_gives_the_four_contrasts_of_the_paper(pictures: PictureSet) -> None:
    rows = {row["class"]: row for row in contrast_table(pictures)}
    assert rows["patches"]["max"] == pytest.approx(74.21, abs=0.006)
    assert rows["inclusion"]["min"] == pytest.approx(5.97, abs=0.006)
    assert rows["crazing"]["max"] == pytest.approx(51.54, abs=0.006)
    assert rows["scratches"]["max"] == pytest.approx(49.02, abs=0.006)


def test_splits_as_the_paper(pictures: PictureSet) -> None:
    split = stratified_split(pictures)
    sides = (split.train, split.val, split.test)
    assert [len(side) for side in sides] == [90, 90, 1620]
    for side, each in zip(sides, (15, 15, 270), strict=True):
        assert [sum(pictures.labels[i] == label for i in side) for label in range(6)] == [each] * 6
    for seed in range(20):
        split = stratified_split(pictures, seed=seed)
        pair = set(pictures.duplicate_groups()[0])
        assert any(pair <= set(side) for side in (split.train, split.val, split.test))


def test_data_check_has_one_pair_and_the_figures_of_table_3(pictures: PictureSet) -> None:
    report = check(pictures)
    assert report.ok
    assert report.sizes == {"200 x 200": 1800}
    assert report.duplicates == [["patches/patches_101.jpg", "patches/patches_105.jpg"]]


# --------------------------------------------------------------------- the whole command line


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mobilesteelnet", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, out[-2000:] + err[-2000:]
    return out + err


def epochs_done(run: Path) -> int:
    metrics = run / "metrics.csv"
    return len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0


@pytest.mark.slow
def test_train_killed_and_resumed_then_eval_and_predict(archive: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--size", 64, "--width", 0.125, "--epochs", 4, "--workers", 0)
    process = start("train", "--data", archive, "--out", run, *options)
    deadline = time.monotonic() + 300
    while epochs_done(run) < 1 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 1 <= epochs_done(run) < 4, "the run was to be killed between its first and last epoch"
    finish(start("train", "--resume", run))
    assert epochs_done(run) == 4
    assert len(json.loads((run / "split.json").read_text())["train"]) == 90

    finish(start("eval", run, "--split", "val"))
    (page,) = run.glob("eval-val/*.html")
    assert "://" not in page.read_text().replace("http://www.w3.org", "")

    with zipfile.ZipFile(archive) as source:
        for name in ("crazing/crazing_1.jpg", "patches/patches_2.jpg"):
            source.extract(name, tmp_path / "plates")
    (tmp_path / "plates" / "broken.jpg").write_bytes(b"no picture")
    table = tmp_path / "result.json"
    told = finish(start("predict", run, tmp_path / "plates", "--json", table), code=1)
    assert "broken.jpg" in told
    names = {Path(row["name"]).name for row in json.loads(table.read_text())["predictions"]}
    assert names == {"crazing_1.jpg", "patches_2.jpg"}
