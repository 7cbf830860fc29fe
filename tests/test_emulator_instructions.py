"""Tensor-core instructions under the emulator: layouts, products, asynchronous copies."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulator import ORDERS, Report, Session, build, missing_tool

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)

KERNELS = Path(__file__).parent / "emulator" / "instruction_kernels.cpp"
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
# ‖out − exact‖ / ‖exact‖: products of 16-bit values are exact, float32 is split in two terms.
PRODUCT_ERROR = {"float16": 5e-7, "bfloat16": 5e-7, "float32": 2e-7, "tf32": 1e-3}
CHAINED_ERROR = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 3e-7, "tf32": 1e-3}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return build(KERNELS)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


# ---- layouts ------------------------------------------------------------------------------------


def stride_layout(shape: Sequence[Sequence[int]], stride: Sequence[Sequence[int]]) -> torch.Tensor:
    """A CuTe layout ``((t…), (v…)) : ((dt…), (dv…))`` as an array of offsets (thread, value)."""

    def offsets(sizes: Sequence[int], steps: Sequence[int]) -> list[int]:
        columns = [[i * step for i in range(size)] for size, step in zip(sizes, steps, strict=True)]
        return [sum(parts) for parts in product(*reversed(columns))]  # the first index runs fastest

    threads, values = (offsets(*mode) for mode in zip(shape, stride, strict=True))
    return torch.tensor(threads)[:, None] + torch.tensor(values)


# CUTLASS, include/cute/atom/mma_traits_sm80.hpp: offsets m + 16 k of A, n + 8 k of B, m + 16 n of D
LAYOUT_D = stride_layout(((4, 8), (2, 2)), ((32, 1), (16, 8)))
LAYOUTS_16 = (
    stride_layout(((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))),
    stride_layout(((4, 8), (2, 2)), ((16, 1), (8, 64))),
)
LAYOUTS_TF32 = (
    stride_layout(((4, 8), (2, 2)), ((16, 1), (8, 64))),
    stride_layout(((4, 8), (2,)), ((8, 1), (32,))),
)


@pytest.mark.parametrize("memory", ["last", "first"])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "tf32"])
def test_registers_follow_the_published_layouts(
    kernels: ModuleType, name: str, memory: str
) -> None:
    dtype = DTYPES[name]
    depth = 16 if dtype.itemsize == 2 else 8
    # Every value is its own offset, so that registers can be compared with layouts; up to 256
    # exact in all dtypes.
    a = torch.arange(16 * depth).view(depth, 16).T.to(dtype)
    b = torch.cat([torch.arange(8 * depth).view(depth, 8).T] * 2).to(dtype)
    order = (lambda x: x.T.contiguous()) if memory == "first" else (lambda x: x.contiguous())
    a_out = torch.zeros(32, 4, dtype=torch.int32)
    b_out = torch.zeros(2, 32, 2, dtype=torch.int32)
    d_out = torch.zeros(32, 4)
    session = Session(kernels, "shuffled", seed=2)
    session.launch(
        f"registers_{name}_{memory}",
        a=session.input("a", order(a)),
        b=session.input("b", order(b)),
        a_out=session.output("a_out", a_out),
        b_out=session.output("b_out", b_out),
        d_out=session.output("d_out", d_out),
    )
    assert session.finish().findings == []
    layout_a, layout_b = LAYOUTS_16 if depth == 16 else LAYOUTS_TF32
    assert torch.equal(a_out.view(dtype).long(), layout_a)
    for tile in b_out:
        assert torch.equal(tile.view(dtype).long(), layout_b)
    exact = a.double() @ b[:8].double().T
    assert torch.equal(d_out, exact.T.flatten()[LAYOUT_D].float())


# ---- products -----------------------------------------------------------------------------------


def multiply(
    module: ModuleType,
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    c: float = 0.0,
    loads: tuple[str, str] = ("kDepthLast", "kDepthLast"),
    order: str = "forward",
) -> tuple[torch.Tensor, Report]:
    """c + a bᵀ of (16, depth) tensors by the kernel."""
    out = torch.zeros(16, 16)
    session = Session(module, order, seed=4)
    session.launch(
        f"product_{name}_{loads[0]}_{loads[1]}",
        a=session.input("a", a.T.contiguous() if loads[0] == "kDepthFirst" else a),
        b=session.input("b", b.T.contiguous() if loads[1] == "kDepthFirst" else b),
        c=session.input("c", torch.full((16, 16), c)),
        out=session.output("out", out),
        depth=a.shape[1],
    )
    report = session.finish()
    assert report.findings == []
    return out, report


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "loads",
    [
        ("kDepthLast", "kDepthLast"),
        ("kRowAddresses", "kDepthLast"),
        ("kDepthLast", "kDepthFirst"),
        ("kDepthFirst", "kDepthLast"),
        ("kDepthFirst", "kDepthFirst"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("name", DTYPES)
def test_product(kernels: ModuleType, name: str, loads: tuple[str, str], order: str) -> None:
    a, b = (random(16, 64, seed=seed).to(DTYPES[name]) for seed in (1, 2))
    out, report = multiply(kernels, name, a, b, loads=loads, order=order)
    assert error(out, a.double() @ b.double().T) < PRODUCT_ERROR[name]
    totals = report.totals
    assert totals["shared_read_units"] == totals["shared_read_ideal_units"]
    products = {key: n for key, n in totals.items() if key.startswith("mma_")}
    tiles = 2 * 64 // (16 if a.itemsize == 2 else 8)
    if name == "float32":
        assert products == {"mma_tf32": 3 * tiles}
    else:
        assert products == {f"mma_{name}": tiles}


def test_split_float32_stays_accurate_over_a_long_depth(kernels: ModuleType) -> None:
    a, b = (random(16, 512, seed=seed).abs() for seed in (1, 2))
    exact = a.double() @ b.double().T
    assert error(multiply(kernels, "float32", a, b)[0], exact) < 2e-7
    # Positive terms pile up what the tensor cores cut off: without the split's rounded sums, too.
    assert error(multiply(kernels, "float16", a.half(), b.half())[0], exact) > 1e-6


# c, a term, how many of them, and what the A100 makes of their sum
SUMS = [
    (1.0, 1.5 * 2**-24, 1, 1.0),  # rounding would give 1 + 2^-23
    (-1.0, -1.5 * 2**-24, 1, -1.0),
    (1.0, 2**-24, 2, 1 + 2**-23),  # one bit below the last is kept
    (1.0, 2**-25, 4, 1.0),  # none below that
    (0.0, 1.5 * 2**-24, 1, 1.5 * 2**-24),
    (-1.0, 1.0, 1, 0.0),
    (2.0**127, 2**-20, 4, 2.0**127),
]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "tf32"])
@pytest.mark.parametrize(("c", "term", "count", "expected"), SUMS)
def test_sums_are_cut_off(
    kernels: ModuleType, name: str, c: float, term: float, count: int, expected: float
) -> None:
    a, b = torch.zeros(2, 16, 16, dtype=DTYPES[name])
    # The A100 adds the halves of an instruction's depth one after the other: use the first.
    a[:, :count], b[:, :count] = 2.0**-10, term * 2**10
    assert (multiply(kernels, name, a, b, c)[0] == expected).all()


@pytest.mark.parametrize("name", DTYPES)
def test_infinities_and_nans_pass(kernels: ModuleType, name: str) -> None:
    a, b = torch.ones(2, 16, 16, dtype=DTYPES[name])
    a[0, 3], a[1, 4], b[5, 3] = torch.inf, torch.nan, -1.0
    out = multiply(kernels, name, a, b)[0]
    assert (out[0, torch.arange(16) != 5] == torch.inf).all()
    assert out[0, 5] == -torch.inf
    assert out[1].isnan().all()
    assert out[2:].isfinite().all()


@pytest.mark.parametrize("name", DTYPES)
def test_chained_product(kernels: ModuleType, name: str) -> None:
    a, b, c = (random(16, 16, seed=seed).to(DTYPES[name]) for seed in (1, 2, 3))
    out = torch.zeros(16, 16)
    session = Session(kernels, "shuffled", seed=4)
    session.launch(
        f"chained_{name}",
        a=session.input("a", a),
        b=session.input("b", b),
        c=session.input("c", c),
        out=session.output("out", out),
    )
    report = session.finish()
    assert report.findings == []
    totals = report.totals
    assert totals["shared_read_units"] == totals["shared_read_ideal_units"]
    exact = a.double() @ b.double().T @ c.double().T
    assert error(out, exact) < CHAINED_ERROR[name]


# ---- planted bugs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> ModuleType:
    return build(Path(__file__).parent / "emulator" / "planted_instructions.cpp")


def run(
    module: ModuleType, entry: str, order: str, n: int = 64, x: int = 256, out: int = 64
) -> Report:
    session = Session(module, order, seed=3)
    session.launch(
        entry,
        x=session.input("x", torch.arange(float(x))),
        out=session.output("out", torch.zeros(out)),
        n=n,
        threads=64 if out > 32 else 32,
    )
    return session.finish()


# name of the kernel, kind of finding that its bug must give, arguments of run()
PLANTED: list[tuple[str, str, dict[str, int]]] = [
    ("copy_not_waited_for", "unwaited", {}),
    ("copy_not_committed", "unwaited", {}),
    ("copy_under_way_at_the_end", "unwaited", {}),
    ("waits_for_too_few_groups", "unwaited", {}),
    ("no_barrier_after_wait", "race", {}),
    ("refilled_too_early", "race", {}),
    ("overwritten_under_way", "unwaited", {}),
    ("copy_past_end", "out-of-bounds", {"n": 252, "x": 252}),
    ("copy_from_misaligned", "misaligned", {"x": 260}),
    ("copy_to_global", "wrong-space", {"out": 256}),
    ("misaligned_row", "misaligned", {}),
    ("matrix_in_global_memory", "wrong-space", {}),
    ("matrix_without_barrier", "race", {}),
    ("matrix_not_filled", "uninitialised", {}),
    ("product_in_branch", "divergence", {"n": 40}),
    ("products_in_branches", "divergence", {"n": 16}),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("kernel", "kind", "arguments"), PLANTED, ids=[p[0] for p in PLANTED])
def test_planted_bug_is_found_and_twin_is_silent(
    planted: ModuleType, kernel: str, kind: str, arguments: dict[str, int], order: str
) -> None:
    bug = run(planted, f"{kernel}_bug", order, **arguments)
    assert kind in bug.kinds, bug.findings
    assert run(planted, f"{kernel}_correct", order, **arguments).findings == []


@pytest.mark.parametrize("order", ORDERS)
def test_a_product_needs_a_whole_warp(planted: ModuleType, order: str) -> None:
    session = Session(planted, order)
    session.launch(
        "product_in_branch_correct",
        x=session.input("x", torch.zeros(24)),
        out=session.output("out", torch.zeros(24)),
        n=0,
        threads=24,
    )
    assert session.finish().kinds == {"divergence"}


def last_block(
    module: ModuleType, kind: str, order: str, launches: int = 1
) -> tuple[torch.Tensor, torch.Tensor, Report]:
    blocks = 5
    out, counter = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    session = Session(module, order, seed=3)
    session.launch(
        f"last_block_{kind}",
        x=session.input("x", torch.arange(64.0 * blocks)),
        out=session.output("out", out),
        partial=session.scratch("partial", torch.zeros(blocks + 1)),
        counter=session.inout("counter", counter),
        blocks=blocks,
        launches=launches,
    )
    return out, counter, session.finish()


@pytest.mark.parametrize("order", ORDERS)
def test_the_last_block_may_read_what_was_written_before_arriving(
    planted: ModuleType, order: str
) -> None:
    out, counter, report = last_block(planted, "correct", order, launches=2)
    assert report.findings == []
    assert out.item() == sum(range(5 * 64))
    assert counter.item() == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("bug", "kind"),
    [
        ("nobody_waits", "race"),
        ("before_writing", "race"),
        ("plain_counter", "race"),
        ("too_many", "arrival"),
        ("by_one_warp", "divergence"),
    ],
)
def test_wrong_arrivals_are_found(planted: ModuleType, bug: str, kind: str, order: str) -> None:
    report = last_block(planted, bug, order)[2]
    assert kind in report.kinds, report.findings


def test_findings_name_the_line_of_the_kernel(planted: ModuleType) -> None:
    (finding,) = run(planted, "misaligned_row_bug", "forward").findings
    source = (Path(__file__).parent / "emulator" / "planted_instructions.cpp").read_text()
    lines = source[: source.index("matrix_in_global_memory")].splitlines()
    line = max(i for i, text in enumerate(lines, 1) if "::load_a(a, tile, kPitch)" in text)
    assert f"is not aligned, at planted_instructions.cpp:{line} (thread " in finding


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_120"])
@pytest.mark.parametrize("source", ["instruction_kernels", "planted_instructions"])
def test_nvcc_compiles_the_same_kernels(source: str, architecture: str, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++20", "-O3", f"-arch={architecture}", "-x", "cu", "-cubin"]
    command += ["-Werror", "all-warnings", "-Xptxas", "-v", "-o", str(tmp_path / "kernels.cubin")]
    command.append(str(KERNELS.with_stem(source)))
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spills = {int(n) for n in re.findall(r"(\d+) bytes spill", result.stderr)}
    assert spills == {0}
