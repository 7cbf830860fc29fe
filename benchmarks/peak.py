"""The machine's peak, as far as a program reaches it: the quickest large product of the run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from fused.backends import cpu, cpu_products, native

SIZE = 1024  # 4 MB an operand: far above what starting costs, and half a third-level cache
ROUNDS = 20


def _quickest(call: Callable[[], object]) -> float:
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


@functools.lru_cache
def peak_gflop_per_second(dtype: torch.dtype, threads: int) -> float:
    """GFLOP/s of the quickest of torch's and our product of 1024³ with operands of `dtype`.

    The instruction set's own peak is some per cent above it. Torch's number of threads must be
    `threads` already; it is an argument because the result depends on it.
    """
    assert torch.get_num_threads() == threads
    a = torch.randn(SIZE, SIZE).to(dtype)
    calls: list[Callable[[], object]] = [lambda: a @ a]
    if cpu.LIBRARY.error is None:
        x = torch.randn(1, SIZE, SIZE // 32, 32).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        packed, run = cpu_products.pack(a.float(), x), native.kernel("pointwise_packed")
        calls.append(lambda: run(x, packed, None, None, False))
    with torch.no_grad():
        return 2 * SIZE**3 / min(map(_quickest, calls)) / 1e9
