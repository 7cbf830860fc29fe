"""The sanitizer of Triton kernels finds every planted bug and is silent on its right twin.

Runs with FUSED_TRITON_INTERPRETER=1 in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fused.backends.triton import INTERPRETER

if not INTERPRETER:
    pytest.skip(
        "needs FUSED_TRITON_INTERPRETER=1: Triton chooses its interpreter when it is imported",
        allow_module_level=True,
    )

import triton.language as tl
from stage_cases import Sizes, arguments, convert
from triton.runtime import interpreter
from triton_sanitizer import Finding, collecting, operation, planted_kernels, sanitized
from triton_sanitizer.arithmetic import narrow, repaired, round_to_tf32, widen
from triton_sanitizer.checker import MemoryChecks
from triton_sanitizer.launch_check import programs

from fused import ops
from fused.backends.triton import configs, launch


def run(
    kernel: Any, grid: tuple[int, ...], *args: Any, scratch: Any = (), **constexprs: Any
) -> None:
    launch.launch(kernel, grid, *args, config=configs.Config(), scratch=scratch, **constexprs)


def operands(rows: int, inner: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)]


def multiply(
    a: torch.Tensor, b: torch.Tensor, precision: str = "ieee", bug: str = "", block: int = 16
) -> torch.Tensor:
    (rows, inner), columns = a.shape, b.shape[1]
    out = torch.empty(rows, columns)
    grid = (launch.cdiv(rows, block), launch.cdiv(columns, block))
    sizes = (rows, columns, inner)
    kernel = planted_kernels.product_kernel
    run(kernel, grid, a, b, out, *sizes, BLOCK=block, PRECISION=precision, BUG=bug)
    return out


# ----------------------------------------------------------------------------------- planted bugs


def add(bug: bool, *, blocks: int = 4, n: int = 100) -> torch.Tensor:
    x, y = torch.randn(n), torch.randn(n)
    with operation("add") as op:
        out = torch.empty(n)
        run(planted_kernels.add_kernel, (blocks,), x, y, out, n, BLOCK=32, BUG=bug)
        op.check_results(out)
    assert torch.equal(out, x + y)
    return out


def product(bug: str) -> None:
    a, b = operands(40, 20, 24, torch.float32)
    with operation("product") as op:
        out = multiply(a, b, bug=bug)
        op.check_results(out)
    assert torch.allclose(out, a @ b, atol=1e-5)


def accumulation(bug: bool) -> None:
    x, out = torch.arange(100), torch.zeros(1, dtype=torch.int64)
    run(planted_kernels.sum_kernel, (4,), x, out, 100, BLOCK=32, BUG=bug)
    assert out.item() == 4950


def order(bug: bool) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    run(planted_kernels.last_kernel, (5,), out, BUG=bug)
    assert out.item() == 4


def arrival(bug: str) -> None:
    x, out, counter = torch.randn(100), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    args = (x, torch.randn(128), counter, out, 100)
    run(planted_kernels.arrival_kernel, (4,), *args, BLOCK=32, BUG=bug)
    assert torch.allclose(out, x.sum(), atol=1e-5)


def halo(bug: bool) -> None:
    x, out = torch.randn(20), torch.zeros(20)
    run(planted_kernels.halo_kernel, (1,), x, out, 20, BLOCK=32, BUG=bug)


def misaligned(bug: bool) -> None:
    x, out = torch.randn(40).half(), torch.zeros(32).half()
    run(planted_kernels.pairs_kernel, (1,), x, out, BLOCK=16, BUG=bug)
    assert torch.equal(out, x[2:34])


def foreign_read(bug: bool, twice: bool = False) -> None:
    """Program p stores block p and reads block p + 1, which program p + 1 stores."""
    memory = torch.randn(64)
    out = memory if bug else torch.zeros(64)
    run(planted_kernels.shift_kernel, (3,), memory, out, BLOCK=16, TWICE=twice)


def barrier(bug: bool) -> None:
    x, scratch, out = (torch.randn(16) for _ in range(3))
    run(planted_kernels.turn_kernel, (1,), x, scratch, out, BLOCK=16, BUG=bug)
    assert torch.equal(out, x.flip(0))


def lanes(bug: bool) -> None:
    x, out = torch.randn(16), torch.zeros(8)
    run(planted_kernels.lanes_kernel, (1,), x, out, BLOCK=16, BUG=bug)


def holes(bug: bool) -> None:
    """A view of every second element, read as if it held all: a matrix, vectors are made dense."""
    x, y, out = torch.randn(64), torch.randn(64), torch.zeros(64)
    x = x[None, ::2] if bug else x
    run(planted_kernels.add_kernel, (1,), x, y, out, 32, BLOCK=32, BUG=False)


def input_written(bug: bool) -> None:
    x, y = torch.randn(32), torch.randn(32)
    with operation("add"):
        out = x if bug else torch.empty(32)
        run(planted_kernels.add_kernel, (1,), y, y, out, 32, BLOCK=32, BUG=False)


def scratch_of_one_launch(bug: bool) -> None:
    """A launch reads scratch memory that the launch before it filled, BUG: half of it."""
    x = torch.randn(64)
    with operation("chain"):
        scratch, out = torch.empty(64), torch.empty(64)
        kernel = planted_kernels.add_kernel
        run(kernel, (1 if bug else 2,), x, x, scratch, 64, BLOCK=32, BUG=False)
        run(kernel, (2,), scratch, x, out, 64, BLOCK=32, BUG=False)


def torch_writes(bug: bool) -> None:
    x = torch.zeros(8)
    with operation("scale"):
        (x if bug else x.clone()).mul_(2)


def torch_reads(bug: bool) -> None:
    """A PyTorch op reads what no launch has written; `fill_` writes it."""
    with operation("sum"):
        memory = torch.empty(8, 4)
        if not bug:
            memory[:, :3].fill_(1.0)
        assert memory[:, 1:3].sum() == 16


def reuse(bug: bool) -> None:
    """Memory that an op wrote and freed is unwritten where `torch.empty` hands it out again."""
    with operation("reuse"):
        torch.zeros(4096).add_(1)
        memory = torch.empty(4096) if bug else torch.zeros(4096)
        memory.sum()


def update_of_unwritten(bug: bool) -> None:
    x = torch.arange(32)
    with operation("sum"):
        out = torch.empty(1, dtype=torch.int64) if bug else torch.zeros(1, dtype=torch.int64)
        run(planted_kernels.sum_kernel, (1,), x, out, 32, BLOCK=32, BUG=False)


# Name → (case, its argument without the bug, with the bug, what the finding says).
CASES: dict[str, tuple[Callable[[Any], Any], Any, Any, str]] = {
    "tail mask": (add, False, True, r"add_kernel, program \(3, 0, 0\): x: load outside of it "),
    "K mask": (product, "", "k", r"product_kernel, program \(2, 1, 0\): a: load outside of it "),
    "overlapping tiles": (product, "", "tiles", r"out: store overwrites what program .* stores"),
    "unwritten tail": (
        lambda bug: add(False, blocks=3 if bug else 4),
        *(False, True),
        r"add: returns result 0 \(100,\) with 4 of 100 elements that nobody wrote",
    ),
    "reads its unwritten output": (product, "", "out", "out: load reads memory that nobody wrote"),
    "accumulation": (accumulation, False, True, r"out: load reads what program \(3, 0, 0\) stores"),
    "order": (order, False, True, "last_kernel: out: differs between two orders"),
    "relaxed": (arrival, "", "relaxed", r"partial: load reads what program \(1, 0, 0\) stores"),
    "arrival": (arrival, "", "barrier", r"partial: load reads what program \(1, 0, 0\) stores"),
    "halo": (halo, False, True, r"x: load outside of it \(element -1 of 20, 1 of 20 lanes\)"),
    "misaligned": (misaligned, False, True, r"x: load of 4 bytes is misaligned \(element 1 of 40"),
    "foreign read": (foreign_read, False, True, r"x: load reads what program \(2, 0, 0\) stores"),
    "foreign read of stored": (
        lambda bug: foreign_read(bug, twice=True),
        *(False, True, "what program .* stores"),
    ),
    "barrier": (barrier, False, True, "scratch: load reads .* no tl.debug_barrier"),
    "lanes": (lanes, False, True, "out: two lanes of one store write different values"),
    "holes": (holes, False, True, r"x: load between its elements \(element 1 of 63"),
    "input written": (input_written, False, True, "out: store writes an input of the op"),
    "scratch": (scratch_of_one_launch, False, True, "x: load reads memory that nobody wrote"),
    "torch writes": (torch_writes, False, True, "scale: aten.mul_.* writes an input of the op"),
    "torch reads": (torch_reads, False, True, r"sum.* reads memory .* 16 of 16 elements"),
    "reuse": (reuse, False, True, "sum.* reads memory that nobody wrote, 4096 of 4096"),
    "update": (update_of_unwritten, False, True, "out: update reads memory that nobody wrote"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_planted_bug_is_found(name: str) -> None:
    case, _, bug, message = CASES[name]
    with pytest.raises(Finding, match=message) as found:
        case(bug)
    assert len(str(found.value)) < 200


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("name", CASES)
def test_its_right_twin_is_silent(name: str, order: int) -> None:
    case, right, _, _ = CASES[name]
    with sanitized(order):
        case(right)


@pytest.mark.parametrize("order", range(4))
def test_races_are_found_in_every_order(order: int) -> None:
    with sanitized(order):
        for name in ("accumulation", "foreign read", "foreign read of stored", "overlapping tiles"):
            case, _, bug, _ = CASES[name]
            with pytest.raises(Finding, match=r"what (another )?program"):
                case(bug)


def test_orders_are_permutations() -> None:
    grid = (4, 3, 2)
    taken = [programs(grid, order) for order in range(4)]
    assert taken[0] == sorted(taken[0])
    assert taken[1] == taken[0][::-1]
    assert len({tuple(t) for t in taken}) == 4
    assert all(sorted(t) == taken[0] for t in taken)


def test_a_finding_leaves_nothing_behind() -> None:
    load, patch = tl.load, interpreter._patch_lang
    with pytest.raises(Finding):
        add(True)
    assert tl.load is load
    assert interpreter._patch_lang is patch
    add(False)


def test_launches_that_a_test_intercepts_are_checked_too() -> None:
    with launch.intercept(lambda one: one.run()), pytest.raises(Finding, match="outside of it"):
        add(True)


def test_device_assert_fires() -> None:
    x = torch.ones(1)
    run(planted_kernels.assert_kernel, (1,), x, 2.0)
    with pytest.raises(interpreter.InterpreterError, match=r"assert_kernel, .*too large"):
        run(planted_kernels.assert_kernel, (1,), x, 1.0)


# ------------------------------------------------------------------------------------- arithmetic


def test_bfloat16_arithmetic_is_that_of_pytorch() -> None:
    x, y = (torch.randn(256).bfloat16() for _ in range(2))
    want = x * y + x * 1.5 - y

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        out, flags = torch.zeros_like(x), torch.zeros(256, dtype=torch.int32)
        run(planted_kernels.arithmetic_kernel, (1,), x, y, out, flags, BLOCK=256)
        return out, flags

    out, flags = compute()
    assert torch.equal(out, want)
    assert torch.equal(flags, ((x > y) & (x < 0.5)).int())


def test_the_stock_interpreter_gets_bfloat16_wrong() -> None:
    """If this fails, Triton has been repaired and `arithmetic.py` has less to do."""
    a, b = operands(16, 16, 16, torch.bfloat16)
    assert torch.allclose(multiply(a, b), a.float() @ b.float(), atol=1e-5)
    with repaired(MemoryChecks):
        assert not torch.allclose(multiply(a, b), a.float() @ b.float(), atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32], ids=str)
def test_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    x = torch.randn(1024) * 10
    x[:5] = torch.tensor([1.00390625, 1.01171875, 3.3e38, 1e-39, -0.0])
    if dtype != torch.int32:
        x[5:8] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    else:
        x[2] = 0
    out = torch.zeros(1024, dtype=dtype)
    run(planted_kernels.cast_kernel, (1,), x, out, BLOCK=1024)
    assert torch.equal(out.nan_to_num(7), x.to(dtype).nan_to_num(7))
    back = torch.zeros(1024)
    run(planted_kernels.cast_kernel, (1,), out, back, BLOCK=1024)
    assert torch.equal(back.nan_to_num(7), out.float().nan_to_num(7))


def test_every_bfloat16_survives_widening_and_rounding() -> None:
    bits = np.arange(2**16).astype(np.uint16)
    values = widen(bits)
    numbers = ~np.isnan(values)
    assert np.array_equal(narrow(values)[numbers], bits[numbers])
    assert np.isnan(widen(narrow(values)[~numbers])).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_halves_add_in_float32(dtype: torch.dtype) -> None:
    a, b = torch.ones(16, 4096, dtype=dtype), torch.ones(4096, 16, dtype=dtype)
    a[:, 1:] = 2**-10  # vanishes beside 1 in either type
    assert torch.equal(multiply(a, b), a.float() @ b.float())


def test_tf32_rounds_the_operands_and_nothing_else() -> None:
    a, b = operands(16, 48, 16, torch.float32)
    rounded = [torch.from_numpy(round_to_tf32(v.numpy())).double() for v in (a, b)]
    exact = a.double() @ b.double()
    assert torch.allclose(multiply(a, b, "tf32").double(), rounded[0] @ rounded[1], atol=1e-5)
    assert torch.allclose(multiply(a, b, "ieee").double(), exact, atol=1e-5)
    assert torch.allclose(multiply(a, b, "tf32x3").double(), exact, atol=1e-5)
    assert not torch.allclose(multiply(a, b, "tf32").double(), exact, atol=1e-4)


def test_tf32_keeps_ten_bits_of_mantissa() -> None:
    ulp = 2.0**-10
    values = np.array([1 + ulp, 1 + ulp / 2, 1 + ulp / 2.1, -1 - ulp / 2, np.inf, np.nan])
    want = np.array([1 + ulp, 1 + ulp, 1, -1 - ulp, np.inf, np.nan])
    assert np.array_equal(round_to_tf32(values.astype(np.float32)), want, equal_nan=True)


def test_a_reduction_of_ones_own_is_right() -> None:
    x = torch.randint(0, 5, (8, 16)).float()
    value, where = torch.zeros(8), torch.zeros(8, dtype=torch.int32)
    run(planted_kernels.largest_kernel, (1,), x, value, where, ROWS=8, COLUMNS=16)
    assert torch.equal(value, x.amax(1))
    assert where.tolist() == [row.tolist().index(max(row.tolist())) for row in x]


# ------------------------------------------------------------------------------------- access log


def test_the_log_counts_bytes_per_argument() -> None:
    a, b = operands(40, 20, 24, torch.float32)
    with collecting() as log:
        multiply(a, b)
    (one,) = log
    assert (one.kernel, one.grid, one.op) == ("product_kernel", (3, 2, 1), None)
    assert (one.arguments["a"].read, one.arguments["a"].loaded) == (40 * 20 * 4, 2 * 40 * 20 * 4)
    assert (one.arguments["b"].read, one.arguments["b"].loaded) == (20 * 24 * 4, 3 * 20 * 24 * 4)
    assert (one.arguments["out"].read, one.arguments["out"].written) == (0, 40 * 24 * 4)
    assert (one.read, one.written) == ((40 + 24) * 20 * 4, 40 * 24 * 4)
    assert one.loaded == (2 * 40 + 3 * 24) * 20 * 4


def test_the_log_tells_scratch_memory_and_the_op() -> None:
    x = torch.randn(16)
    with collecting() as log, operation("turn"):
        scratch, out = torch.empty(16), torch.empty(16)
        args = (x, scratch, out)
        run(planted_kernels.turn_kernel, (1,), *args, scratch=("scratch",), BLOCK=16, BUG=False)
    (one,) = log
    assert one.op == "turn"
    assert {name: a.scratch for name, a in one.arguments.items()} == {
        "x": False,
        "scratch": True,
        "out": False,
    }
    assert one.arguments["scratch"].read == one.arguments["scratch"].written == 64


# ------------------------------------------------------------------------------------ around ops


def test_opcheck_and_compile_see_ops_as_ever() -> None:
    args = convert(
        "channel_statistics",
        arguments("channel_statistics", Sizes(1, 8, 5, 3, 2)),
        torch.float32,
        "contiguous",
    )
    op = torch.ops.ciema.channel_statistics.default
    torch.library.opcheck(op, tuple(args), {"backend": "triton"})

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return ops.channel_statistics(x, backend="triton")[0] * 2

    with collecting() as log:
        compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)(*args)
    assert [one.op for one in log] == ["channel_statistics"] * len(log) != []
    assert torch.allclose(compiled, doubled(*args))
