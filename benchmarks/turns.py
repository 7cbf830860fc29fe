"""`python -m benchmarks.turns`: providers take turns, for ratios where a machine's speed wavers.

Every round has a turn for each row, in the same order, so that a slow minute falls on all of them.
A turn is a pause, in which the threads of the provider before stop spinning (ONNX Runtime's take
the processor for tens of milliseconds after a call), a call for the caches, and the call that is
timed. The figure is the median of the rounds. Rows are the combinations of subject, mode, provider
and number of threads; `published-autocast` and `fused-autocast` are training steps under bfloat16
autocast.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch

from fused.contract import TOLERANCES

from . import machine
from .measure import GateError, Steps, case_of, gate, oracle, relative_error, results_of
from .providers import PROVIDERS, Provider, Runnable
from .stages import BOTH, FORWARD, MODES, SHAPES, SUBJECTS, Case
from .table import is_alternative, markdown_table

# Under autocast the published form may itself be beyond the tolerance: ours may err twice as much.
TIMES_PUBLISHED = 2.0
# alpha's gradient is one number, in which large sums cancel and no errors average out: over six
# seeds the published form's was off by 1.1 to 3.4 %.
TIMES_FOR_A_NUMBER = 4.0
# Seconds before a turn.
PAUSE = 0.2


def _autocast(provider: Provider) -> Provider:
    def build(case: Case, mode: str, threads: int) -> Runnable:
        inner = provider.build(case, mode, threads)

        def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.autocast("cpu", torch.bfloat16):
                return inner.run(*inputs)

        return Runnable(run, inner.module)

    name = provider.name.removesuffix("-auto") + "-autocast"
    return Provider(name, provider.published, build, provider.why_not, torch.bfloat16)


TRAINED = ("published", "fused-auto")
BY_NAME = {provider.name: provider for provider in PROVIDERS}
AUTOCAST = {provider.name: provider for provider in (_autocast(BY_NAME[n]) for n in TRAINED)}
BY_NAME |= AUTOCAST


@dataclass
class Row:
    """One line of the result; times are seconds, a round each."""

    subject: str
    shape: str
    size: str
    mode: str
    provider: str
    dtype: str
    threads: int
    seconds: list[float]

    @property
    def ms(self) -> float:
        """Median milliseconds of a sample."""
        return 1e3 * statistics.median(self.seconds) / SHAPES[self.shape].batch


def check(case: Case, mode: str, provider: Provider, runnable: Runnable) -> None:
    """Compare with the published form in float64; under autocast with its errors there.

    Raises:
        GateError: the results are wrong.
    """
    training = mode != FORWARD
    want = oracle(case, training)
    got = results_of(runnable, case, training, torch.float32)
    if provider.name not in AUTOCAST:
        gate(provider.name, got, want, provider.dtype)
        return
    eager = AUTOCAST["published-autocast"].build(case, mode, torch.get_num_threads())
    plain = results_of(eager, case, training, torch.float32)
    output_limit, gradient_limit = TOLERANCES[torch.bfloat16]
    outputs = zip(got.outputs, plain.outputs, want.outputs, strict=True)
    found = [("output", *tensors, output_limit) for tensors in outputs]
    found += [
        (f"gradient of {key}", got.gradients[key], plain.gradients[key], value, gradient_limit)
        for key, value in want.gradients.items()
    ]
    for what, ours, theirs, exact, limit in found:
        limit = limit * TIMES_FOR_A_NUMBER if exact.numel() == 1 else limit
        allowed = max(limit, TIMES_PUBLISHED * relative_error(theirs, exact))
        error = relative_error(ours, exact)
        if not error <= allowed:  # NaN too
            raise GateError(f"{provider.name}: {what} is off by {error:.1e}, over {allowed:.1e}")


def prepare(
    subject: str, shape: str, mode: str, providers: Sequence[str], threads: Sequence[int]
) -> Iterator[tuple[Row, Steps]]:
    """The rows of a case, each checked and called once; those that cannot run say why."""
    case = case_of(subject, shape)
    for count in threads:
        torch.set_num_threads(count)
        for name in providers:
            provider = BY_NAME[name]
            reason = provider.why_not(case, mode)
            if name in AUTOCAST and mode == FORWARD:
                reason = "autocast rows are training steps"
            if reason is not None:
                print(f"{subject} {mode} {name}: {reason}", file=sys.stderr)
                continue
            runnable = provider.build(case, mode, count)
            check(case, mode, provider, runnable)
            dtype = str(provider.dtype).removeprefix("torch.")
            steps = Steps(runnable, case, mode)
            steps.once()
            yield Row(subject, shape, case.size, mode, name, dtype, count, []), steps


def take_turns(rows: Sequence[tuple[Row, Steps]], rounds: int) -> None:
    """Fill in the rows' seconds."""
    for turn in range(rounds):
        for row, steps in rows:
            torch.set_num_threads(row.threads)
            time.sleep(PAUSE)
            steps.once()
            row.seconds.append(steps.once())
        print(f"  round {turn + 1} of {rounds}", file=sys.stderr, flush=True)


