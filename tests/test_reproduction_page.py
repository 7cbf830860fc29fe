"""Reproduction from the command line: tables, other sets, costs, and the page."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")
from reproduction_cases import CHANGES, RUNS, places, set_options  # noqa: F401
from run_cases import CPU, pictures  # noqa: F401
from training_cases import CLASSES, ROOT, one_thread  # noqa: F401

from mobilesteelnet.__main__ import main
from mobilesteelnet.data import scan
from mobilesteelnet.recipes import OURS, PUBLISHED
from mobilesteelnet.reproduction import drawings, sets
from mobilesteelnet.reproduction.cost import count_flop, measure_cost
from mobilesteelnet.reproduction.grid import NETWORKS, TABLES
from mobilesteelnet.reproduction.page import write_page
from mobilesteelnet.reproduction.runner import Places, finish_runs, read_result
from mobilesteelnet.reproduction.summary import read_results
from mobilesteelnet.run_folder import RunFolderError, write_json


def test_tables_and_page_from_the_command_line(
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(pictures)]
    table7 = ["reproduce", "table7", *data, "--seeds", "2", *set_options()]
    assert main([*table7, "--list"]) == 0
    assert "8 runs" in capsys.readouterr().out
    for part in ("1/2", "2/2"):
        assert main([*table7, "--part", part]) == 0
    assert len(list(Path("results/published").glob("*.json"))) == 8
    assert main(["reproduce", "ours", *data, "--seeds", "1", *set_options()]) == 0
    ablated = ["reproduce", "table7", *data, "--recipe", "ours", "--only", "msff", "--seeds", "1"]
    assert main([*ablated, *set_options()]) == 0
    quick = set_options(epochs=1, attention="none", fusion="none")
    judged = ["reproduce", "recipe", *data, "--only"]
    assert main([*judged, "published,mixup", *quick]) == 0
    assert main([*judged, "dropout", "--fits", "1", *quick]) == 0
    assert main(["reproduce", "table3", *data]) == 0
    sizes = ["--set", "size=32", "--set", "batch_size=2", "--accelerator", "cpu"]
    assert main(["reproduce", "table8", "--only", "backbone,mobilesteelnet", *sizes]) == 0
    run = "runs/reproduce/ours/mobilesteelnet-seed42"
    assert main(["robustness", run, "--json", "results/robustness.json"]) == 0
    assert main(["reproduce", "sets", *data, "--seeds", "1", *set_options()]) == 0
    notes = {
        "table7": {"msff": "it was trained for two epochs."},
        "sets": {pictures.stem: "squares."},
    }
    write_json("results/notes.json", notes)
    half = Path("results/published/msff-seed43.json")
    half.write_text(half.read_text().replace('"32-true"', '"bf16-mixed"'))
    assert main(["reproduce", "page"]) == 0
    page = Path("RESULTS.md").read_text()
    results = read_results(Path("results"))
    for network in TABLES["table7"].rows:
        accuracy = results.rows[PUBLISHED, network].accuracy
        assert len(accuracy.values) == 2
        assert f"| {NETWORKS[network].name} | 2 | {accuracy.percent()} |" in page
    assert "86.00" in page
    assert "points below the paper's figure: it was trained for two epochs." in page
    assert "points below the paper's figure: no reason is known yet." in page
    assert "**not** made by the recipe as it stands: " in page
    assert "epochs 2" in page
    assert "Trained with `--precision bf16-mixed`: + MSFF (seed 43); all others in" in page
    assert "+ MSFF (seed 43)" not in page.partition("## The modules by")[2].partition("## ")[0]
    assert "published was **not** judged as it stands: " in page
    assert f"{pictures.stem} by ours: + CIEMA was **not** made by the recipe as it" in page
    tested = results.robustness["pictures"]
    assert f"{tested} pictures (test), network mobilesteelnet-seed42, softmax at " in page
    both = [results.rows[recipe, "msff"].accuracy.percent() for recipe in (OURS, PUBLISHED)]
    assert f"| + MSFF | 1 | {both[0]} | {both[1]} |" in page
    by = results.sets[pictures.stem]
    assert set(by) == {PUBLISHED, OURS}
    figures = " | ".join(by[recipe].accuracy.percent() for recipe in (PUBLISHED, OURS))
    assert f"| {pictures.stem} | {len(CLASSES)} | {figures} | 1 |" in page
    assert f"* {pictures.stem}: squares." in page
    headings = ("Table 3", "Table 7", "Table 8", "How the recipe was chosen", "The modules")
    headings += ("Other", "Changed")
    for heading in headings:
        assert f"## {heading}" in page
    for line in page.splitlines():
        if line.startswith("!["):
            assert Path(line.partition("](")[2].rstrip(")")).is_file(), line
    names = {path.stem for path in Path("docs/results").iterdir()}
    assert names == {"confusion", "curves", "cost", "calibration", "contrast"}
    assert main(["reproduce", "page"]) == 0
    assert Path("RESULTS.md").read_text() == page


def test_sets_are_made_where_they_are_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The digits are scikit-learn's, which the tests do not need: a set of its form stands in."""
    ink = np.random.default_rng(0).integers(0, 16, (24, 8, 8)).astype(float)
    ink[:, 3, 3] = 16
    found = SimpleNamespace(images=ink, target=np.arange(24) % 4)
    modules = {"sklearn": SimpleNamespace(), "sklearn.datasets": SimpleNamespace()}
    modules["sklearn.datasets"].load_digits = lambda: found
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sets, "_SYNTHETIC_PER_CLASS", 4)
    monkeypatch.chdir(tmp_path)
    command = ["reproduce", "sets", "--seeds", "1", *set_options(epochs=1)]
    assert main([*command, "--only", "digits"]) == 0
    assert main(command) == 0
    digits = scan(Path("runs/reproduce/sets/digits/pictures"))
    assert digits.classes == ["digit0", "digit1", "digit2", "digit3"]
    assert len(digits) == 24
    assert np.asarray(digits.open(0)).max() == 255
    results = read_results(Path("results"))
    assert {name: set(rows) for name, rows in results.sets.items()} == {
        "digits": {PUBLISHED, OURS},
        "synthetic": {PUBLISHED, OURS},
    }
    capsys.readouterr()
    assert main([*command, "--list"]) == 0
    assert capsys.readouterr().out.count("done") == 4
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    shutil.rmtree("runs")
    capsys.readouterr()
    assert main([*command, "--list"]) == 0
    assert "digits: pictures to make, 2 runs to do" in capsys.readouterr().out
    assert not Path("runs").exists()
    assert main([*command, "--only", "digits"]) != 0
    assert "mobilesteelnet[sets]" in capsys.readouterr().err


