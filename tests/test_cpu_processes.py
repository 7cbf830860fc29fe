"""The CPU backend's stages in a forked process, and on numbers too small to be normal."""

from __future__ import annotations

import hashlib
import os
import select
import signal
import sys
from collections.abc import Callable

import pytest
import torch
from stage_cases import (
    OPS,
    Sizes,
    arguments,
    convert,
    differentiable,
    error,
    require_grad,
    tolerance,
)

SIZES = Sizes(2, 64, 11, 9, 4)


def everything() -> bytes:
    """A digest of all stages' outputs and gradients, forward in evaluation and training."""
    digest = hashlib.sha256()
    for name, op in OPS.items():
        for training in (False, True):
            args = convert(name, arguments(name, SIZES, training), torch.float32, "contiguous")
            leaves = require_grad(name, args)
            outputs = op(*args, backend="cpu")
            results = differentiable(name, outputs)
            grads = torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])
            for tensor in (*outputs, *grads):
                digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.digest()


def in_a_fork(work: Callable[[], bytes], seconds: float = 120.0) -> bytes:
    """What `work` returns in a child of this process; fails if it hangs or dies."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, work())
        finally:
            os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], seconds)
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    content = os.read(reading, 64) if ready else b""
    os.close(reading)
    assert ready, "the child hung"
    return content


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_computes_the_same_bits(threads: int) -> None:
    """As a DataLoader's worker does, which works with one thread whatever its parent used."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        here = everything()

        def work() -> bytes:
            torch.set_num_threads(1)
            torch.autograd.set_multithreading_enabled(False)
            return everything()

        assert in_a_fork(work) == here
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", OPS)
def test_subnormal_maps(name: str) -> None:
    """Maps around 2⁻¹²⁶, half of them below: nothing is flushed to zero, nothing overflows.

    In evaluation: batch statistics of such maps are zero in float32, whoever computes them.
    """
    named = arguments(name, SIZES)

    def tiny(value: object) -> object:
        if isinstance(value, list):
            return [tiny(one) for one in value]
        return (value * 2e-38).float().double() if isinstance(value, torch.Tensor) else value

    main = OPS[name].maps[0]
    named[main] = tiny(named[main])
    exact = convert(name, named, torch.float64, "contiguous")
    want = OPS[name](*exact, backend="reference")
    got = OPS[name](*convert(name, named, torch.float32, "contiguous"), backend="cpu")
    for output, mine, its in zip(OPS[name].outputs, got, want, strict=True):
        scale = its.abs().max().item() if its.numel() and its.is_floating_point() else 1.0
        scale = scale or 1.0
        if scale < 1e-30:  # so that the error is not measured against 0.1
            mine, its = mine.double() / scale, its / scale
        assert error(mine, its) <= tolerance(torch.float32)[0], output
