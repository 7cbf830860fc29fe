"""Runs rows in a process of its own, asked and answered in JSON lines.

``python -m benchmarks.gpu_run`` reads rows from its standard input and writes a line a result.
``gpu_timings.py`` starts it and puts an end to it: a kernel that crashes, hangs or spoils the
device must not take the other rows with it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import IO

import torch

from fused.backends import cuda, native

from . import gpu_case
from .gpu_case import Trial, case_for, cases_mode, products_in, trial_of
from .gpu_clock import Clock, GraphError, clock_for, graphed
from .gpu_rows import (
    FAILED,
    FORWARD,
    LAYOUTS,
    MARK,
    NO_MEMORY,
    OK,
    PUBLISHED,
    SCALES,
    SKIPPED,
    WRONG,
    Facts,
    Row,
    row_of,
)
from .measure import GateError, Results
from .providers import PROVIDERS, Provider, chosen_backends
from .stages import Case

# Batch norm over few pixels and stages in a row amplify rounding, eager PyTorch's as well: beyond
# the contract's tolerance ours may be as far off as this many times the published form in eager.
EAGER_SLACK = 2.0


class Bench:
    """What the rows of one process share: the last case and its float64 results.

    Args:
        scale: a key of `gpu_rows.SCALES`.
        device: "cuda" or "cpu".
        clock: None checks rows without timing them.
        providers: by name; those of `providers.py` if left out.
    """

    def __init__(
        self,
        scale: str,
        device: str,
        clock: Clock | None,
        providers: Mapping[str, Provider] | None = None,
    ) -> None:
        self.scale, self.device, self.clock = scale, device, clock
        self.providers = providers or {provider.name: provider for provider in PROVIDERS}
        self._case = functools.lru_cache(maxsize=1)(self._find_case)
        self._oracle = functools.lru_cache(maxsize=1)(self._find_oracle)

    def _find_case(self, subject: str, batch: int) -> Case:
        row = Row(subject, FORWARD, batch, "fp32", LAYOUTS[0], PUBLISHED)
        with products_in("fp32"):
            return case_for(row, self.scale, self.device)

    def _find_oracle(self, subject: str, batch: int, mode: str, precision: str) -> Results:
        row = Row(subject, mode, batch, precision, LAYOUTS[0], PUBLISHED)
        return gpu_case.oracle(row, self._case(subject, batch), self.device)

    def run(self, row: Row, *, compile_only: bool = False) -> Facts:
        """Judge and time one row; whatever happens to it is in the result.

        Args:
            row: what to run.
            compile_only: one call, to fill the compilers' caches; nothing is judged or timed.
        """
        start = time.monotonic()
        facts = row.facts()
        try:
            with products_in(row.precision):
                facts |= self._warm(row) if compile_only else self._run(row)
        except GateError as error:
            facts |= {"status": WRONG, "reason": f"{error}; not timed"}
        except torch.OutOfMemoryError:
            facts |= {"status": NO_MEMORY, "reason": "it does not fit into the device's memory"}
        except Exception as error:  # the other rows go on
            told = f"{type(error).__name__}: {error}".strip().splitlines()
            facts |= {"status": FAILED, "reason": (told or ["no message"])[0][:500]}
        if facts["status"] != OK and self.device == "cuda":
            facts |= self._device_left()
        return facts | {"seconds": round(time.monotonic() - start, 2)}

    def _device_left(self) -> Facts:
        """Whether the device still works after a failure: some errors spoil the process."""
        try:
            torch.cuda.empty_cache()
            torch.ones(1, device="cuda").item()
        except Exception as error:
            told = str(error).strip().splitlines() or ["no message"]
            return {"spoiled": told[0][:500]}
        return {}

    def _trial(self, row: Row) -> Trial | str:
        """The provider ready to run, or why it cannot."""
        provider, case = self.providers[row.provider], self._case(row.subject, row.batch)
        reason = provider.why_not(case, cases_mode(row.mode))
        return trial_of(row, case, provider, self.device) if reason is None else reason

    def _warm(self, row: Row) -> Facts:
        trial = self._trial(row)
        if isinstance(trial, str):
            return {"status": SKIPPED, "reason": trial}
        trial.call()
        if self.device == "cuda":  # what one process keeps, the others lack
            del trial
            torch.cuda.empty_cache()
        return {"status": OK}

    def _run(self, row: Row) -> Facts:
        trial = self._trial(row)
        if isinstance(trial, str):
            return {"status": SKIPPED, "reason": trial}
        case = self._case(row.subject, row.batch)
        facts: Facts = {"status": OK, "size": case.size}
        facts |= self._gate(row, trial.results())
        if row.provider == "fused-auto":
            facts["backends"] = chosen_backends(case, cases_mode(row.mode))
        if self.clock is None:
            return facts
        published = self.providers[row.provider].published
        facts["flop"] = case.flop(cases_mode(row.mode), published)
        facts["peak_bytes"] = self.clock.peak_bytes(trial.call)
        facts |= asdict(self.clock.measure(trial.call))
        if self.device == "cuda":
            facts["graph"] = self._graph(trial, self.clock)
        return facts

    def _graph(self, trial: Trial, clock: Clock) -> Facts:
        """Times of the replayed CUDA graph, or why there are none."""
        try:
            return {"equal": True, **asdict(clock.measure(graphed(trial.call)))}
        except GraphError as error:
            return {"equal": False, "reason": str(error)}
        except torch.OutOfMemoryError:
            return {"reason": "out of memory"}
        except RuntimeError as error:
            return {"reason": (str(error).strip().splitlines() or ["no message"])[0][:300]}

    def _gate(self, row: Row, got: Results) -> Facts:
        """Compare with the float64 results.

        Raises:
            GateError: an error is too large.
        """
        want = self._oracle(row.subject, row.batch, row.mode, row.precision)
        size = SCALES[self.scale][1] // 4
        pixels = row.batch * size * size
        found = gpu_case.errors(got, want, pixels)
        limits = {what: gpu_case.limit_of(row, what) for what in found}
        if row.is_ours and any(not found[what] <= limits[what] for what in found):
            for what, error in gpu_case.errors(self._eager(row), want, pixels).items():
                eager = min(EAGER_SLACK * error, gpu_case.LARGEST_LIMIT)
                limits[what] = max(limits[what], eager)
        for what, error in found.items():
            if not error <= limits[what]:  # NaN too
                told = f"{error:.1e}, at most {limits[what]:.0e} passes"
                raise GateError(f"{what} has relative error {told}")
        closest = max(found, key=lambda what: found[what] / limits[what])
        return {"error": found[closest], "limit": limits[closest], "worst": closest}

    def _eager(self, row: Row) -> Results:
        provider, case = self.providers[PUBLISHED], self._case(row.subject, row.batch)
        return trial_of(row, case, provider, self.device).results()


# ---------------------------------------------------------------------------------------- process


def machine(device: str) -> Facts:
    """What the figures depend on."""
    facts: Facts = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "fused_cuda": cuda.LIBRARY.error or "loaded",
        "build": native.read_plan(),
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": getattr(properties, "L2_cache_size", None),
        }
    return facts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def say(facts: Facts) -> None:
    """One line to whoever asked."""
    print(MARK + json.dumps(facts), flush=True)


def serve(
    bench: Bench, lines: IO[str], *, compile_only: bool, tell: Callable[[Facts], None]
) -> int:
    """Answer one row after the other until the input ends or the device is spoiled."""
    for line in lines:
        facts = bench.run(row_of(json.loads(line)), compile_only=compile_only)
        tell(facts)
        if "spoiled" in facts:
            return 3
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the rows of the standard input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to run")
    parser.add_argument("--scale", choices=sorted(SCALES), default="paper", help="size of the maps")
    parser.add_argument("--compile-only", action="store_true", help="call each row once, no clock")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        say({"refused": "torch sees no GPU"})
        return 2
    # The library's quickest algorithm for every shape: the alternatives at their best.
    torch.backends.cudnn.benchmark = True
    clock = None if options.compile_only else clock_for(options.device)
    bench = Bench(options.scale, options.device, clock)
    say({"machine": machine(options.device)})
    return serve(bench, sys.stdin, compile_only=options.compile_only, tell=say)


if __name__ == "__main__":
    sys.exit(main())