def test_only_other_sets_make_a_page_too(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "sets" / "nothing").mkdir(parents=True)
    one = ["reproduce", "sets", "--seeds", "1", *set_options(epochs=1), "--precision", "bf16-mixed"]
    monkeypatch.chdir(places.data)
    results = str(tmp_path / "results")
    assert main([*one, "--data", ".", "--runs", str(tmp_path / "runs"), "--results", results]) == 0
    name = Path(places.data).name
    assert (tmp_path / "results" / "sets" / name).is_dir()
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "page"]) == 0
    page = Path("RESULTS.md").read_text()
    assert f"| {name} | " in page
    assert "All trained with `--precision bf16-mixed`." in page
    assert "nothing" not in page.partition("## Other")[2].partition("| ")[2]
    for wrong in ({"table7": "text"}, ["text"], {"table7": {"msff": 3}}):
        write_json("results/notes.json", wrong)
        assert main(["reproduce", "page"]) == 2
    assert Path("RESULTS.md").read_text() == page


def test_sets_of_two_versions_have_two_names() -> None:
    names = [sets.set_name(Path(text)) for text in ("a/plates.v1", "a/plates.v2", "a/b.zip", "/")]
    assert names == ["plates.v1", "plates.v2", "b", "pictures"]


def test_accuracy_is_drawn_over_the_cost_of_its_own_size() -> None:
    cost = {"flop": count_flop("backbone", 64), "input_size": 64}
    assert drawings._flop("backbone", 64, {**cost, "flop": 1.0}) == 1.0
    quarter = drawings._flop("backbone", 32, cost)
    assert quarter == pytest.approx(cost["flop"] / 4, rel=0.01)
    found = read_results(ROOT / "results")
    if (OURS, "mobilesteelnet") in found.rows and "mobilesteelnet" in found.costs:
        size = found.rows[OURS, "mobilesteelnet"].results[0]["config"]["size"]
        measured = found.costs["mobilesteelnet"]
        share = drawings._flop("mobilesteelnet", size, measured) / measured["flop"]
        assert share == pytest.approx((size / measured["input_size"]) ** 2, rel=0.02)


