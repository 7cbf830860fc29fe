"""Run folders: one process at a time, and none after a kill."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")
from reproduction_cases import CHANGES, RUNS, places  # noqa: F401
from run_cases import CPU, pictures, small  # noqa: F401
from training_cases import error_line, one_thread, program_environment  # noqa: F401

from mobilesteelnet import run_lock
from mobilesteelnet.__main__ import main
from mobilesteelnet.crossval import cross_validate
from mobilesteelnet.demo import run_demo
from mobilesteelnet.lightning_modules import Classifier
from mobilesteelnet.reproduction.runner import Places, finish_runs
from mobilesteelnet.run_folder import RunFolder, RunFolderError
from mobilesteelnet.run_lock import LOCK
from mobilesteelnet.runs import delete_runs, finish_run
from mobilesteelnet.train import resume, train

# The fork is as a reading process, which lives a little longer than one that is killed, and then
# ends without a word: leaving the block would take the lock's file away.
HOLDER = """
import os, sys
from mobilesteelnet.run_folder import RunFolder
with RunFolder(sys.argv[1]).alone():
    if os.fork():
        print("held", flush=True)
    sys.stdin.read()
    os._exit(0)
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Any]:
    """Another process is in the folder, and is killed at the end of the block.

    Its fork ends once the process that is given back is forgotten.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env=program_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def in_use(folder: Path) -> Any:
    return pytest.raises(RunFolderError, match=f"'{folder}' is in use by another process")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files}


def test_a_second_process_is_refused_until_the_first_is_killed(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "run", small(pictures, epochs=1)
    train(config, out, machine=CPU)
    with held(out) as killed:
        before = contents(out)
        for overwrite in (False, True):
            with in_use(out):
                train(config, out, machine=CPU, overwrite=overwrite)
        with in_use(out):
            resume(out, epochs=2, machine=CPU)
        with in_use(out):
            finish_run(config, out, machine=CPU)
        with in_use(out):
            delete_runs([tmp_path / "none", out])
        assert main(["train", "--resume", str(out)]) == 2
        assert "in use by another process" in error_line(capsys)
        assert contents(out) == before
    assert (out / LOCK).is_file()
    assert len(resume(out, epochs=2, machine=CPU).rows) == 2
    assert not killed.stdin.closed  # all the while, the fork was there
    assert not (out / LOCK).exists()


def test_what_a_kill_leaves_of_the_lock_is_not_in_the_way(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with held(out):
        pass
    assert [path.name for path in out.iterdir()] == [LOCK]
    delete_runs([out])
    (out / "split.json").write_text("{}")
    (out / LOCK).touch()
    assert len(finish_run(small(pictures, epochs=1), out, machine=CPU).rows) == 1
    (out / LOCK).touch()
    train(small(pictures, epochs=1), out, machine=CPU, overwrite=True)
    assert RunFolder(out).others() == []


def test_what_is_made_of_runs_is_refused_too(
    pictures: Path, tmp_path: Path, places: Places
) -> None:
    first, result = tmp_path / "cv" / "fold1", places.result(RUNS[0])
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    with held(first), in_use(first):
        cross_validate(small(pictures), tmp_path / "cv", machine=CPU, overwrite=True)
    with held(places.run(RUNS[0])), in_use(places.run(RUNS[0])):
        finish_runs(RUNS, places, CHANGES, machine=CPU, overwrite=True)
    assert result.is_file()


def test_a_demo_is_refused_too(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "run"):
        with held(folder), in_use(folder):
            run_demo(tmp_path, data=pictures, budget="tiny", overwrite=True)
    assert (tmp_path / "demo.json").read_text() == "{}"


def test_a_training_holds_its_folder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, step = tmp_path / "run", Classifier.training_step

    def watched(self: Classifier, batch: Any, batch_index: int) -> Any:
        with in_use(out):
            train(small(pictures), out, machine=CPU, overwrite=True)
        assert (out / LOCK).is_file()
        return step(self, batch, batch_index)

    monkeypatch.setattr(Classifier, "training_step", watched)
    train(small(pictures, epochs=1), out, machine=CPU)
    resume(out, epochs=2, machine=CPU)


def test_a_lock_file_that_its_holder_has_deleted_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = run_lock._lock, []

    def late(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        lock(descriptor)

    monkeypatch.setattr(run_lock, "_lock", late)
    with RunFolder(tmp_path).alone():
        assert len(calls) == 2
        assert (tmp_path / LOCK).is_file()


def test_a_file_system_without_locks_is_worked_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_lock, "_lock", none)
    with RunFolder(tmp_path).alone():
        pass
