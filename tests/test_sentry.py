"""sentryward proves kernels free of races, and finds the race of one that has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused.backends.triton import INTERPRETER

pytest.importorskip("triton")
if INTERPRETER:
    pytest.skip("the interpreter is on: nothing can be compiled", allow_module_level=True)

import triton
import triton.language as tl

from benchmarks import sentry
from benchmarks.triton_compile import compile_launch, compiling_for
from fused.backends.triton.configs import Config
from fused.backends.triton.launch import Launch

VERIFIER = sentry.find_verifier()
needs_verifier = pytest.mark.skipif(VERIFIER is None, reason="sentryward is not installed")


@triton.jit
def neighbours_kernel(x, out, sizes, STEP: tl.constexpr, BLOCK_P: tl.constexpr):
    """Program i writes BLOCK_P values from i·STEP on: with a smaller STEP, over its neighbour's."""
    p = tl.program_id(0) * STEP + tl.arange(0, BLOCK_P)
    value = tl.load(x + p, mask=p < sizes[1], other=0.0)
    tl.store(out + p, value, mask=p < sizes[1])


def neighbours(step: int) -> Launch:
    x, out = torch.empty(128), torch.empty(128)
    config = Config({"BLOCK_P": 32}, num_warps=1, num_stages=1)
    # The sizes arrive as a tuple whose first is 1 and becomes a constant.
    return Launch(neighbours_kernel, (4,), (x, out, (1, 120)), {"STEP": step}, config)


def test_the_input_says_the_grid_and_the_numbers() -> None:
    launch = neighbours(32)
    with compiling_for(sentry.TARGET):
        given = sentry.launch_input(launch, compile_launch(launch))
    assert given["launch"] == {"grid_dim": [4, 1, 1], "block_dim": [32, 1, 1]}
    (size,) = given["arguments"]
    assert size == {"type": "u32", "value": 120, "parameter": "neighbours_kernel_param_2"}


@pytest.mark.parametrize(
    ("told", "result", "reason"),
    [
        ({"result": "race_free"}, "race_free", ""),
        ({"result": "potential_race", "races": ["global"]}, "race", "potential_race in global"),
        ({"result": "not_wellsynced"}, "race", "not_wellsynced in synchronisation"),
        ({"result": "potential_race", "races": ["shared"]}, "not proven", "in shared memory"),
        ({"result": "potential_race", "races": ["shared", "global"]}, "race", "global, shared"),
        ({"result": "timeout"}, "not proven", "timeout: late"),
        ({}, "not proven", ": late"),
    ],
)
def test_answers_are_read(told: dict[str, Any], result: str, reason: str) -> None:
    races = [{"region": {"address_space": space}} for space in told.get("races", [])]
    proof = sentry.judge("kernel", told | {"races": races, "diagnostics": [{"code": "late"}]})
    assert proof.result == result
    assert reason in proof.reason


def test_every_kernel_is_either_proven_or_has_a_reason() -> None:
    from fused.backends.triton import configs

    assert not set(sentry.PROVEN) & set(sentry.NOT_PROVEN)
    assert {*sentry.PROVEN, *sentry.NOT_PROVEN} == {kernel for kernel, _ in configs.TABLE}


@needs_verifier
def test_a_planted_race_is_found() -> None:
    (clean,) = sentry.prove_all(VERIFIER, [neighbours(32)])
    assert clean.result == "race_free"
    (racing,) = sentry.prove_all(VERIFIER, [neighbours(16)])
    assert racing.result == "race", racing.reason
    assert "global" in racing.reason


@needs_verifier
@pytest.mark.parametrize("op", ["channel_statistics_backward", "msff_backward"])
def test_proven_kernels_are_free_of_races(op: str) -> None:
    launches = [one for one in sentry.launches([op]) if one.name in sentry.PROVEN]
    proofs = list(sentry.prove_all(VERIFIER, launches))
    assert proofs
    assert {proof.result for proof in proofs} == {"race_free"}, proofs
