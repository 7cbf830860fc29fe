"""Every launch of the triton backend at the paper's size, compiled for every architecture."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.triton_capture import DTYPES, LAYOUTS, Call, calls, capture
from benchmarks.triton_code import Code, inspect
from benchmarks.triton_compile import TARGETS, compile_launch, compiling_for
from fused.backends.triton import KERNELS, configs
from fused.backends.triton.configs import Config, precision_class
from fused.backends.triton.launch import Launch


@dataclass(frozen=True, order=True)
class Key:
    """What a row of the budgets is about.

    Attributes:
        kernel: name of the jit function.
        precision: "half" (float16 and bfloat16) or "single", as in the table of configurations.
        layout: of the maps; "any" if both compile to the same.
        config: blocks, warps, stages, and the limit of registers if there is one.
        target: architecture.
    """

    kernel: str
    precision: str
    layout: str
    config: str
    target: str

    @property
    def row(self) -> str:
        """Its name inside the kernel's table of the file."""
        return f"{self.precision} {self.layout} {self.config}"

    def __str__(self) -> str:
        return f"{self.kernel} ({self.row}) on {self.target}"


@dataclass(frozen=True)
class Usage:
    """One compiled kernel.

    Attributes:
        key: what it is; `layout` that of the call.
        binary: Triton's hash of it.
        code: what it uses.
        call: who launches it.
        preferred: whether `call` takes this configuration on the target by itself.
    """

    key: Key
    binary: str
    code: Code
    call: str
    preferred: bool = False


@dataclass(frozen=True)
class Failure:
    """What did not compile, or an op whose launches could not be found."""

    what: str
    message: str


@dataclass(frozen=True)
class Job:
    """What one process compiles at a time.

    Attributes:
        target: architecture.
        dtype: of the maps.
        ops: whose launches.
        layouts: of the maps.
        candidates: every configuration that fits, not only those that a user gets.
    """

    target: str
    dtype: str
    ops: tuple[str, ...] = tuple(KERNELS)
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    candidates: bool = True


Found = list["Usage | Failure"]


def label(config: Config) -> str:
    """A configuration in short: ``P64 C128 w4 s2`` for blocks, warps, stages; r128: a limit."""
    parts = [f"{name.removeprefix('BLOCK_')}{size}" for name, size in config.blocks.items()]
    parts += [f"w{config.num_warps}", f"s{config.num_stages}"]
    return " ".join([*parts, *([f"r{config.registers}"] if config.registers else [])])


# -------------------------------------------------------------------------------------- compiling


def measure(job: Job) -> Found:
    """Compiles every launch of the job's ops and reads what came out."""
    torch.set_num_threads(1)
    target, found = TARGETS[job.target], []
    compiled: dict[str, Any] = {}
    launched: list[tuple[Key, str, Call, bool]] = []
    failures: dict[str, Failure] = {}
    with compiling_for(target):
        for call in calls(job.ops, job.layouts):
            try:
                launches = _launches(call, job)
            except Exception as error:
                what = f"{call} in {job.dtype} on {job.target}"
                failures[what] = Failure(what, _told(error))
                continue
            for launch, preferred in launches:
                precision = precision_class(DTYPES[job.dtype])
                config = label(launch.config)
                key = Key(launch.name, precision, call.layout, config, job.target)
                try:
                    kernel = compile_launch(launch)
                except Exception as error:
                    failures[str(key)] = Failure(f"{key}, {call} in {job.dtype}", _told(error))
                    continue
                compiled[kernel.hash] = kernel
                launched.append((key, kernel.hash, call, preferred))
        hashes = list(compiled)
        codes = dict(zip(hashes, inspect([compiled[h] for h in hashes], target), strict=True))
    found += [
        Usage(key, binary, codes[binary], f"{call} {job.dtype}", preferred)
        for key, binary, call, preferred in launched
    ]
    return [*found, *failures.values()]


