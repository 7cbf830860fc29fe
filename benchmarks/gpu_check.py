"""``python -m benchmarks.gpu_check``: every stage once on small maps, forward and backward.

A quick look whether a backend's kernels run on this GPU and are right, before anything longer.
``--tool memcheck`` (racecheck, initcheck, synccheck) does the same under NVIDIA's
compute-sanitizer, which watches the kernels of this project and no others, in a process for each
stage: a tool that breaks in one says nothing of the others.

Exit status: 0, or 1 if a stage is wrong or the tool found something, or 2 if nothing can run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .gpu_rows import BAD, LAYOUTS, MODES, OK, STAGES, Row

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("triton", "cuda")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 99  # compute-sanitizer's exit status when it found something
# How a finding begins, which a tool that breaks later has told before.
FINDINGS = ("========= Error: Race", "========= Invalid", "========= Uninitialized")
# Training comes without a precision of its own: its maps are those of autocast.
PRECISIONS = ("fp32", "bf16")
SCALE = "odd"


def rows(
    backends: Iterable[str], layouts: Iterable[str] = LAYOUTS, stages: Iterable[str] = STAGES
) -> list[Row]:
    """Every stage, both modes, single and half precision, batch 2."""
    return [
        Row(stage, mode, 2, precision, layout, f"fused-{backend}")
        for backend in backends
        for stage in stages
        for mode in MODES
        for precision in PRECISIONS
        for layout in layouts
    ]


def check(chosen: Sequence[Row], device: str) -> int:
    """Run the rows here; the exit status."""
    import torch

    from .gpu_run import Bench

    if device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU", file=sys.stderr)
        return 2
    bench = Bench(SCALE, device, clock=None)
    status, ran = 0, 0
    skipped: dict[str, list[str]] = {}
    # Case by case, so that each is drawn and judged in float64 once.
    for row in sorted(chosen, key=lambda row: (row.subject, row.mode, row.precision)):
        facts = bench.run(row)
        if facts["status"] in BAD:
            status = 1
        if facts["status"] == OK:
            ran += 1
            print(f"{row.key}: right, error {facts['error']:.1e}", flush=True)
        elif facts["status"] in BAD:
            print(f"{row.key}: {facts['status']}: {facts['reason']}", flush=True)
        else:
            skipped.setdefault(facts["reason"], []).append(f"{row.subject} {row.provider}")
        if "spoiled" in facts:
            print(f"the GPU is of no more use to this process: {facts['spoiled']}", flush=True)
            return 1
    for reason, keys in skipped.items():
        print(f"skipped: {', '.join(dict.fromkeys(keys))}: {reason}", flush=True)
    print(f"{ran} of {len(chosen)} right, {sum(map(len, skipped.values()))} skipped", flush=True)
    return status or (0 if ran else 2)


def kernel_names() -> list[str]:
    """Names of all kernels in the sources, Triton's and CUDA's."""
    files = [*(ROOT / "fused" / "backends" / "triton").glob("*.py")]
    files += [f for f in (ROOT / "csrc" / "cuda").rglob("*") if f.suffix in (".cu", ".cuh")]
    found: set[str] = set()
    for file in files:
        pattern = r"@triton\.jit[^\n]*\s+def (\w+_kernel)\("
        if file.suffix != ".py":
            pattern = r"\b(\w+_kernel)\s*\("
        found.update(re.findall(pattern, file.read_text(encoding="utf-8")))
    return sorted(found)


def sanitized(tool: str, arguments: Sequence[str]) -> int:
    """Run this check under a tool of compute-sanitizer; the exit status."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print(
            "error: compute-sanitizer is not on PATH; it is in CUDA's bin folder", file=sys.stderr
        )
        return 2
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command += ["--kernel-regex", "kns=" + "|".join(kernel_names())]
    command += [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        # Every tensor an allocation of its own, or a read past one would end in another's memory.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "CUDA_LAUNCH_BLOCKING": "1",  # an error is told of at its own launch
    }
    done = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    broken = found = False
    with done:
        assert done.stdout is not None
        for line in done.stdout:
            print(line, end="", flush=True)
            broken |= "Internal Sanitizer Error" in line
            found |= line.startswith(FINDINGS)
    # Its own failure and the end of the process that follows have the exit status of a finding.
    if done.returncode == FOUND and (found or not broken):
        print(f"{tool} found something in the kernels of this project, see above", flush=True)
        return 1
    if done.returncode != 0:
        print(f"{tool} itself or the check under it failed, exit status {done.returncode}")
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="which to check")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which to check")
    add("--tool", choices=TOOLS, help="run under this tool of compute-sanitizer")
    add("--quick", action="store_true", help="contiguous maps only")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: Triton's interpreter")
    add("--kernels", action="store_true", help="print the kernels' names and exit")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the options ask for."""
    options = parser().parse_args(arguments)
    if options.kernels:
        print("\n".join(kernel_names()))
        return 0
    if options.tool is not None:
        inner = ["--device", options.device, *(["--quick"] if options.quick else [])]
        inner += ["--backends", *options.backends, "--stages"]
        statuses = [sanitized(options.tool, [*inner, stage]) for stage in options.stages]
        return 1 if 1 in statuses else max(statuses)
    layouts = LAYOUTS[:1] if options.quick else LAYOUTS
    return check(rows(options.backends, layouts, options.stages), options.device)


if __name__ == "__main__":
    sys.exit(main())
