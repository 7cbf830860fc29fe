"""Reproduction: which runs a table needs, and doing them one by one."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")
from reproduction_cases import CHANGES, RUNS, places, set_options  # noqa: F401
from run_cases import CPU, SMALL, pictures, small  # noqa: F401
from training_cases import make_pictures, one_thread  # noqa: F401

from mobilesteelnet.__main__ import main
from mobilesteelnet.checkpoint import load_checkpoint
from mobilesteelnet.data import DataError, scan, stratified_split
from mobilesteelnet.evaluate import evaluate
from mobilesteelnet.lightning_modules import Classifier
from mobilesteelnet.recipes import OURS, PUBLISHED
from mobilesteelnet.reproduction import runner
from mobilesteelnet.reproduction.grid import (
    COST_TABLES,
    NETWORKS,
    TABLES,
    PlannedRun,
    paper_figures,
    plan_runs,
)
from mobilesteelnet.reproduction.listing import in_words, list_runs
from mobilesteelnet.reproduction.runner import Places, finish_runs, read_result
from mobilesteelnet.run_folder import RunFolder, RunFolderError, write_json
from mobilesteelnet.runs import finish_run
from mobilesteelnet.splits import Split
from mobilesteelnet.train import TrainConfig, TrainingError, resume, train

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


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("reproduce table7 --only msff --seeds 1", set_options()),
        ("reproduce recipe --only mixup --fits 1", set_options()),
        ("crossval --fits 1", set_options(seed=1)),
    ],
)
def test_an_interrupted_command_says_how_it_goes_on(
    command: str,
    options: list[str],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Classifier, "training_step", interrupt)
    words = ["mobilesteelnet", *command.split(), "--data", str(pictures), *options]
    monkeypatch.setattr(sys, "argv", [*words, "--overwrite"])
    assert main() == 5
    told = capsys.readouterr().err.strip()
    assert told.endswith(f"interrupted after 0 epochs; continue with: {shlex.join(words)}")


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


def test_results_of_other_pictures_are_in_the_way(places: Places, tmp_path: Path) -> None:
    finish_runs(RUNS[:1], places, CHANGES, machine=CPU)
    more = make_pictures(tmp_path / "more" / "pictures", per_class=16)
    others = make_pictures(tmp_path / "others" / "pictures")
    for number, folder in enumerate(sorted(others.iterdir())):
        folder.rename(others / f"kind{number}")
    for data in (more, others):
        with pytest.raises(RunFolderError, match=r"is of other pictures \(.*--overwrite"):
            finish_runs(RUNS[:1], replace(places, data=str(data)), CHANGES, machine=CPU)
    gone = replace(places, data=str(tmp_path / "gone" / "pictures"))
    with pytest.raises(DataError, match="does not exist"):
        finish_runs(RUNS[:1], gone, CHANGES, machine=CPU, overwrite=True)
    assert places.result(RUNS[0]).is_file()


def test_making_runs_again_goes_on_after_an_interruption(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_runs(RUNS, places, CHANGES, machine=CPU)
    old = [places.result(run).read_text() for run in RUNS]
    for run in RUNS:  # as if they were of an older version
        places.result(run).write_text(places.result(run).read_text().replace('"test"', '"test" '))
    begun: list[str] = []
    original = runner.finish_run

    def watch(config: TrainConfig, path: Path, **rest: Any) -> Any:
        begun.append(path.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        assert not RunFolder(path).config.exists()
        return original(config, path, **rest)

    monkeypatch.setattr(runner, "finish_run", watch)
    with pytest.raises(KeyboardInterrupt):
        finish_runs(RUNS, places, CHANGES, machine=CPU, overwrite=True)
    assert not places.result(RUNS[1]).exists()
    finish_runs(RUNS, places, CHANGES, machine=CPU)
    assert begun == [RUNS[0].name, RUNS[1].name, RUNS[1].name]
    results = [read_result(places.result(run)) for run in RUNS]
    assert [result["test"] for result in results] == [json.loads(text)["test"] for text in old]
    assert '"test" ' not in places.result(RUNS[1]).read_text()
    mine = places.run(RUNS[1]) / "config.json"
    mine.rename(mine.with_name("mine.json"))
    with pytest.raises(RunFolderError, match="holds no run"):
        finish_runs(RUNS, places, CHANGES, machine=CPU, overwrite=True)
    assert all(places.result(run).is_file() for run in RUNS)


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
    options: dict[str, Any] = {"pictures": scan(places.data), "device": torch.device("cpu")}
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
    other = list_runs(RUNS[1:], places, CHANGES, precision="bf16-mixed", **options)[0]
    assert not other.measured  # float32's times say nothing of bfloat16's
    path = places.result(RUNS[0])
    result = read_result(path)
    result["machine"]["device"] = "a quicker machine"
    write_json(path, result)
    assert not list_runs(RUNS[1:], places, CHANGES, **options)[0].measured
    assert [in_words(x) for x in (3, 600, 36000)] == ["3 s", "10 min", "10.0 h"]
