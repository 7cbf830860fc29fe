"""The emulator's checkers: each planted bug is found, and its correct twin is silent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from emulator import ORDERS, Report, Session, build, missing_tool

if missing_tool() is not None:
    pytest.skip(f"the emulator can't be built: {missing_tool()}", allow_module_level=True)


@pytest.fixture(scope="module")
def planted() -> ModuleType:
    return build(Path(__file__).parent / "emulator" / "planted_kernels.cpp")


def run(
    module: ModuleType,
    entry: str,
    *,
    n: int = 64,
    x: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_role: str = "output",
    blocks: int = 1,
    order: str = "forward",
) -> Report:
    session = Session(module, order, seed=3)
    x = torch.arange(n, dtype=torch.float32) if x is None else x
    out = torch.zeros(n) if out is None else out
    address = getattr(session, out_role)("out", out)
    session.launch(entry, x=session.input("x", x), out=address, n=n, blocks=blocks)
    return session.finish()


def integers() -> dict[str, Any]:
    return {"x": torch.arange(64, dtype=torch.int32), "out": torch.zeros(1, dtype=torch.int32)}


def table_indexes() -> dict[str, Any]:
    return {**integers(), "out": torch.zeros(64, dtype=torch.int32)}


def two_blocks_into_one() -> dict[str, Any]:
    return {"n": 128, "blocks": 2, "out": torch.zeros(1), "out_role": "inout"}


def rows_with_a_gap() -> dict[str, Any]:
    return {"n": 20, "x": torch.randn(2, 21)[:, :20], "out": torch.zeros(40)}


def sixty_one() -> dict[str, Any]:
    return {"n": 61}  # not a multiple of the 64 threads


# name of the kernel, kind of finding that its bug must give, what makes the arguments of run()
PLANTED: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
    ("missing_barrier", "race", dict),
    ("missing_second_barrier", "race", dict),
    ("missing_syncwarp", "race", dict),
    ("blocks_add_plainly", "race", two_blocks_into_one),
    ("atomic_beside_plain", "race", integers),
    ("barrier_in_branches", "divergence", dict),
    ("exit_before_barrier", "divergence", sixty_one),
    ("shuffle_in_branch", "deadlock", dict),
    ("shuffle_from_absent_lane", "divergence", dict),
    ("mask_without_caller", "divergence", dict),
    ("read_past_end", "out-of-bounds", sixty_one),
    ("write_past_end", "out-of-bounds", sixty_one),
    ("null_pointer", "out-of-bounds", dict),
    ("misaligned_vector", "misaligned", lambda: {"n": 65, "out": torch.zeros(64)}),
    ("uninitialised_shared", "uninitialised", sixty_one),
    ("uninitialised_output", "uninitialised", sixty_one),
    ("unwritten_tail", "unwritten", sixty_one),
    ("written_input", "input-written", dict),
    ("shared_index", "out-of-bounds", dict),
    ("dynamic_shared_past_end", "out-of-bounds", dict),
    ("wrong_pitch", "out-of-bounds", rows_with_a_gap),
    ("foreign_local_memory", "out-of-bounds", dict),
    ("constant_table", "out-of-bounds", table_indexes),
    ("bytes_in_shared", "unsupported", dict),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("kernel", "kind", "arguments"), PLANTED, ids=[p[0] for p in PLANTED])
def test_planted_bug_is_found_and_twin_is_silent(
    planted: ModuleType, kernel: str, kind: str, arguments: Callable[[], dict], order: str
) -> None:
    bug = run(planted, f"{kernel}_bug", order=order, **arguments())
    assert kind in bug.kinds, bug.findings
    assert run(planted, f"{kernel}_correct", order=order, **arguments()).findings == []


def test_findings_name_the_line_and_the_place(planted: ModuleType) -> None:
    source = (Path(__file__).parent / "emulator" / "planted_kernels.cpp").read_text().splitlines()
    report = run(planted, "read_past_end_bug", n=61)
    line = next(i for i, text in enumerate(source, 1) if "x[i + 1] : 0.0f" in text)
    (finding,) = report.findings
    assert "read of 4 bytes at byte 244 of x, which has 244 bytes" in finding
    assert f"planted_kernels.cpp:{line} (thread 60 of block 0, kernel read_past_end)" in finding


def test_wrong_results_are_not_needed_to_find_a_race(planted: ModuleType) -> None:
    out = torch.zeros(1)
    report = run(planted, "blocks_add_plainly_bug", n=128, blocks=2, out=out, out_role="inout")
    assert out.item() == sum(range(128))  # right by luck of the order, on this machine
    assert "race" in report.kinds


def test_outputs_start_poisoned_and_come_back(planted: ModuleType) -> None:
    out = torch.zeros(61)
    run(planted, "unwritten_tail_bug", n=61, out=out)
    assert torch.equal(out[:60], torch.arange(60.0))
    assert out[60].isnan()


@pytest.mark.parametrize("order", ORDERS)
def test_scratch_may_stay_unwritten_but_not_be_read_so(planted: ModuleType, order: str) -> None:
    scratch = torch.zeros(61)
    report = run(planted, "unwritten_tail_bug", n=61, out=scratch, out_role="scratch", order=order)
    assert report.findings == []
    assert torch.equal(scratch[:60], torch.arange(60.0))
    assert scratch[60].isnan()
    report = run(planted, "uninitialised_output_bug", out_role="scratch", order=order)
    assert report.kinds == {"uninitialised"}


def test_strided_output_leaves_its_gaps_alone(planted: ModuleType) -> None:
    storage = torch.full((64, 2), 7.0)
    session = Session(planted)
    session.output("out", storage[:, 0])
    session.finish()
    assert storage[:, 0].isnan().all()
    assert (storage[:, 1] == 7.0).all()


def test_coalescing_and_vector_width(planted: ModuleType) -> None:
    x = torch.randn(512)
    good = run(planted, "strided_loads_correct", x=x).totals
    bad = run(planted, "strided_loads_bug", x=x).totals
    assert good["global_read_units"] == good["global_read_ideal_units"] == 64 * 4 // 32
    assert bad["global_read_units"] == 64  # one sector for every lane
    assert good["global_read_bytes"] == bad["global_read_bytes"] == 64 * 4
    scalar = run(planted, "vector_loads_bug", x=x, out=torch.zeros(256)).totals
    vector = run(planted, "vector_loads_correct", x=x, out=torch.zeros(256)).totals
    assert scalar["global_read_requests"] == 4 * vector["global_read_requests"] == 8
    assert scalar["global_read_bytes"] == vector["global_read_bytes"] == 256 * 4


def test_bank_conflicts(planted: ModuleType) -> None:
    bad = run(planted, "bank_conflicts_bug", out=torch.zeros(32)).totals
    good = run(planted, "bank_conflicts_correct", out=torch.zeros(32)).totals
    assert good["shared_read_units"] == good["shared_read_ideal_units"] == 32
    assert bad["shared_read_units"] == 32 * 32


@pytest.mark.parametrize("width", [32, 16, 8])
def test_warp_operations_follow_cuda(planted: ModuleType, width: int) -> None:
    x = torch.arange(32, dtype=torch.int32) * 2 + 1
    out = torch.zeros(7, 32, dtype=torch.int32)
    session = Session(planted, "shuffled", seed=1)
    arguments = {"x": session.input("x", x), "out": session.output("out", out)}
    session.launch("warp_operations", **arguments, width=width)
    assert session.finish().findings == []
    lane = np.arange(32)
    first = lane // width * width
    sources = [
        first + 5 % width,
        np.where(lane - 3 >= first, lane - 3, lane),
        np.where(lane + 3 < first + width, lane + 3, lane),
        np.where((lane ^ 6) < first + width, lane ^ 6, lane),
    ]
    for row, source in enumerate(sources):
        assert torch.equal(out[row], x[torch.from_numpy(source)]), row
    votes = sum(1 << i for i in range(32) if (2 * i + 1) % 3 == 0)
    assert set((out[4].to(torch.int64) & 0xFFFFFFFF).tolist()) == {votes}
    assert set(out[5].tolist()) == {1}
    assert set(out[6].tolist()) == {0}


def test_functions_are_those_of_the_host(planted: ModuleType) -> None:
    x = torch.linspace(-3, 3, 32)
    out = torch.zeros(10, 32)
    session = Session(planted)
    session.launch("functions", x=session.input("x", x), out=session.output("out", out))
    assert session.finish().findings == []
    exact = x.double()
    expected = [exact.exp(), exact.exp2(), exact.tanh(), exact.abs().sqrt(), exact.abs().rsqrt()]
    expected += [exact**2 + 1, exact.clamp(max=0.5), exact.clamp(min=0.5), -exact]
    expected.append(torch.arange(32.0).clamp(3, 9).double())
    torch.testing.assert_close(out.double(), torch.stack(expected), rtol=3e-7, atol=0)


def test_orders_differ_and_partial_warps_work(planted: ModuleType) -> None:
    seen = {}
    for order in ORDERS:
        out = torch.zeros(40, dtype=torch.int32)
        session = Session(planted, order, seed=5)
        session.launch("tickets", out=session.output("out", out), threads=40)
        assert session.finish().findings == []
        seen[order] = tuple(out.tolist())
    assert seen["forward"] == tuple(range(40))
    assert seen["reverse"] == tuple(reversed(range(40)))
    assert seen["interleaved"][:3] == (0, 2, 4)
    assert seen["interleaved"][32] == 1
    assert len(set(seen.values())) == 4


def test_conversions_are_those_of_the_gpu(planted: ModuleType) -> None:
    every_half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = torch.cat([every_half.view(torch.float16), every_half.view(torch.bfloat16)]).float()
    next_up = torch.nextafter(exact, torch.tensor(float("inf")))
    halfway = (every_half.view(torch.float16)[:-1].float() + exact[1 : 2**16]) / 2
    x = torch.cat([exact, next_up, halfway, torch.tensor([65519.99, 65520.0, -3.4e38, 1e-45])])
    results = {
        "half": torch.zeros(len(x), dtype=torch.float16),
        "bfloat16": torch.zeros(len(x), dtype=torch.bfloat16),
        "from_half": torch.zeros(len(x)),
        "from_bfloat16": torch.zeros(len(x)),
    }
    session = Session(planted)
    addresses = {name: session.inout(name, tensor) for name, tensor in results.items()}
    session.launch("convert", x=session.input("x", x), n=len(x), **addresses)
    session.finish()
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
        torch.testing.assert_close(results[name], x.to(dtype), rtol=0, atol=0, equal_nan=True)
        expected = x.to(dtype).float()
        torch.testing.assert_close(
            results[f"from_{name}"], expected, rtol=0, atol=0, equal_nan=True
        )


def test_bad_calls_name_the_argument(planted: ModuleType) -> None:
    with pytest.raises(ValueError, match="thread order named sideways"):
        Session(planted, "sideways")
    session = Session(planted)
    with pytest.raises(ValueError, match="no entry named nothing"):
        session.launch("nothing")
    with pytest.raises(ValueError, match="argument named threads"):
        session.launch("tickets")
    with pytest.raises(ValueError, match="block of 1025 threads"):
        session.launch("tickets", threads=1025)
    with pytest.raises(ValueError, match=r"empty has shape \(0,\)"):
        session.input("empty", torch.zeros(0))


def test_a_session_after_an_abandoned_launch_is_clean(planted: ModuleType) -> None:
    assert run(planted, "null_pointer_bug").findings != []
    assert run(planted, "null_pointer_correct").findings == []
