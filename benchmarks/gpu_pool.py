"""Processes that run rows (`gpu_run.py`), each row with a time limit and the survivors going on."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from .gpu_rows import DIED, MARK, NOT_RUN, TIMED_OUT, Facts, Row

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "benchmarks.gpu_run")
START_SECONDS = 180.0


class StartError(RuntimeError):
    """A worker cannot be started; the message is its own."""


class Worker:
    """One `gpu_run` process.

    Attributes:
        machine: what it said of the machine.
    """

    def __init__(self, arguments: Sequence[str], seconds: float = START_SECONDS) -> None:
        """Start it and wait until it is ready.

        Raises:
            StartError: it ended, refused, or took longer than `seconds`.
        """
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._errors: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # so that the compilers it starts can be ended with it
        )
        self._answers: queue.Queue[Facts | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        answer = self._wait(seconds)
        if answer is None or "machine" not in answer:
            if answer is None:
                told = self._how_it_ended()
            else:
                told = answer.get("refused") or f"not ready within {seconds:.0f} s"
            self.stop()
            raise StartError(told)
        self.machine: Facts = answer["machine"]

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                with contextlib.suppress(ValueError):
                    self._answers.put(json.loads(line[len(MARK) :]))
        self._answers.put(None)

    def _wait(self, seconds: float) -> Facts | None:
        try:
            return self._answers.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            return {"status": TIMED_OUT}

    def ask(self, row: Row, seconds: float) -> Facts:
        """Run a row; after "died" or "timed out" the worker is of no more use."""
        assert self._process.stdin is not None
        start = time.monotonic()
        with contextlib.suppress(OSError):  # a dead worker answers below
            self._process.stdin.write(json.dumps(row.facts()) + "\n")
            self._process.stdin.flush()
        answer = self._wait(seconds)
        if answer is None:
            answer = {"status": DIED, "reason": self._how_it_ended()}
        elif answer.get("status") == TIMED_OUT:
            answer["reason"] = f"no result within {seconds:.0f} s"
        return {**row.facts(), "seconds": round(time.monotonic() - start, 2), **answer}

    def _how_it_ended(self) -> str:
        try:
            code: int | None = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        how = "still runs" if code is None else f"exit status {code}"
        if code is not None and code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        if self._errors.closed:  # stopped meanwhile
            return how
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return f"{how}: {lines[-1][:300]}" if lines else how

    def stop(self) -> None:
        """End the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class Pool:
    """Runs rows in one process after the other, or in several at once.

    Args:
        arguments: of `gpu_run`.
        limit: row → seconds that it may take.
        deadline: `time.monotonic()` at which everything ends.
        on_result: called with each row's result, one call at a time.
        on_machine: called with what each started worker says of the machine.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        limit: Callable[[Row], float],
        deadline: float,
        on_result: Callable[[Facts], None],
        on_machine: Callable[[Facts], None] = lambda facts: None,
    ) -> None:
        self.arguments, self.limit, self.deadline = arguments, limit, deadline
        self._on_result, self._on_machine = on_result, on_machine
        self._lock = threading.Lock()
        self._workers: set[Worker] = set()
        self._stopped = False

    def run(self, lists: Sequence[Sequence[Row]], jobs: int = 1) -> None:
        """Run all rows; what there is no time for is reported as "not run".

        Args:
            lists: rows in order; job i begins with list i modulo their number.
            jobs: processes at once.

        Raises:
            StartError: no worker can be started.
        """
        pending = [list(rows) for rows in lists]
        failures: list[StartError] = []

        def job(number: int) -> None:
            try:
                self._work(lambda: self._next(pending, number))
            except StartError as error:
                failures.append(error)

        if jobs == 1:
            job(0)
        else:
            threads = [threading.Thread(target=job, args=(n,), daemon=True) for n in range(jobs)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        reason = str(failures[0]) if failures else "time is up"
        for rows in pending:
            for row in rows:
                self._tell({**row.facts(), "status": NOT_RUN, "reason": reason})
            rows.clear()
        if failures:
            raise failures[0]

    def _next(self, pending: list[list[Row]], number: int) -> Row | None:
        with self._lock:
            order = pending[number % len(pending) :] + pending[: number % len(pending)]
            for rows in order:
                if rows and not self._stopped:
                    return rows.pop(0)
        return None

    def _work(self, next_row: Callable[[], Row | None]) -> None:
        worker: Worker | None = None
        try:
            while time.monotonic() < self.deadline and (row := next_row()) is not None:
                try:
                    worker = worker or self._start()
                except StartError as error:
                    self._tell({**row.facts(), "status": NOT_RUN, "reason": str(error)})
                    if time.monotonic() >= self.deadline:
                        return
                    raise
                left = self.deadline - time.monotonic()
                facts = worker.ask(row, min(self.limit(row), left))
                if facts["status"] == TIMED_OUT and self.limit(row) > left:
                    facts |= {"status": NOT_RUN, "reason": "time was up while it ran"}
                self._tell(facts)
                if facts["status"] in (DIED, TIMED_OUT, NOT_RUN) or "spoiled" in facts:
                    self._end(worker)
                    worker = None
        finally:
            if worker is not None:
                self._end(worker)

    def _start(self) -> Worker:
        worker = Worker(self.arguments, min(START_SECONDS, self.deadline - time.monotonic()))
        self._workers.add(worker)
        if self._stopped:
            self._end(worker)
            raise StartError("stopped while it started")
        self._on_machine(worker.machine)
        return worker

    def _end(self, worker: Worker) -> None:
        self._workers.discard(worker)
        worker.stop()

    def _tell(self, facts: Facts) -> None:
        with self._lock:
            if not self._stopped:
                self._on_result(facts)

    def stop(self) -> None:
        """End all processes now; rows that ran or waited are not reported any more."""
        self._stopped = True
        for worker in list(self._workers):
            worker.stop()
