"""Triton kernels compiled without a GPU stay within their budgets, and the check can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fused.backends.triton import INTERPRETER

pytest.importorskip("triton")
if INTERPRETER:
    pytest.skip("the interpreter is on: nothing can be compiled", allow_module_level=True)

import triton
import triton.language as tl

from benchmarks import sass, triton_budgets, triton_capture, triton_code
from benchmarks.triton_code import Code
from benchmarks.triton_compile import TARGETS, Target, compile_launch, compiling_for
from benchmarks.triton_usage import (
    Failure,
    Job,
    Key,
    Row,
    Usage,
    label,
    measure,
    quick_jobs,
    rows,
)
from fused.backends.triton import configs
from fused.backends.triton.configs import Config
from fused.backends.triton.launch import Launch

# ------------------------------------------------------------------------------------- compiling


@triton.jit
def product_kernel(
    x, weight, out, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (O, P) = weight (O, C) · x (C, P), a tile of one program."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    for start in range(0, channels, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        left = tl.load(weight + o[:, None] * channels + c[None, :])
        right = tl.load(x + c[:, None] * pixels + p[None, :], mask=p[None, :] < pixels, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    at = out + o[:, None] * pixels + p[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=p[None, :] < pixels)


SMALL = Config({"BLOCK_P": 64, "BLOCK_O": 64, "BLOCK_K": 32}, num_warps=4, num_stages=2)


def product(dtype: torch.dtype, config: Config = SMALL, offset: int = 0) -> Launch:
    """A launch of the kernel above, `offset` elements into x."""
    x = torch.empty(64 * 3136 + offset, dtype=dtype)[offset:]
    weight, out = torch.empty(64, 64, dtype=dtype), torch.empty(64, 3136, dtype=dtype)
    return Launch(product_kernel, (49, 1), (x, weight, out, 3136, 64), {}, config)


def code_of(launch: Launch, target: Target) -> Code:
    with compiling_for(target):
        compiled = compile_launch(launch)
    (code,) = triton_code.inspect([compiled], target)
    return code


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_half_precision_compiles_to_tensor_cores_everywhere(target: Target) -> None:
    code = code_of(product(torch.float16), target)
    assert code.half_products == 1
    assert code.slow_products == 0
    assert code.tensor_instructions > 0
    assert code.spill_bytes == 0
    assert 0 < code.wide_loads <= code.loads
    assert 0 < code.occupancy <= 100
    assert 0 < code.shared_bytes <= target.shared_bytes
    assert code.threads == 4 * target.gpu.warp_size
    assert (code.products_per_issue > 0) == (target.name in "sm_80 sm_86 sm_89 sm_90 sm_120")


def test_exact_float32_products_are_not_on_tensor_cores() -> None:
    code = code_of(product(torch.float32), TARGETS["sm_90"])
    assert code.half_products == code.tensor_instructions == code.products_per_issue == 0


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_spills_are_seen(name: str) -> None:
    greedy = replace(SMALL, blocks=SMALL.blocks | {"BLOCK_P": 256, "BLOCK_O": 256}, num_warps=1)
    assert code_of(product(torch.float16, greedy), TARGETS[name]).spill_bytes > 0


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_a_limit_of_registers_holds_on_nvidia_and_is_left_out_on_amd(name: str) -> None:
    assert code_of(product(torch.float16), TARGETS[name]).registers > 48
    few = code_of(product(torch.float16, replace(SMALL, registers=48)), TARGETS[name]).registers
    assert (few <= 48) == (name == "sm_80")


def test_a_limit_of_registers_has_a_row_of_its_own() -> None:
    assert label(SMALL) == "P64 O64 K32 w4 s2"
    assert label(replace(SMALL, registers=48)) == "P64 O64 K32 w4 s2 r48"


def test_a_misaligned_map_loses_its_wide_loads() -> None:
    aligned = code_of(product(torch.float16), TARGETS["sm_80"])
    shifted = code_of(product(torch.float16, offset=1), TARGETS["sm_80"])
    assert shifted.wide_loads < aligned.wide_loads


def test_products_that_miss_the_tensor_cores_are_counted() -> None:
    with compiling_for(Target("sm_75", 64 * 1024, 40)):  # Triton has no products for Turing
        compiled = compile_launch(product(torch.float16))
    assert triton_code.products(compiled.asm["ttir"], compiled.asm["ttgir"]) == (1, 1)


def test_kernels_disassembled_together_are_those_disassembled_alone() -> None:
    target = TARGETS["sm_80"]
    with compiling_for(target):
        cubins = [compile_launch(product(d)).asm["cubin"] for d in (torch.float16, torch.float32)]
    together = sass.disassemble(cubins, target.name)
    for cubin, listing in zip(cubins, together, strict=True):
        (alone,) = sass.disassemble([cubin], target.name)
        assert [one.opcode for one in listing] == [one.opcode for one in alone]
        assert "EXIT" in [one.opcode for one in alone]


def test_the_mock_driver_is_taken_away_again() -> None:
    with compiling_for(TARGETS["sm_80"]):
        assert triton.runtime.driver.active.get_current_target().arch == 80
    assert triton.runtime.driver._active is None


@pytest.mark.parametrize(
    ("target", "warps", "waves", "shared_bytes", "expected"),
    [
        ("gfx942", 4, 8, 0, (100, "warps")),
        ("gfx942", 4, 4, 0, (50, "registers")),
        ("gfx942", 4, 8, 32768, (25, "shared memory")),
        ("gfx1100", 4, 12, 16384, (50, "shared memory")),
    ],
)
def test_occupancy_on_amd(
    target: str, warps: int, waves: int, shared_bytes: int, expected: tuple[int, str]
) -> None:
    assert triton_code.amd_occupancy(TARGETS[target], warps, waves, shared_bytes) == expected


def test_tensor_memory_limits_occupancy() -> None:
    free = triton_code.nvidia_occupancy(TARGETS["sm_100"], 128, 32, 0)
    assert free == (100, "warps, registers")
    held = triton_code.nvidia_occupancy(TARGETS["sm_100"], 128, 32, 0, 256)
    assert held == (12, "tensor memory")


# -------------------------------------------------------------------------------------- capturing


def test_launches_are_captured_on_every_target_without_a_gpu() -> None:
    call = triton_capture.Call("channel_statistics", training=False)
    for target in TARGETS.values():
        (launch,) = triton_capture.capture(call, torch.float16, target)
        x = launch.named_args()["x"]
        assert (x.device.type, x.dtype, tuple(x.shape)) == (
            *("cuda", torch.float16),
            (1, 1024, 56, 56),
        )


def test_every_op_is_called_in_every_mode() -> None:
    ops = ["cross_spatial_backward", "gated_fusion_mean"]
    assert [str(call) for call in triton_capture.calls(ops, ["contiguous"])] == [
        "cross_spatial_backward training sequential contiguous",
        "cross_spatial_backward training pooled contiguous",
        "cross_spatial_backward frozen contiguous",
        "gated_fusion_mean evaluation contiguous",
    ]


# -------------------------------------------------------------------------------------- comparing

CODE = Code(
    threads=128,
    registers=96,
    spill_bytes=0,
    shared_bytes=8192,
    occupancy=31,
    limiter="registers",
    tensor_instructions=16,
    slow_products=0,
    half_products=1,
    products_per_issue=200,
    loads=10,
    wide_loads=8,
)
KEY = Key("stage_kernel", "half", "contiguous", "P64 w4 s2", "sm_80")


def usage(key: Key = KEY, binary: str = "a", preferred: bool = False, **changes: Any) -> Usage:
    return Usage(key, binary, replace(CODE, **changes), "stage training float16", preferred)


def stored(*found: Row) -> dict:
    table = triton_budgets.budget_file.tomllib.loads(triton_budgets.as_toml(found))["triton"]
    assert table.pop("version") == triton.__version__
    return table


def test_what_was_written_is_met() -> None:
    found = rows([usage(), usage(replace(KEY, target="gfx942")), usage(replace(KEY, kernel="b"))])
    assert triton_budgets.past_budget(found, stored(*found)) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"registers": 97}, "registers 97 > 96"),
        ({"spill_bytes": 4}, "spill_bytes 4 > 0"),
        ({"shared_bytes": 8193}, "shared_bytes 8193 > 8192"),
        ({"occupancy": 25}, "occupancy 25 < 31"),
        ({"tensor_instructions": 15}, "tensor_instructions 15 < 16"),
        ({"products_per_issue": 199}, "products_per_issue 199 < 200"),
        ({"wide_loads": 0}, "wide_loads 0 < 8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_more_than_the_budget_is_told(change: dict, complaint: str) -> None:
    (told,) = triton_budgets.past_budget(rows([usage(**change)]), stored(*rows([usage()])))
    assert complaint in told


def test_a_kernel_without_budget_and_a_budget_without_kernel_are_told() -> None:
    other = replace(KEY, target="sm_90")
    first, second = triton_budgets.past_budget(rows([usage(other)]), stored(*rows([usage()])))
    assert "on sm_90 has no budget" in first
    assert "on sm_80 has a budget, but is not built any more" in second
    assert triton_budgets.past_budget([], stored(*rows([usage()])), whole=False) == []


def test_a_kernel_that_no_op_launches_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "TABLE", {("lost_kernel", "half"): (SMALL,)})
    (told,) = triton_budgets.unlaunched(rows([usage()]))
    assert told == "lost_kernel has configurations, but no op launches it"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"slow_products": 1}, "1 of 1 products of half precision are not on tensor cores"),
        ({"tensor_instructions": 0}, "no tensor instruction"),
        ({"shared_bytes": 200_000}, "200000 bytes of shared memory > 166912"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_no_budget_allows_a_fault(change: dict, complaint: str) -> None:
    (told,) = triton_budgets.faults([usage(**change)])
    assert complaint in told
    assert triton_budgets.faults([usage()]) == []


def test_spills_are_faults_on_nvidia_and_budgeted_on_amd() -> None:
    amd = usage(replace(KEY, target="gfx942"), spill_bytes=800)
    assert triton_budgets.faults([amd]) == []
    (told,) = triton_budgets.past_budget(
        rows([amd]), stored(*rows([usage(replace(KEY, target="gfx942"), spill_bytes=4)]))
    )
    assert "spill_bytes 800 > 4" in told


def test_what_does_not_compile_is_told() -> None:
    assert triton_budgets.faults([Failure("stage_kernel", "Error: no")]) == [
        "stage_kernel: Error: no"
    ]


def test_a_launcher_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> None:
        raise ValueError("wrong")

    monkeypatch.setattr(triton_capture, "KERNELS", {"channel_statistics": wrong})
    found = measure(Job("sm_80", "float16", ("channel_statistics",), ("contiguous",)))
    assert {type(one) for one in found} == {Failure}
    assert "ValueError: wrong" in triton_budgets.faults(found)[0]


def test_rows_hold_the_worst_of_their_kernels() -> None:
    found = rows([usage(), usage(binary="b", registers=128, occupancy=25, wide_loads=4)])
    ((key, code, binaries, _),) = [(r.key, r.code, r.binaries, r.preferred) for r in found]
    assert (key, binaries) == (KEY, 2)
    assert (code.registers, code.occupancy, code.wide_loads) == (128, 25, 4)


def test_layouts_that_compile_to_the_same_share_a_row() -> None:
    last = replace(KEY, layout="channels_last")
    (row,) = rows([usage(), usage(last, preferred=True)])
    assert (row.key.layout, row.preferred) == ("any", True)
    assert len(rows([usage(), usage(last, binary="b")])) == 2
    # The quick quarter compiles one layout and meets the budget of both.
    elsewhere = rows([usage(replace(KEY, target="sm_90"))])
    assert triton_budgets.past_budget(rows([usage()]), stored(row, *elsewhere), whole=False) == []
    # It may find the layouts the same where the whole told them apart.
    apart = stored(*rows([usage(), usage(last), usage(last, binary="b")]))
    assert set(apart["stage_kernel"]) == {KEY.row, last.row}
    assert triton_budgets.past_budget([row], apart, whole=False) == []
    assert triton_budgets.past_budget([row], {}, whole=False) == [f"{row.key} has no budget"]


def test_reports_name_what_a_user_gets() -> None:
    found = rows([usage(preferred=True), usage(replace(KEY, target="gfx942"), spill_bytes=4)])
    text = triton_budgets.as_text(found)
    assert "sm_80*" in text
    assert "gfx942 " in text
    markdown = triton_budgets.as_markdown(found, ["stage_kernel spills"])
    assert "**96 8K 31%r T16**" in markdown
    assert "96 8K 31%r T16 spills 4" in markdown
    assert "* stage_kernel spills" in markdown


# ------------------------------------------------------------------------------------ the kernels


def test_every_kernel_has_a_budget_on_every_architecture() -> None:
    _, table = triton_budgets.stored()
    assert set(table) == {kernel for kernel, _ in configs.TABLE}
    for kernel, by_row in table.items():
        assert {target for row in by_row.values() for target in row} == set(TARGETS), kernel


@pytest.mark.slow
def test_every_kernel_is_within_its_budget() -> None:
    found = triton_budgets.measure_all(quick_jobs())
    table = rows(found)
    assert triton_budgets.faults(found) + triton_budgets.unlaunched(table) == []
    version, budget = triton_budgets.stored()
    if version != triton.__version__:
        pytest.skip(f"no fault, but budgets are of triton {version}, this is {triton.__version__}")
    assert triton_budgets.past_budget(table, budget, whole=False) == []


@pytest.mark.parametrize("op", ["channel_interaction", "msff", "gated_fusion"])
def test_kernels_compile_with_64_bit_offsets(op: str) -> None:
    """No case of the paper's size needs them, and the interpreter would not see a type error."""
    target = TARGETS["sm_90"]
    launches = triton_capture.capture(triton_capture.Call(op, False), torch.float16, target)
    wide = [one for one in launches if "WIDE" in one.constexprs]
    assert wide
    for one in wide:
        with compiling_for(target):
            compile_launch(replace(one, constexprs={**one.constexprs, "WIDE": True}))
