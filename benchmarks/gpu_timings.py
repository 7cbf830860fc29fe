"""``python -m benchmarks.gpu_timings``: CIEMA, the network and each stage, timed on a GPU.

Every row (subject, forward or training, batch, precision, layout, provider) is first held against
the published form in float64; a row that fails is never timed. Rows run in a process of their own,
each with a time limit, and are written as they come, the most telling ones first, so a run that is
cut short has lost nothing. Half precision is the whole module in it for `forward`, and autocast
for `training`; "fp32" products are exact, "tf32" ones rounded, as torch's convolutions by default.

    python -m benchmarks.gpu_timings --list | head -50       what would run, in which order
    python -m benchmarks.gpu_timings --seconds 300           five minutes of it
    python -m benchmarks.gpu_timings --only "ciema fp16 b1" --only "network forward fused-auto"
    python -m benchmarks.gpu_timings --resume                go on where the last run ended
    python -m benchmarks.gpu_timings --warm --jobs 8         only fill the compilers' caches

Exit status: 0, or 1 if a row of ours was wrong, crashed or hung, or 2 if nothing can run.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gpu_pool import ROOT, Pool, StartError
from .gpu_report import auto_choices, is_bad_graph, timings_text
from .gpu_rows import (
    BAD,
    COMPILED,
    NOT_RUN,
    OK,
    OURS,
    SCALES,
    Facts,
    Row,
    all_rows,
    plan,
    row_of,
    tier,
    tiny_rows,
)

FORMAT = 1
# Seconds that a row may take, the kernels' first compilation included; compiled forms need more.
ROW_SECONDS, COMPILE_SECONDS = 90.0, 150.0
# Rows up to this tier are worth compiling ahead.
LAST_WARM_TIER = 4


# ------------------------------------------------------------------------------------------- file


class Store:
    """The result file, and its tables beside it; written anew after every row.

    Attributes:
        result: the whole content.
    """

    def __init__(self, json_file: Path, markdown_file: Path, head: Facts) -> None:
        self.json_file, self.markdown_file = json_file, markdown_file
        self.result: Facts = {"format": FORMAT, **head, "machine": None, "rows": []}

    def resume(self) -> str:
        """Take over the rows of an earlier run on the same sources; says what it did.

        Raises:
            ValueError: the file is not one of these.
        """
        try:
            before = json.loads(self.json_file.read_text(encoding="utf-8"))
            rows = [row for row in before["rows"] if row_of(row) and row["status"] != NOT_RUN]
            same = [before.get(key) == self.result[key] for key in ("sources", "scale", "device")]
            machine = before["machine"]
        except FileNotFoundError:
            return "nothing to resume, a new file"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.json_file} is no file of these timings: {error!r}") from error
        if not all(same):
            return "the file is of other sources, scale or device: all rows anew"
        self.result |= {"rows": rows, "machine": machine}
        return f"{len(rows)} rows are kept"

    def set_machine(self, machine: Facts) -> None:
        """Note where the rows come from; those of another machine are dropped."""
        known, keys = self.result["machine"], ("gpu", "torch", "triton", "device")
        if known is not None and any(known.get(key) != machine.get(key) for key in keys):
            self.result["rows"] = []
        self.result["machine"] = machine | {"driver": driver()}

    def add(self, facts: Facts) -> None:
        """Add a row, in place of an earlier one of the same key."""
        rows = [row for row in self.result["rows"] if row["key"] != facts["key"]]
        self.result["rows"] = [*rows, facts]

    def save(self) -> None:
        """Write both files, each in one step."""
        self.result["auto_choice"] = auto_choices(self.result["rows"])
        text = json.dumps(finite(self.result), indent=1, allow_nan=False)
        for file, content in (
            (self.json_file, text + "\n"),
            (self.markdown_file, "# GPU timings\n\n" + timings_text(self.result)),
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(file.name + ".part")
            part.write_text(content, encoding="utf-8")
            os.replace(part, file)


def finite(value: Any) -> Any:
    """The same with null for what JSON cannot hold: an error may be NaN."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _told(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def driver() -> str | None:
    """The driver's version."""
    told = _told(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return told.splitlines()[0] if told else None


def commit() -> str | None:
    """The commit, with a word if files differ from it; None outside a repository."""
    found = os.environ.get("COMMIT") or _told(["git", "rev-parse", "HEAD"])
    return f"{found} with changes" if found and _told(["git", "status", "--porcelain"]) else found


def sources() -> str:
    """A digest of what is timed, which a copy without a repository has too."""
    digest = hashlib.sha256()
    for folder in ("fused", "csrc", "mobilesteelnet"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".cu", ".cuh", ".cpp", ".h"):
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


# -------------------------------------------------------------------------------------------- runs


def limit_for(options: argparse.Namespace) -> Any:
    """Row → seconds that it may take."""

    def limit(row: Row) -> float:
        if row.provider not in COMPILED:
            return float(options.row_seconds)
        published = row.provider == "compiled-published"
        return float(options.compile_seconds * (2 if published else 1))

    return limit


def line_of(facts: Facts, published: float | None) -> str:
    """One row for the terminal."""
    if facts["status"] != OK:
        return f"{facts['status']}: {facts.get('reason', '')}"
    text = f"{facts['ms']:.3f} ms ({facts['low']:.3f} to {facts['high']:.3f})"
    if published and facts["provider"] in OURS:
        text += f", {published / facts['ms']:.1f}× published"
    graph = facts.get("graph") or {}
    if "ms" in graph:
        text += f", graph {graph['ms']:.3f} ms"
    elif graph:
        text += f", no graph: {graph['reason']}"
    return text


def time_rows(rows: Sequence[Row], store: Store, options: argparse.Namespace) -> int:
    """Run the plan and write the files; the exit status."""
    have = {row["key"] for row in store.result["rows"]}
    todo = [row for row in rows if row.key not in have]
    start, done, published = time.monotonic(), 0, {}
    for row in store.result["rows"]:
        if row["provider"] == "published":
            published[row_of(row).case] = row.get("ms")

    def on_result(facts: Facts) -> None:
        nonlocal done
        done += 1
        case = row_of(facts).case
        if facts["provider"] == "published":
            published[case] = facts.get("ms")
        store.add(facts)
        store.save()
        if facts["status"] != NOT_RUN:
            passed = time.monotonic() - start
            text = line_of(facts, published.get(case))
            print(f"[{done}/{len(todo)} {passed:4.0f} s] {facts['key']}: {text}", flush=True)

    arguments = ["--device", options.device, "--scale", options.scale]
    deadline = start + (options.seconds or math.inf)
    pool = Pool(arguments, limit_for(options), deadline, on_result, store.set_machine)
    on_signals(pool)
    try:
        pool.run([todo])
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        pool.stop()
        store.save()
    return 1 if complaints(store.result["rows"]) else 0


def complaints(rows: Sequence[Facts]) -> list[str]:
    """What is wrong with ours."""
    bad = [row for row in rows if row["provider"] in OURS and row["status"] in BAD]
    return [row["key"] for row in [*bad, *filter(is_bad_graph, rows)]]


def warm(rows: Sequence[Row], options: argparse.Namespace) -> int:
    """Run rows once in several processes: what they compile, a later run finds in the caches."""
    wanted = [row for row in rows if options.tiny or tier(row) <= LAST_WARM_TIER]
    wanted = [row for row in wanted if row.provider != "fused-auto"]  # the kernels of the others
    compiled = [row for row in wanted if row.provider in COMPILED]
    ours = [row for row in wanted if row.provider in OURS]
    done = 0

    def on_result(facts: Facts) -> None:
        nonlocal done
        done += facts["status"] == OK
        if facts["status"] != NOT_RUN:
            told = facts.get("reason") or f"{facts['seconds']:.1f} s"
            print(f"{facts['key']}: {facts['status']}, {told}", flush=True)

    arguments = ["--device", options.device, "--scale", options.scale, "--compile-only"]
    deadline = time.monotonic() + (options.seconds or math.inf)
    pool = Pool(arguments, limit_for(options), deadline, on_result)
    on_signals(pool)
    try:
        # The longest compilations first: of the published form, one call for a group and branch.
        pool.run([ours, compiled[::-1]], options.jobs)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        pool.stop()
    print(f"{done} of {len(ours) + len(compiled)} rows compiled", flush=True)
    return 0


def on_signals(pool: Pool) -> None:
    """On Ctrl-C or SIGTERM the rows' processes end too; what was timed is in the files already."""

    def end(number: int, frame: object) -> None:
        pool.stop()
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


# ------------------------------------------------------------------------------------ command line


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_timings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--json", type=Path, default=Path("gpu-results/timings.json"), help="result (%(default)s)")
    add("--markdown", type=Path, help="tables; beside the JSON if left out")
    add("--resume", action="store_true", help="keep the JSON's rows and run the missing ones")
    add("--list", action="store_true", help="print the plan and exit")
    add("--only", action="append", default=[], metavar="WORDS", help="rows with all these words")
    add("--seconds", type=_positive, help="end after this time; without it the plan runs through")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for tests of the script")
    add("--scale", choices=sorted(SCALES), default="paper", help="size of the maps (%(default)s)")
    add("--tiny", action="store_true", help="a short plan at --scale tiny, for a smoke test")
    add("--row-seconds", type=_positive, default=ROW_SECONDS, help="limit of a row (%(default)s)")
    add(
        *("--compile-seconds",),
        type=_positive,
        default=COMPILE_SECONDS,
        help="limit of a row of torch.compile (%(default)s; of the published form twice)",
    )
    add("--warm", action="store_true", help="compile ahead in several processes, time nothing")
    add("--jobs", type=int, default=2, help="processes of --warm (%(default)s)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the options ask for; the exit status."""
    options = parser().parse_args(arguments)
    if options.jobs < 1:
        print(f"error: --jobs={options.jobs}, expected at least 1", file=sys.stderr)
        return 2
    if options.tiny:
        options.scale = "tiny"
    rows = plan(tiny_rows() if options.tiny else all_rows(), options.only)
    if not rows:
        print(f"error: no row has all words of {options.only}; see --list", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(row.key for row in rows))
        return 0
    if options.warm:
        return warm(rows, options)
    head = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": sources(),
        "scale": options.scale,
        "device": options.device,
        "planned": len(rows),
    }
    markdown = options.markdown or options.json.with_suffix(".md")
    store = Store(options.json, markdown, head)
    try:
        if options.resume:
            print(f"--resume: {store.resume()}", flush=True)
        store.save()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = time_rows(rows, store, options)
    for key in complaints(store.result["rows"]):
        print(f"not right: {key}", file=sys.stderr)
    print(f"wrote {options.json} and {markdown}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
