"""Proofs that Triton kernels are free of races in every schedule, by `sentryward` on their PTX.

``python benchmarks/sentry.py`` (after ``pip install sentryward``) compiles the kernels at a small
size for sm_80 and asks for a proof of each; it exits with 1 if one of `PROVEN` is not proven or a
race is found. The kernels are compiled
with one warp a program: what is written in Triton and can go wrong is what programs do to each
other in global memory, and with several warps the verifier stops at the shared memory that Triton
itself puts between them, because it takes the same value stored by several lanes for a race. Such a
finding counts as "not proven", one in global memory as a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

if __package__ in (None, ""):  # run as a file: find the packages beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import triton_capture
from benchmarks.triton_compile import TARGETS, compile_launch, compiling_for
from fused.backends.triton import KERNELS
from fused.backends.triton.launch import Launch

TARGET = TARGETS["sm_80"]
SECONDS = 60
MEBIBYTES = 6000

_REDUCES = "sums through shared memory, where several lanes store the same value"
_LONG = "too long for the verifier"
# Kernels of which every form that is launched is proven.
PROVEN = (
    "channel_interaction_backward_kernel",
    "channel_statistics_backward_kernel",
    "cross_spatial_branches_kernel",
    "cross_spatial_pack_kernel",
    "msff_product_kernel",
    "msff_resize_backward_kernel",
    "msff_weight_kernel",
    "sum_partials_kernel",
)
# The others, and why not, or not every form of them.
NOT_PROVEN = {
    "channel_interaction_forward_kernel": _REDUCES,
    "channel_interaction_hidden_kernel": _REDUCES,
    "channel_interaction_outer_kernel": _REDUCES,
    "channel_statistics_forward_kernel": _REDUCES,
    "coordinate_attention_backward_kernel": _LONG,
    "coordinate_attention_forward_kernel": _LONG,
    "cross_spatial_attention_backward_kernel": _LONG,
    "cross_spatial_branches_backward_kernel": _LONG,
    "cross_spatial_convolutions_backward_kernel": _LONG,
    "cross_spatial_features_backward_kernel": _LONG,
    "cross_spatial_features_kernel": _LONG,
    "cross_spatial_forward_kernel": _LONG,
    "cross_spatial_gate_kernel": _REDUCES,
    "cross_spatial_inputs_backward_kernel": _LONG,
    "cross_spatial_recompute_kernel": _LONG,
    "cross_spatial_reduce_kernel": _LONG,
    "cross_spatial_vectors_kernel": _REDUCES,
    "gated_fusion_expand_kernel": _LONG,
    "gated_fusion_fold_kernel": _LONG,
    "gated_fusion_gate_kernel": _LONG,
    "gated_fusion_grad_expanded_kernel": _LONG,
    "gated_fusion_grad_hidden_kernel": _LONG,
    "gated_fusion_grad_input_kernel": _LONG,
    "gated_fusion_grad_logits_kernel": _REDUCES,
    "gated_fusion_grad_norm_kernel": _REDUCES,
    "gated_fusion_hidden_kernel": _LONG,
    "gated_fusion_logits_kernel": _REDUCES,
    "gated_fusion_mean_kernel": _REDUCES,
    "gated_fusion_norm_kernel": _REDUCES,
    "gated_fusion_out_kernel": _REDUCES,
    "gated_fusion_reduce_kernel": _REDUCES,
    "gated_fusion_sums_kernel": _REDUCES,
    "gated_fusion_weights_kernel": _LONG,
    "msff_backward_kernel": _LONG,
    "msff_forward_kernel": _LONG,
    "msff_moments_kernel": _REDUCES,
    "msff_statistics_kernel": _REDUCES,
    "msff_sums_kernel": _REDUCES,
}


@dataclass(frozen=True)
class Proof:
    """What the verifier says of a kernel.

    Attributes:
        kernel: its name.
        result: "race_free", "race" in global memory, or "not proven".
        reason: in the verifier's words, if not race_free.
    """

    kernel: str
    result: str
    reason: str = ""


def find_verifier() -> str | None:
    """The path of sentryward, or None."""
    beside = Path(sys.executable).with_name("sentryward")
    return str(beside) if beside.exists() else shutil.which("sentryward")


def launches(ops: Iterable[str] = tuple(KERNELS)) -> Iterator[Launch]:
    """Launches of the ops at a small size, in float16, with one warp a program."""
    with small_sizes():
        for call in triton_capture.calls(ops, ["contiguous"]):
            for launch in triton_capture.capture(call, torch.float16, TARGET):
                config = replace(launch.config, num_warps=1, num_stages=1)
                yield replace(launch, config=config)


@contextlib.contextmanager
def small_sizes() -> Iterator[None]:
    """Within it launches are captured at sizes that the verifier can go through."""
    triton_capture.module_tensors.cache_clear()
    try:
        with mock.patch.multiple(
            triton_capture, CHANNELS=32, GROUPS=2, SIZE=8, FEATURES=((16, 8), (32, 4))
        ):
            yield
    finally:
        triton_capture.module_tensors.cache_clear()


def prove_all(verifier: str, found: Iterable[Launch], seconds: int = SECONDS) -> Iterator[Proof]:
    """A proof for every different kernel of these launches."""
    seen = set()
    with compiling_for(TARGET):
        for launch in found:
            compiled = compile_launch(launch)
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                yield prove(verifier, launch, compiled, seconds)


def prove(verifier: str, launch: Launch, compiled: Any, seconds: int = SECONDS) -> Proof:
    """Runs the verifier on one compiled kernel with the grid and numbers of its launch."""
    given = launch_input(launch, compiled)
    return ask(verifier, launch.name, compiled.asm["ptx"], given, seconds)


def ask(verifier: str, kernel: str, ptx: str, given: dict[str, Any], seconds: int) -> Proof:
    """What the verifier says of a kernel, its PTX and its input."""
    with tempfile.TemporaryDirectory() as folder:
        file, numbers = Path(folder) / "kernel.ptx", Path(folder) / "input.json"
        file.write_text(ptx)
        numbers.write_text(json.dumps(given))
        command = [verifier, str(file), "--input", str(numbers), "--timeout", str(seconds)]
        command += ["--memory-limit-mib", str(MEBIBYTES)]
        told = subprocess.run(command, capture_output=True, text=True)
    try:
        return judge(kernel, json.loads(told.stdout))
    except json.JSONDecodeError:
        return Proof(kernel, "not proven", told.stderr[-200:] or "the verifier said nothing")


def judge(kernel: str, told: dict[str, Any]) -> Proof:
    """Reads the verifier's answer; its exit status says nothing."""
    result = told.get("result", "")
    if result == "race_free":
        return Proof(kernel, result)
    spaces = {
        race.get("region", {}).get("address_space", "unknown") for race in told.get("races", ())
    }
    if result in ("potential_race", "not_wellsynced", "invalid_lifecycle") and spaces != {"shared"}:
        return Proof(
            kernel, "race", f"{result} in {', '.join(sorted(spaces)) or 'synchronisation'}"
        )
    reasons = [str(one.get("code")) for one in told.get("diagnostics", ())]
    where = " in shared memory" if spaces == {"shared"} else ""
    return Proof(kernel, "not proven", f"{result}{where}: {', '.join(reasons[:2])}")


