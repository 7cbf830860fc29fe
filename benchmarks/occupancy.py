"""How many blocks an NVIDIA multiprocessor holds at once, and what admits no more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ programming guide, table of compute capabilities)."""

    threads: int
    shared_bytes: int
    blocks: int
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(2048, 167936, 32),
    86: Multiprocessor(1536, 102400, 16),
    89: Multiprocessor(1536, 102400, 24),
    90: Multiprocessor(2048, 233472, 32),
    100: Multiprocessor(2048, 233472, 32),
    120: Multiprocessor(1536, 102400, 24),
}


def occupancy(
    architecture: int, threads: int, registers: int, shared_bytes: int
) -> tuple[int, tuple[str, ...]]:
    """Blocks that fit a multiprocessor at once, and what admits no more.

    Args:
        architecture: a key of ``MULTIPROCESSORS``.
        threads: of a block.
        registers: of a thread.
        shared_bytes: of a block, static and dynamic.

    Returns:
        The number of blocks and the limiting resources among ``warps``, ``blocks``, ``registers``
        and ``shared memory``. The rules are those of ``cuda_occupancy.h``: registers are given to
        a warp in units of 256 and the four quarters of a multiprocessor hold whole warps; shared
        memory comes in units of 128 bytes, 1 KiB of it to the system for each block.
    """
    limits = MULTIPROCESSORS[architecture]
    warps = -(-threads // 32)
    by_resource = {"warps": limits.threads // 32 // warps, "blocks": limits.blocks}
    if registers > 0:
        registers_of_warp = -(-registers * 32 // 256) * 256
        warps_that_fit = limits.registers // 4 // registers_of_warp * 4
        # A launch is checked as if every quarter held as many warps as the fullest.
        launchable = registers_of_warp * (-(-warps // 4) * 4) <= limits.registers
        by_resource["registers"] = warps_that_fit // warps if launchable else 0
    shared_of_block = -(-(shared_bytes + 1024) // 128) * 128
    by_resource["shared memory"] = limits.shared_bytes // shared_of_block
    blocks = min(by_resource.values())
    return blocks, tuple(name for name, limit in by_resource.items() if limit == blocks)
