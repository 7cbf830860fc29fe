"""Cross-validation: the folds, and what a recipe comes to on them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")
from reproduction_cases import CHANGES
from run_cases import CPU, pictures, small  # noqa: F401
from training_cases import CLASSES, make_pictures, one_thread  # noqa: F401

from mobilesteelnet.checkpoint import load_checkpoint
from mobilesteelnet.crossval import cross_validate
from mobilesteelnet.data import DataError, scan, stratified_split
from mobilesteelnet.evaluate import evaluate
from mobilesteelnet.recipes import OURS
from mobilesteelnet.reproduction.candidates import judge_candidates, result_file
from mobilesteelnet.reproduction.runner import Places
from mobilesteelnet.run_folder import RunFolder, RunFolderError
from mobilesteelnet.splits import Split, fold_splits


def test_folds_leave_the_test_pictures_alone(pictures: Path) -> None:
    found = scan(pictures)
    split = stratified_split(found, (0.25, 0.25, 0.5), 42)
    parts = fold_splits(found, split, folds=2, repeats=3, seed=1)
    assert len(parts) == 6
    pool = sorted([*split.train, *split.val])
    for part in parts:
        assert part.test == []
        assert sorted([*part.train, *part.val]) == pool
        assert not set(part.train) & set(part.val)
        counts = Counter(found.labels[i] for i in part.val)
        assert max(counts.values()) - min(counts.values()) <= 1
    for repeat in range(3):
        first, second = parts[2 * repeat : 2 * repeat + 2]
        assert first.val == second.train
    assert len({tuple(part.val) for part in parts}) == 6
    assert fold_splits(found, split, 2, 3, seed=1) == parts
    assert Split.from_dict(parts[0].to_dict(found), found) == parts[0]


def test_duplicates_stay_in_one_fold(tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "set", per_class=8)
    for name in CLASSES:
        for number in range(4):
            copy = (folder / name / f"{name}_{number}.png").read_bytes()
            (folder / name / f"{name}_{number + 100}.png").write_bytes(copy)
    found = scan(folder)
    split = stratified_split(found, (0.4, 0.4, 0.2), 42)
    for part in fold_splits(found, split, folds=3, repeats=2, seed=0):
        train_digests = {found.items[i].digest for i in part.train}
        assert not train_digests & {found.items[i].digest for i in part.val}


def test_too_few_pictures_for_the_folds(pictures: Path) -> None:
    found = scan(pictures)
    split = stratified_split(found, (0.125, 0.125, 0.75), 42)
    with pytest.raises(DataError, match=r"too few pictures for folds=3"):
        fold_splits(found, split, folds=3, repeats=1)
    with pytest.raises(ValueError, match="folds=1"):
        fold_splits(found, split, folds=1, repeats=1)


def test_cross_validation_judges_on_the_folds(pictures: Path, tmp_path: Path) -> None:
    config = small(pictures, attention="none", epochs=1)
    found = cross_validate(config, tmp_path / "cv", folds=2, repeats=1, machine=CPU)
    stored = json.loads((tmp_path / "cv" / "crossval.json").read_text())
    assert stored == json.loads(json.dumps(found.to_dict()))
    data = scan(pictures)
    accuracies = []
    for fold in found.folds:
        run = RunFolder(tmp_path / "cv" / fold.run)
        part = Split.from_dict(run.read_json(run.split), data)
        assert part.test == []
        result = evaluate(load_checkpoint(run.best), data, part.val)
        accuracies.append(result.average_accuracy)
        assert fold.average_accuracy == result.average_accuracy
    assert found.average_accuracy == pytest.approx(sum(accuracies) / 2)
    runs = [RunFolder(tmp_path / "cv" / fold.run) for fold in found.folds]
    assert [run.read_json(run.config)["seed"] for run in runs] == [42, 43]
    again = cross_validate(config, tmp_path / "cv", folds=2, repeats=1, machine=CPU)
    assert again == found
    one = cross_validate(config, tmp_path / "cv", folds=2, repeats=1, fits=1, machine=CPU)
    assert (one.folds, one.deviation) == (found.folds[:1], None)
    with pytest.raises(RunFolderError, match="trained on other pictures than this fold's"):
        cross_validate(config, tmp_path / "cv", folds=4, repeats=1, machine=CPU)
    for wrong in ({"folds": 1}, {"folds": 40}):
        with pytest.raises(ValueError, match="folds="):
            cross_validate(config, tmp_path / "cv", machine=CPU, overwrite=True, **wrong)
    assert (tmp_path / "cv" / "crossval.json").is_file()
    stale = tmp_path / "cv" / "fold2" / "best.safetensors"
    stale.write_bytes(b"")
    cross_validate(config, tmp_path / "cv", repeats=1, fits=1, machine=CPU, overwrite=True)
    assert not stale.exists()  # else a later call would take it for one of the new
    for fits in (0, 3):
        with pytest.raises(ValueError, match=f"fits={fits}"):
            cross_validate(config, tmp_path / "cv", folds=2, repeats=1, fits=fits, machine=CPU)


def test_a_candidate_with_fewer_fits_is_gone_on_with(pictures: Path, tmp_path: Path) -> None:
    places = Places(str(pictures), tmp_path / "runs", tmp_path / "results")
    changes = {**CHANGES, "attention": "none", "epochs": 1}
    told: list[int] = []

    def judge(data: Path = pictures, **options: Any) -> None:
        judge_candidates(
            [OURS],
            replace(places, data=str(data)),
            changes,
            machine=CPU,
            tell=lambda _, found: told.append(len(found.folds)),
            **options,
        )

    judge(fits=1)
    judge(fits=1)
    judge(fits=2)
    judge(fits=1)
    assert told == [1, 2]
    more = make_pictures(tmp_path / "more" / "pictures", per_class=16)
    with pytest.raises(RunFolderError, match="is of other pictures"):
        judge(more, fits=1)
    (places.runs / "recipe" / OURS / "fold3").mkdir()
    (places.runs / "recipe" / OURS / "fold3" / "mine.txt").touch()
    with pytest.raises(RunFolderError, match="holds no run"):
        judge(fits=1, overwrite=True)
    assert result_file(OURS, places).is_file()