def test_costs_of_other_options_are_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table = ["reproduce", "table8", "--only", "backbone", "--accelerator", "cpu"]
    table += ["--set", "batch_size=2", "--set"]
    assert main([*table, "size=32", "--list"]) == 0
    assert "backbone: to do" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main([*table, "size=32"]) == 0
    before = Path("results/cost/backbone.json").read_text()
    capsys.readouterr()
    assert main([*table, "size=32"]) == 0
    assert "there already, of " in capsys.readouterr().out
    assert main([*table, "size=64"]) == 2
    assert "input_size=32, not 64" in capsys.readouterr().err
    assert main([*table, "size=32", "--backend", "reference"]) == 2
    assert "backend=None, not 'reference'" in capsys.readouterr().err
    assert Path("results/cost/backbone.json").read_text() == before


@pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="no results are committed yet")
def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path) -> None:
    write_page(ROOT / "results", tmp_path / "RESULTS.md", tmp_path / "docs" / "results")
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "RESULTS.md").read_text()


def test_the_page_says_nothing_without_results(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no results"):
        write_page(tmp_path / "results", tmp_path / "page.md", tmp_path / "figures")
    assert not (tmp_path / "page.md").exists()


def test_runs_of_one_row_have_the_same_options(places: Places) -> None:
    finish_runs(RUNS, places, CHANGES, machine=CPU)
    path = places.result(RUNS[1])
    result = read_result(path)
    del result["config"]["light"]  # as in a result of before there was such an option
    write_json(path, result)
    assert len(read_results(places.results).rows[PUBLISHED, "backbone"].results) == 2
    result["config"]["epochs"] = 9
    write_json(path, result)
    with pytest.raises(RunFolderError, match="different options"):
        read_results(places.results)


def test_costs_are_those_of_the_network() -> None:
    cost = measure_cost("resnet18", device=torch.device("cpu"), size=32, batch=2, repeats=2)
    assert cost["parameters"] == 11_179_590
    assert cost["images_per_second"] == pytest.approx(1 / cost["forward_seconds"])
    assert cost["training_seconds_an_image"] > 0
    assert "frozen_seconds" not in cost
    ours = measure_cost("backbone", device=torch.device("cpu"), size=32, batch=2, repeats=2)
    assert ours["frozen_seconds"] > 0
    assert ours["machine"]["precision"] == "32-true"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["table1"], 2, "must be one of table3"),
        (["table7"], 2, "--data is needed"),
        (["table7", "--data", "nowhere", "--part", "3/2"], 2, "--part '3/2'"),
        (["table7", "--data", "nowhere", "--only", "vgg"], 2, "--only 'vgg'"),
        (["table7", "--data", "nowhere", "--seeds", "0"], 2, "seeds=0"),
        (["table7", "--data", "nowhere", "--set", "colour=1"], 2, "setting 'colour=1'"),
        (["table7", "--data", "nowhere", "--recipe", "theirs"], 2, "recipe='theirs'"),
        (["table7", "--data", "nowhere"], 3, "does not exist"),
        (["table6", "--epochs", "3"], 2, "epochs has no meaning"),
        (["table6", "--set", "epochs=3"], 2, "--set epochs has no meaning"),
        (["table8", "--part", "1/2"], 2, "--part has no meaning"),
        (["table3", "--data", "nowhere", "--only", "x"], 2, "--only has no meaning"),
        (["table7", "--data", "nowhere", "--fits", "1"], 2, "--fits has no meaning"),
        (["table7", "--data", "nowhere", "--set", "seed=7"], 2, "--set seed has no meaning"),
        (["ours", "--data", "nowhere", "--set", "fusion=none"], 2, "--set fusion has no"),
        (["recipe", "--data", "nowhere", "--seeds", "2"], 2, "--seeds has no meaning"),
        (["sets", "--recipe", "ours"], 2, "--recipe has no meaning"),
        (["page", "--list"], 2, "--list has no meaning"),
        (["sets", "--only", "faces"], 2, "--only 'faces'"),
        (["sets", "--seeds", "0"], 2, "seeds=0"),
        (["page", "--results", "nowhere"], 2, "holds no results"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == code
    errors = capsys.readouterr().err
    assert words in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
