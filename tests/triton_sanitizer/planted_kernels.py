"""Small kernels, each right, and wrong in one way where BUG is set."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """out = x + y; BUG: the last block's mask lets one element too many through."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index <= n if BUG else index < n
    total = tl.load(x + index, mask=mask) + tl.load(y + index, mask=mask)
    tl.store(out + index, total, mask=index < n)


@triton.jit
def product_kernel(
    a, b, out, M, N, K, BLOCK: tl.constexpr, PRECISION: tl.constexpr, BUG: tl.constexpr
):
    """out (M, N) = a (M, K) · b (K, N).

    BUG "k": a is read past K; "tiles": a tile begins in the middle of the last one; "out": the
    product is added to an `out` that holds nothing yet.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        down, along = start + tl.arange(0, BLOCK)[:, None], start + tl.arange(0, BLOCK)[None, :]
        inside = row < M if BUG == "k" else (row < M) & (along < K)
        lhs = tl.load(a + row * K + along, mask=inside, other=0.0)
        rhs = tl.load(b + down * N + column, mask=(down < K) & (column < N), other=0.0)
        total = tl.dot(lhs, rhs, total, input_precision=PRECISION)
    if BUG == "tiles":
        row = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK)[:, None]
    place, inside = out + row * N + column, (row < M) & (column < N)
    if BUG == "out":
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(x, out, n, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """out += Σ x over all programs; BUG: load, add, store instead of an atomic."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + index, mask=index < n, other=0))
    if BUG:
        tl.store(out, tl.load(out) + total)
    else:
        tl.atomic_add(out, total)


@triton.jit
def last_kernel(out, BUG: tl.constexpr):
    """The largest program number; BUG: the number of the program that came last."""
    program = tl.program_id(0)
    if BUG:
        tl.atomic_xchg(out, program)
    else:
        tl.atomic_max(out, program)


@triton.jit
def arrival_kernel(x, partial, counter, out, n, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """out = Σ x by the program that arrives last, from the programs' partial sums in their order.

    BUG "relaxed": arriving orders nothing; "barrier": it comes before other threads' stores.
    """
    program = tl.program_id(0)
    index = program * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + index, mask=index < n, other=0.0)
    tl.store(partial + index, values)
    if BUG != "barrier":
        tl.debug_barrier()
    if BUG == "relaxed":
        arrived = tl.atomic_add(counter, 1, sem="relaxed")
    else:
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        tl.debug_barrier()
        total = tl.zeros((BLOCK,), tl.float32)
        for one in range(0, tl.num_programs(0)):
            total += tl.load(partial + one * BLOCK + tl.arange(0, BLOCK))
        tl.store(out, tl.sum(total))


@triton.jit
def halo_kernel(x, out, n, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """out[i] = x[i] + x[i − 1]; BUG: also at i = 0."""
    index = tl.arange(0, BLOCK)
    first = 0 if BUG else 1
    left = tl.load(x + index - 1, mask=(index >= first) & (index < n), other=0.0)
    here = tl.load(x + index, mask=index < n, other=0.0)
    tl.store(out + index, here + left, mask=index < n)


@triton.jit
def pairs_kernel(x, out, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """Copies 16-bit elements two at a time; BUG: from an odd one on."""
    start = 1 if BUG else 2
    index = tl.arange(0, BLOCK)
    words = (x + start).to(tl.pointer_type(tl.int32))
    tl.store(out.to(tl.pointer_type(tl.int32)) + index, tl.load(words + index))


@triton.jit
def shift_kernel(x, out, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    """out[i] = x[i + BLOCK], TWICE: after 0·x[i]; a race if x and out are the same memory."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if TWICE:
        tl.store(out + index, tl.load(x + index) * 0.0)
    tl.store(out + index, tl.load(x + index + BLOCK))


@triton.jit
def turn_kernel(x, scratch, out, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """out = x backwards, through scratch memory; BUG: without a barrier."""
    index = tl.arange(0, BLOCK)
    tl.store(scratch + index, tl.load(x + index))
    if not BUG:
        tl.debug_barrier()
    tl.store(out + index, tl.load(scratch + BLOCK - 1 - index))


@triton.jit
def lanes_kernel(x, out, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """Every pair of lanes stores to one element; BUG: not the same value."""
    index = tl.arange(0, BLOCK)
    tl.store(out + index // 2, tl.load(x + (index if BUG else index // 2 * 2)))


@triton.jit
def assert_kernel(x, limit):
    """Asserts that x is below the limit."""
    tl.device_assert(tl.load(x) < limit, "too large")


@triton.jit
def arithmetic_kernel(x, y, out, flags, BLOCK: tl.constexpr):
    """out = x·y + 1.5·x − y, and how x and y compare."""
    index = tl.arange(0, BLOCK)
    a, b = tl.load(x + index), tl.load(y + index)
    tl.store(out + index, a * b + a * 1.5 - b)
    tl.store(flags + index, ((a > b) & (a < 0.5)).to(tl.int32))


@triton.jit
def cast_kernel(x, out, BLOCK: tl.constexpr):
    """out = x in out's type."""
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(x + index).to(out.dtype.element_ty))


@triton.jit
def _larger(a, i, b, j):
    first = (a > b) | ((a == b) & (i < j))
    return tl.where(first, a, b), tl.where(first, i, j)


@triton.jit
def largest_kernel(x, value, where, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Maximum of each row and its first column, by a combine function of our own."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(x + row[:, None] * COLUMNS + column[None, :])
    columns = tl.broadcast_to(column[None, :], (ROWS, COLUMNS))
    best, index = tl.reduce((values, columns), 1, _larger)
    tl.store(value + row, best)
    tl.store(where + row, index)
