"""Processes that run rows on a GPU: what dies, hangs or spoils the device is lost alone."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import pytest

from benchmarks import gpu_pool, gpu_rows
from benchmarks.gpu_rows import Row

WORKER = """
import json, os, signal, sys, time
actions = json.loads(os.environ["ACTIONS"])
print("noise of a library")
if "start" in actions:
    print("it broke", file=sys.stderr)
    sys.exit(5)
print("@gpu " + json.dumps({"machine": {"gpu": "fake", "pid": os.getpid()}}), flush=True)
for line in sys.stdin:
    row = json.loads(line)
    action = actions.get(row["subject"])
    if action == "die":
        print("illegal memory access", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if action == "hang":
        time.sleep(100)
    answer = {"key": row["key"], "status": "ok", "ms": 1.0, "low": 1.0, "high": 1.0}
    if action == "spoil":
        answer |= {"status": "failed", "reason": "error 700", "spoiled": "error 700"}
    print("@gpu " + json.dumps(answer), flush=True)
    if action == "spoil":
        sys.exit(3)
"""


class Run:
    """A pool on the worker above; what it reported."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, actions: dict[str, str]) -> None:
        monkeypatch.setenv("ACTIONS", json.dumps(actions))
        monkeypatch.setattr(gpu_pool, "COMMAND", (sys.executable, "-c", WORKER))
        self.found: list[dict[str, Any]] = []
        self.workers: list[int] = []

    def run(self, lists: list[list[Row]], seconds: float = 60.0, jobs: int = 1) -> dict[str, str]:
        pool = gpu_pool.Pool(
            *((), lambda row: 1.5, time.monotonic() + seconds, self.found.append),
            on_machine=lambda machine: self.workers.append(machine["pid"]),
        )
        try:
            pool.run(lists, jobs)
        finally:
            pool.stop()
        for pid in self.workers:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        return {facts["subject"]: facts["status"] for facts in self.found}


STAGES = [Row(stage, "forward", 1, "fp16", "contiguous", "fused-auto") for stage in gpu_rows.STAGES]


def test_a_row_that_kills_hangs_or_spoils_its_process_is_lost_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actions = {"msff": "die", "coordinate_attention": "hang", "cross_spatial": "spoil"}
    run = Run(monkeypatch, actions)
    assert run.run([STAGES]) == {
        "msff": "died",
        "channel_interaction": "ok",
        "coordinate_attention": "timed out",
        "cross_spatial": "failed",
        "gated_fusion": "ok",
    }
    assert len(run.workers) == 4
    reasons = {facts["subject"]: facts.get("reason", "") for facts in run.found}
    assert reasons["msff"] == "killed by SIGSEGV: illegal memory access"
    assert reasons["coordinate_attention"] == "no result within 2 s"


def test_what_there_is_no_time_for_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Run(monkeypatch, {"channel_interaction": "hang"}).run([STAGES], seconds=1.4)
    assert list(found.values()) == [*("ok", "not run", "not run", "not run", "not run")]
    found = Run(monkeypatch, {}).run([STAGES], seconds=0.0)
    assert set(found.values()) == {"not run"}


def test_a_process_that_does_not_start_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, {"start": "fail"})
    with pytest.raises(gpu_pool.StartError, match="exit status 5: it broke"):
        run.run([STAGES])
    assert {f["status"] for f in run.found} == {"not run"}
    assert len(run.found) == len(STAGES)


def test_several_processes_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, {"msff": "die"})
    found = run.run([STAGES[:3], STAGES[3:]], jobs=2)
    assert sorted(found.values()) == [*("died", "ok", "ok", "ok", "ok")]
