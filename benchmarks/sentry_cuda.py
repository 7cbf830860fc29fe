"""Proofs that CUDA kernels are free of races in every schedule, by `sentryward` on their PTX.

``python benchmarks/sentry_cuda.py`` (after ``pip install sentryward``; needs nvcc) captures the
launches of the cuda backend at a small size, hands the PTX of each kernel to the verifier with the
grid, the block and the numbers of its launch, and exits with 1 if one of `PROVEN` is not proven in
any launch or a race is found in global memory. The verifier knows scalar parameters only: a
structure is taken apart into what the kernel loads of it. That different pointers lead to different
tensors is assumed: outputs and scratch are new ones. It gives up on kernels that ask whether a
pointer is null, that index a parameter, or that take longer than it is given: those are what the
emulator alone has checked.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: find the packages beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import cuda_capture, triton_capture
from benchmarks.budgets import BUILD, find_nvcc, run_compiler, short_name
from benchmarks.cuda_capture import KernelLaunch
from benchmarks.sentry import SECONDS, Proof, ask, find_verifier, small_sizes

FAMILY = "compute_120"  # of nvcc's, the verifier knows this one and compute_100a
DTYPE = "float16"

# Of these at least one launch is proven, in half a minute each; "file of csrc/cuda: kernel".
_GATED = "Tile<32, 32, 2, 2>, Loader<1, false>, Gate<__half> >"
PROVEN = (
    f"channel_interaction: product_kernel<__half, 0, 0, {_GATED}",
    f"channel_interaction: product_kernel<__half, 0, 1, {_GATED}",
    "channel_statistics: forward_channels_last_kernel<__half, 8>",
    "gated_fusion: product_kernel<__half, 0, 1, 0>",
    "gated_fusion_gate_backward: gate_sums_kernel<Lanes<__half, 0> >",
    "gated_fusion_gate_backward: gate_sums_kernel<Lanes<__half, 1> >",
    "gated_fusion_moments: product_kernel<__half, 0, 1, 3>",
)

_LOAD = re.compile(r"ld\.param\.(?:v\d\.)?([bfsu]\d+)\s+([^;]+?), \[(\w+?)(?:\+(\d+))?\];")
_DECLARED = re.compile(r"\.param (?:\.align \d+ )?\.(\w+) (\w+)(?:\[\d+\])?(?=[,\n])")


def launches(ops: Iterable[str] | None = None) -> list[KernelLaunch]:
    """What the ops start at a small size, both modes and layouts."""
    dtype = triton_capture.DTYPES[DTYPE]
    with small_sizes():
        return [
            made
            for call in cuda_capture.all_calls(ops)
            for made in cuda_capture.dry(cuda_capture.entries(call, dtype))
        ]


@functools.cache
def kernels_of(stem: str) -> dict[str, str]:
    """Kernel by short name → its PTX alone, for one file of `csrc/cuda`.

    Raises:
        RuntimeError: nvcc's message, if it does not compile.
    """
    source = cuda_capture.ROOT / "csrc" / "cuda" / f"{stem}.cu"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernels.ptx"
        flags = [*BUILD["NVCC_FLAGS"], f"-arch={FAMILY}", "-ptx"]
        run_compiler([str(find_nvcc()), *flags, str(source), "-o", str(ptx)])
        return split(ptx.read_text())


def split(ptx: str) -> dict[str, str]:
    """Kernel by short name → the module's head and that kernel."""
    head, *entries = re.split(r"(?=^\.visible \.entry )", ptx, flags=re.MULTILINE)
    shared = "\n".join(re.findall(r"^(?:\.version|\.target|\.address_size|\.extern).*", head, re.M))
    found = {}
    for entry in entries:
        body = entry[: entry.index("\n}") + 3]
        symbol = re.search(r"\.entry (\w+)\(", body)
        assert symbol is not None
        found[short_name(symbol[1])] = f"{shared}\n\n{body}"
    return found


