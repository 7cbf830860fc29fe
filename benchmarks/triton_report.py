"""The compiled Triton kernels for a person to read: a table for the terminal, and Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import triton

from benchmarks.triton_compile import TARGETS
from benchmarks.triton_usage import Row

_LIMITERS = {
    "registers": "r",
    "shared memory": "s",
    "warps": "w",
    "blocks": "b",
    "tensor memory": "t",
}


def as_text(found: Sequence[Row]) -> str:
    """One line a row; a star marks the configuration that a user of that architecture gets."""
    heads = ("kernel", "row", "target", "threads", "regs", "spill", "shared", "occupancy")
    lines = [(*heads, "limited by", "tensor", "per issue", "wide loads", "kinds")]
    for row in found:
        code = row.code
        lines.append(
            (
                *(row.key.kernel, row.key.row, row.key.target + ("*" if row.preferred else "")),
                *(str(code.threads), str(code.registers), str(code.spill_bytes)),
                *(str(code.shared_bytes), f"{code.occupancy} %", code.limiter),
                *(str(code.tensor_instructions), str(code.products_per_issue)),
                *(f"{code.wide_loads}/{code.loads}", str(row.binaries)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_markdown(found: Sequence[Row], complaints: Sequence[str]) -> str:
    """A table a kernel: configurations down, architectures across."""
    kernels: dict[str, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in found:
        kernels[row.key.kernel][row.key.row][row.key.target] = row
    binaries = sum(row.binaries for row in found)
    lines = [
        "# What the Triton kernels use of a GPU",
        "",
        f"Compiled ahead of time by triton {triton.__version__} at the paper's size, batch 1, by"
        " `python benchmarks/triton_budgets.py --all --report FILE`; **nothing here was measured on"
        f" a GPU**. {len(kernels)} kernels, {binaries} compiled forms.",
        "",
        "A cell is registers of a thread, shared memory of a block in KiB, and the percentage of a"
        " multiprocessor's warps that run at once, with what admits no more: `r` registers, `s`"
        " shared memory, `w` warps, `b` blocks, `t` tensor memory. `T` counts tensor-core"
        " instructions, `spills` the bytes of a thread's registers in memory. Bold is the"
        " configuration that a user of that architecture gets. Several modes that compile"
        " differently share a row, which holds the worst of them.",
        "",
        *_faults(complaints),
        *_summary(found),
    ]
    for kernel, by_row in kernels.items():
        lines += ["", f"## {kernel}", "", "| | " + " | ".join(TARGETS) + " |"]
        lines.append("|---" * (1 + len(TARGETS)) + "|")
        for name, by_target in by_row.items():
            cells = [_cell(by_target.get(target)) for target in TARGETS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _faults(complaints: Sequence[str]) -> list[str]:
    if not complaints:
        return ["Every product of half precision is on tensor cores. A cell tells what it spills."]
    return ["What should not be:", "", *(f"* {told}" for told in complaints)]


def _summary(found: Sequence[Row]) -> list[str]:
    """Rows, spills, and occupancy of what a user gets, by architecture."""
    lines = [
        "",
        "| architecture | rows | spilling | occupancy, least and median |",
        "|---|---|---|---|",
    ]
    for target in TARGETS:
        mine = [row for row in found if row.key.target == target]
        if not mine:
            continue
        spilling = sum(row.code.spill_bytes > 0 for row in mine)
        levels = sorted(row.code.occupancy for row in mine if row.preferred) or [0]
        middle = levels[len(levels) // 2]
        lines.append(f"| {target} | {len(mine)} | {spilling} | {levels[0]} %, {middle} % |")
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    code = row.code
    limits = "".join(_LIMITERS[name] for name in code.limiter.split(", "))
    text = f"{code.registers} {code.shared_bytes / 1024:.0f}K {code.occupancy}%{limits}"
    if code.tensor_instructions:
        text += f" T{code.tensor_instructions}"
    if code.spill_bytes:
        text += f" spills {code.spill_bytes}"
    return f"**{text}**" if row.preferred else text