def launch_input(launch: Launch, compiled: Any) -> dict[str, Any]:
    """The verifier's input: sizes of grid and block, and the values of integer arguments."""
    ptx = compiled.asm["ptx"]
    declared = ptx.split(".entry")[1].split("{")[0]
    parameters = re.findall(r"\.param \.([bfsu]\d+)[^,)]*?(\w+_param_\d+)", declared)
    values = launch.named_args()
    given = [
        value
        for name, kind in compiled.src.signature.items()
        for value in _run_time(kind, values.get(name))
    ]
    arguments = [
        {"type": kind.replace("b", "u"), "value": value, "parameter": name}
        for value, (kind, name) in zip(given, parameters, strict=False)
        if isinstance(value, int)
    ]
    grid = [*launch.grid, 1, 1][:3]
    threads = 32 * launch.config.num_warps
    return {
        "schema": "spverify.kernel-input/v1",
        "launch": {"grid_dim": grid, "block_dim": [threads, 1, 1]},
        "arguments": arguments,
    }


def _run_time(kind: Any, value: Any) -> Iterator[Any]:
    """The values that become parameters of the PTX; tuples are flattened, constants left out."""
    if isinstance(kind, tuple):
        for part, one in zip(kind, value, strict=True):
            yield from _run_time(part, one)
    elif kind != "constexpr":
        yield value


def main() -> int:
    """Prints a line a kernel; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--op", action="append", choices=list(KERNELS), help="only this; repeatable"
    )
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of a kernel")
    options = parser.parse_args()
    verifier = find_verifier()
    if verifier is None:
        print("sentryward is not installed: pip install sentryward", file=sys.stderr)
        return 2
    failed = 0
    for proof in prove_all(verifier, launches(options.op or KERNELS), options.seconds):
        print(f"{proof.kernel:45} {proof.result:10} {proof.reason}", flush=True)
        lost = proof.kernel in PROVEN and proof.result != "race_free"
        failed += lost or proof.result == "race"
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