def with_scalars(ptx: str) -> tuple[str, dict[str, tuple[int, int, str]]]:
    """The PTX with a parameter for each part that is loaded; its name → (parameter, offset, type).

    Raises:
        ValueError: the kernel indexes a parameter, as it would an array.
    """
    head, brace, body = ptx.partition(")\n")
    declared = [name for _, name in _DECLARED.findall(head.partition(".entry")[2] + "\n")]
    parts: dict[str, tuple[int, int, str]] = {}

    def apart(found: re.Match[str]) -> str:
        kind, registers, name, offset = found.groups()
        loads = []
        for i, register in enumerate(registers.strip("{} ").split(",")):
            at = int(offset or 0) + i * int(kind[1:]) // 8
            part = f"{name}_{at}"
            parts[part] = (declared.index(name), at, kind)
            loads.append(f"ld.param.{kind} {register.strip()}, [{part}];")
        return "\n\t".join(loads)

    body = _LOAD.sub(apart, _without_addresses(body, declared))
    if any(re.search(rf"\b{name}\b", body) for name in declared):
        raise ValueError("indexes its parameters")
    ordered = sorted(parts, key=lambda part: parts[part])
    scalars = ",\n".join(f"\t.param .{parts[part][2]} {part}" for part in ordered)
    return f"{head[: head.index('(') + 1]}\n{scalars}\n{brace}{body}", parts


def _without_addresses(body: str, parameters: list[str]) -> str:
    """Loads through a register that holds a parameter's address name the parameter instead."""
    known = {name: name for name in parameters}
    for target, source in re.findall(r"(?:mov|cvta\.param)\.[bu]64 \s*(%rd\d+), ([%\w]+);", body):
        if source in known:
            known[target] = known[source]
    registers = [name for name in known if name.startswith("%")]
    for register in registers:
        body = re.sub(rf"(ld\.param\.[^;]*\[){register}(?=[\]+])", rf"\g<1>{known[register]}", body)
    moves = "|".join(map(re.escape, known))
    left = re.sub(rf"(?:mov|cvta\.param)\.[bu]64 \s*%rd\d+, (?:{moves});", "", body)
    if any(re.search(rf"{register}\b", left) for register in registers):
        raise ValueError("indexes its parameters")
    return left


def verifiers_input(made: KernelLaunch, parts: dict[str, tuple[int, int, str]]) -> dict[str, Any]:
    """Grid, block and every whole number that the kernel loads; pointers are left to be any."""
    arguments = []
    for part, (parameter, offset, kind) in parts.items():
        size = int(kind[1:]) // 8
        content = made.parameters[parameter][offset : offset + size]
        value = int.from_bytes(content, "little", signed=kind[0] == "s")
        if kind[0] != "f" and value < cuda_capture.pointer(0):
            known = {"type": kind.replace("b", "u"), "value": value, "parameter": part}
            arguments.append(known)
    return {
        "schema": "spverify.kernel-input/v1",
        "launch": {"grid_dim": list(made.grid), "block_dim": list(made.block)},
        "arguments": arguments,
    }


def prove(verifier: str, made: KernelLaunch, ptx: str, seconds: int = SECONDS) -> Proof:
    """Runs the verifier on one kernel with the grid and numbers of its launch."""
    try:
        scalars, parts = with_scalars(ptx)
    except ValueError as error:
        return Proof(made.kernel, "not proven", str(error))
    return ask(verifier, made.kernel, scalars, verifiers_input(made, parts), seconds)


def prove_all(
    verifier: str, found: Iterable[KernelLaunch], seconds: int = SECONDS
) -> Iterator[Proof]:
    """A proof for every different kernel and launch of it."""
    seen = set()
    for made in found:
        if made in seen:
            continue
        seen.add(made)
        stem = cuda_capture.file_of(made)
        proof = prove(verifier, made, kernels_of(stem)[made.kernel], seconds)
        yield replace(proof, kernel=f"{stem}: {made.kernel}")


def main() -> int:
    """Prints a line a launch; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", help="only this; repeatable")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of a kernel")
    options = parser.parse_args()
    verifier = find_verifier()
    if verifier is None or find_nvcc() is None:
        missing = "nvcc" if verifier else "sentryward (pip install sentryward)"
        print(f"{missing} is not installed", file=sys.stderr)
        return 2
    raced, kernels, proven = False, set(), set()
    for proof in prove_all(verifier, launches(options.op), options.seconds):
        print(f"{proof.kernel:95} {proof.result:10} {proof.reason}", flush=True)
        raced |= proof.result == "race"
        kernels.add(proof.kernel)
        proven |= {proof.kernel} if proof.result == "race_free" else set()
    lost = kernels & set(PROVEN) - proven
    print(f"{len(proven)} of {len(kernels)} kernels proven", *(f"no longer {k}" for k in lost))
    return 1 if raced or lost else 0


if __name__ == "__main__":
    sys.exit(main())
