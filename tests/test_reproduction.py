"""Reproduction: which runs a table needs, resuming run by run, and the page."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")
from run_cases import CPU, SMALL, pictures, small  # noqa: F401
from training_cases import CLASSES, ROOT, one_thread  # noqa: F401

from mobilesteelnet.__main__ import main
from mobilesteelnet.checkpoint import load_checkpoint
from mobilesteelnet.data import scan, stratified_split
from mobilesteelnet.evaluate import evaluate
from mobilesteelnet.lightning_modules import Classifier
from mobilesteelnet.recipes import OURS, PUBLISHED
from mobilesteelnet.reproduction import runner, sets
from mobilesteelnet.reproduction.cost import measure_cost
from mobilesteelnet.reproduction.grid import (
    COST_TABLES,
    NETWORKS,
    TABLES,
    PlannedRun,
    paper_figures,
    plan_runs,
)
from mobilesteelnet.reproduction.listing import in_words, list_runs
from mobilesteelnet.reproduction.page import write_page
from mobilesteelnet.reproduction.runner import Places, finish_runs, read_result
from mobilesteelnet.reproduction.summary import read_results
from mobilesteelnet.run_folder import RunFolder, RunFolderError, write_json
from mobilesteelnet.runs import finish_run
from mobilesteelnet.splits import Split
from mobilesteelnet.train import TrainConfig, TrainingError, resume, train

CHANGES = {key: value for key, value in SMALL.items() if key != "patience"}
RUNS = [PlannedRun("backbone", PUBLISHED, seed) for seed in (42, 43)]


def set_options(**changes: Any) -> list[str]:
    options: list[str] = []
    for name, value in {**CHANGES, **changes}.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        options += ["--set", f"{name}={text}"]
    return [*options, "--accelerator", "cpu"]


@pytest.fixture
def places(pictures: Path, tmp_path: Path) -> Places:
    return Places(str(pictures), tmp_path / "runs", tmp_path / "results")


# -------------------------------------------------------------------------------------------- grid


def test_the_paper_has_no_figures_of_unknown_rows() -> None:
    paper = paper_figures()
    for table, rows in paper["accuracy"].items():
        assert set(rows) <= set(TABLES[table].rows), table
    assert set(paper["cost"]) <= set(COST_TABLES["table6"].rows)
    for table in (*TABLES.values(), *COST_TABLES.values()):
        assert set(table.rows) <= set(NETWORKS)


def test_a_table_has_one_run_of_each_network_a_seed() -> None:
    planned = plan_runs("table7", 5)
    assert len(set(planned)) == len(planned) == 20
    assert {run.seed for run in planned} == {42, 43, 44, 45, 46}
    assert Counter(run.network for run in planned[:4]).most_common(1)[0][1] == 1
    configs = [run.config("x", {}) for run in planned]
    assert {config.split_seed for config in configs} == {42}
    whole = replace(TrainConfig(data="x", split_seed=42), seed=44)
    assert PlannedRun("mobilesteelnet", PUBLISHED, 44).config("x", {}) == whole
    ours = PlannedRun("resnet18", OURS, 42).config("x", {"epochs": 3})
    assert (ours.network, ours.schedule, ours.epochs) == ("resnet18", "cosine", 3)
    assert ours.bn_statistics == "sequential"  # no option of a ResNet
    for wrong in ({"table": "table1", "seeds": 1}, {"table": "table4", "seeds": 0}):
        with pytest.raises(ValueError, match=r"table=|seeds="):
            plan_runs(**wrong)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------- run by run


def test_a_result_holds_the_figures_of_its_run(places: Places) -> None:
    (path,) = finish_runs(RUNS[:1], places, CHANGES, machine=CPU)
    result = read_result(path)
    run = RunFolder(places.run(RUNS[0]))
    found = scan(places.data)
    split = Split.from_dict(run.read_json(run.split), found)
    assert split == stratified_split(found, SMALL["fractions"], 42)
    test = evaluate(load_checkpoint(run.best), found, split.test)
    assert result["test"]["average_accuracy"] == test.average_accuracy
    assert result["test"]["confusion"] == test.confusion
    assert [name for name, *_ in result["test"]["wrong"]] == [item.name for item in test.wrong]
    assert result["training"]["epochs"] == 2
    assert len(result["training"]["history"]["val_loss"]) == 2
    assert str(places.data) not in path.read_text()
    assert not run.last.exists()
    assert run.best.is_file()


def test_runs_are_resumed_and_done_ones_are_left(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[str] = []
    original = runner._judge

    def watch(run: PlannedRun, *rest: Any) -> dict[str, Any]:
        judged.append(run.name)
        if len(judged) == 2:
            raise KeyboardInterrupt
        return original(run, *rest)

    monkeypatch.setattr(runner, "_judge", watch)
    with pytest.raises(KeyboardInterrupt):
        finish_runs(RUNS, places, CHANGES, machine=CPU)
    first = places.result(RUNS[0]).read_bytes()
    assert not places.result(RUNS[1]).exists()
    weights = RunFolder(places.run(RUNS[1])).best.read_bytes()
    finish_runs(RUNS, places, CHANGES, machine=CPU)
    assert judged == [RUNS[0].name, RUNS[1].name, RUNS[1].name]
    assert places.result(RUNS[0]).read_bytes() == first
    assert RunFolder(places.run(RUNS[1])).best.read_bytes() == weights
    finish_runs(RUNS, places, CHANGES, machine=CPU)
    assert len(judged) == 3  # the test pictures are read once a run


def test_a_finished_run_is_not_trained_again(places: Places) -> None:
    finish_runs(RUNS[:1], places, CHANGES, machine=CPU)
    run = RunFolder(places.run(RUNS[0]))
    before, result = run.best.stat().st_mtime_ns, read_result(places.result(RUNS[0]))
    places.result(RUNS[0]).unlink()
    finish_runs(RUNS[:1], places, CHANGES, machine=CPU)
    assert run.best.stat().st_mtime_ns == before
    assert read_result(places.result(RUNS[0])) == result
    with pytest.raises(ValueError, match=r"epochs=9: this run's last.ckpt is gone"):
        resume(run.path, epochs=9, machine=CPU)


def test_results_of_other_options_are_in_the_way(places: Places) -> None:
    finish_runs(RUNS[:1], places, CHANGES, machine=CPU)
    before = places.result(RUNS[0]).read_bytes()
    other = {**CHANGES, "epochs": 1}
    with pytest.raises(RunFolderError, match=r"epochs=2, not 1.*--overwrite"):
        finish_runs(RUNS[:1], places, other, machine=CPU)
    places.result(RUNS[0]).unlink()
    with pytest.raises(RunFolderError, match=r"begun with other options \(epochs=2, not 1\)"):
        finish_runs(RUNS[:1], places, other, machine=CPU)
    finish_runs(RUNS[:1], places, other, machine=CPU, overwrite=True)
    assert places.result(RUNS[0]).read_bytes() != before
    places.result(RUNS[0]).write_text('{"format": 0}')
    with pytest.raises(RunFolderError, match="format"):
        finish_runs(RUNS[:1], places, other, machine=CPU)


def test_a_run_that_fails_does_not_keep_the_others(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Classifier.training_step

    def explode(self: Classifier, batch: Any, batch_index: int) -> torch.Tensor:
        loss = original(self, batch, batch_index)
        if self.config.seed == 42:
            self._require_finite(loss * float("nan"), "step 1")
        return loss

    monkeypatch.setattr(Classifier, "training_step", explode)
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed: published backbone-seed42: the"):
        finish_runs(RUNS, places, CHANGES, machine=CPU)
    assert not places.result(RUNS[0]).exists()
    assert places.result(RUNS[1]).is_file()


def test_a_run_cut_off_before_its_options_were_written(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "split.json", {})
    done = finish_run(small(pictures, epochs=1, attention="none"), tmp_path / "run", machine=CPU)
    assert len(done.rows) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(RunFolderError, match="not empty"):
        finish_run(small(pictures, epochs=1), tmp_path / "other", machine=CPU)


def test_the_list_tells_what_is_left(places: Places) -> None:
    finish_runs(RUNS[:1], places, CHANGES, machine=CPU)
    longer = [PlannedRun("ciema", PUBLISHED, 42)]
    options: dict[str, Any] = {"pictures": 24, "device": torch.device("cpu")}
    done, known, guessed = list_runs([*RUNS, *longer], places, CHANGES, **options)
    assert (done.state, done.seconds) == ("done", 0)
    assert (known.state, known.measured) == ("to do", True)
    seconds = read_result(places.result(RUNS[0]))["training"]["seconds"]
    assert known.seconds == pytest.approx(seconds, rel=0.01)
    assert not guessed.measured
    assert 0 < guessed.seconds < 60
    train(RUNS[1].config(places.data, {**CHANGES, "epochs": 1}), places.run(RUNS[1]), machine=CPU)
    begun = list_runs(RUNS[1:], places, CHANGES, **options)[0]
    assert begun.state == "begun (1 of 2 epochs)"
    assert begun.seconds == pytest.approx(known.seconds / 2, rel=0.01)
    assert [in_words(x) for x in (3, 600, 36000)] == ["3 s", "10 min", "10.0 h"]


# ------------------------------------------------------------------------ the whole, and the page


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
    assert main([*command, "--only", "digits"]) != 0
    assert "mobilesteelnet[sets]" in capsys.readouterr().err


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