def _launches(call: Call, job: Job) -> Iterable[tuple[Launch, bool]]:
    """The launches of a call with every configuration that fits, and whether it is the user's."""
    target, dtype = TARGETS[job.target], DTYPES[job.dtype]
    found = [(launch, True) for launch in capture(call, dtype, target)]
    chosen = {(launch.name, label(launch.config)) for launch, _ in found}
    most = max(map(len, configs.TABLE.values())) if job.candidates else 0
    for candidate in range(most):
        for launch in capture(call, dtype, target, candidate):
            fits = launch.config.shared_bytes <= target.shared_bytes
            if fits and (launch.name, label(launch.config)) not in chosen:
                found.append((launch, False))
    return found


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1][:200]}"


def all_jobs() -> list[Job]:
    """Every architecture, dtype, layout and configuration."""
    return [Job(target, dtype) for target in TARGETS for dtype in DTYPES]


def quick_jobs() -> list[Job]:
    """A quarter of the work: what differs most.

    Every architecture compiles what a user gets in float16. bfloat16 differs from that by the type
    of a few instructions, and float32, the other layout and the other configurations by what the
    architectures have in common, so some architectures stand for the rest.
    """

    def usual(target: str, dtype: str, layout: str = "contiguous") -> Job:
        return Job(target, dtype, layouts=(layout,), candidates=False)

    jobs = [usual(target, "float16") for target in TARGETS]
    jobs += [usual(target, "float32") for target in ("sm_80", "sm_90", "sm_120", "gfx942")]
    jobs += [usual("sm_80", "bfloat16"), usual("sm_90", "float16", "channels_last")]
    return [*jobs, Job("sm_86", "float16", layouts=("contiguous",))]


def measure_all(jobs: Sequence[Job]) -> Found:
    """``measure`` for these jobs in two processes; progress goes to stderr."""
    found: Found = []
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for number, part in enumerate(pool.imap_unordered(measure, jobs), 1):
            found += part
            told = f"[{number}/{len(jobs)}] {len(found)} launches compiled"
            print(f"{told}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return found


# ------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """The worst of what is compiled under one key, and how many different kernels that is."""

    key: Key
    code: Code
    binaries: int
    preferred: bool


def rows(found: Found) -> list[Row]:
    """The usages by key; layouts that compile to the same become "any"."""
    usages = [one for one in found if isinstance(one, Usage)]
    layouts: dict[Key, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for usage in usages:
        layouts[replace(usage.key, layout="any")][usage.key.layout].add(usage.binary)
    groups: dict[Key, dict[str, Usage]] = defaultdict(dict)
    preferred = set()
    for usage in usages:
        either = replace(usage.key, layout="any")
        binaries = list(layouts[either].values())
        same = len(binaries) > 1 and all(other == binaries[0] for other in binaries)
        key = either if same else usage.key
        groups[key][usage.binary] = usage
        if usage.preferred:
            preferred.add(key)
    return [
        Row(key, worst([u.code for u in groups[key].values()]), len(groups[key]), key in preferred)
        for key in sorted(groups)
    ]


def worst(codes: Sequence[Code]) -> Code:
    """The largest of what is used and the least of what is wanted; never empty."""
    tightest = min(codes, key=lambda code: code.occupancy)
    multiplying = [code for code in codes if code.half_products > 0] or codes
    return replace(
        tightest,
        threads=max(code.threads for code in codes),
        registers=max(code.registers for code in codes),
        spill_bytes=max(code.spill_bytes for code in codes),
        shared_bytes=max(code.shared_bytes for code in codes),
        tensor_instructions=min(code.tensor_instructions for code in multiplying),
        products_per_issue=min(code.products_per_issue for code in multiplying),
        slow_products=max(code.slow_products for code in codes),
        half_products=max(code.half_products for code in codes),
        loads=max(code.loads for code in codes),
        wide_loads=min(code.wide_loads for code in codes),
    )