def table_of(rows: Sequence[Row]) -> str:
    """Markdown: medians, all rounds, and ratios to the best alternative and to fewer threads."""
    body = []
    for row in rows:
        same = [
            r for r in rows if (r.subject, r.mode, r.shape) == (row.subject, row.mode, row.shape)
        ]
        others = [
            r.ms
            for r in same
            if (r.dtype, r.threads) == (row.dtype, row.threads) and is_alternative(r.provider)
        ]
        fewest = min((r for r in same if r.provider == row.provider), key=lambda r: r.threads)
        per_sample = [1e3 * s / SHAPES[row.shape].batch for s in row.seconds]
        body.append(
            [
                *(row.subject, row.size, row.mode, row.dtype, row.provider, str(row.threads)),
                f"{row.ms:.3g}",
                f"{min(per_sample):.3g} to {max(per_sample):.3g}",
                f"{min(others) / row.ms:.2f}×" if others else "–",
                f"{fewest.ms / row.ms:.2f}×" if fewest is not row else "–",
            ]
        )
    header = ["subject", "size", "mode", "maps", "provider", "threads"]
    header += ["ms a sample", "all rounds", "best alternative ÷ this", "fewest threads ÷ this"]
    return markdown_table(header, body)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.turns", description=__doc__)
    made.add_argument("--subjects", nargs="+", default=["ciema", "network"], choices=SUBJECTS)
    made.add_argument("--shape", default="paper-batch4", choices=list(SHAPES))
    made.add_argument("--mode", default=BOTH, choices=MODES, help="both: a training step (default)")
    made.add_argument(
        "--providers",
        nargs="+",
        default=[*TRAINED, *AUTOCAST],
        choices=list(BY_NAME),
        metavar="NAME",
        help=f"of {', '.join(BY_NAME)}; default: %(default)s",
    )
    made.add_argument(
        "--threads", nargs="+", type=int, default=[torch.get_num_threads()], metavar="N"
    )
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--json", type=Path, help="write the rounds' times here as well")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the rows and print the table."""
    options = parser().parse_args(arguments)
    if options.rounds < 1 or min(options.threads) < 1:
        print("error: --rounds and --threads must be at least 1", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for subject in options.subjects:
        print(f"{subject}: checking", file=sys.stderr, flush=True)
        try:
            ready = list(
                prepare(subject, options.shape, options.mode, options.providers, options.threads)
            )
        except GateError as error:
            print(f"error: {subject}: {error}", file=sys.stderr)
            return 1
        take_turns(ready, options.rounds)
        rows += [row for row, _ in ready]
    info = machine.facts(max(options.threads)) | {"cpu": {"brand_raw": machine.processor()}}
    print(machine.line(info, datetime.now().isoformat()) + "\n\n" + table_of(rows))
    if options.json:
        result = {"machine_info": info, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
