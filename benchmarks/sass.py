"""What NVIDIA machine code does, read from its disassembly: loops, tensor instructions, loads."""

from __future__ import annotations

import bisect
import importlib.util
import itertools
import math
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# The disassembler's names; "a": with what only that architecture has.
_MACHINES = {
    **{f"sm_{number}": f"SM{number}" for number in (80, 86, 89)},
    **{f"sm_{number}": f"SM{number}a" for number in (90, 100, 120)},
}
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.M)


class Instruction(NamedTuple):
    """One instruction: address, name with modifiers, where it branches to, whether always."""

    address: int
    opcode: str
    branch: int | None = None
    always: bool = False


def disassemble(cubins: Sequence[bytes], target: str) -> list[list[Instruction]]:
    """The instructions of each cubin, built for `target` as "sm_80"."""
    return disassemble_code([b"".join(text_sections(cubin).values()) for cubin in cubins], target)


def disassemble_code(code: Sequence[bytes], target: str) -> list[list[Instruction]]:
    """The instructions of each piece of machine code; all at once, the tool is slow to start."""
    if not code:
        return []
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "code.bin"
        image.write_bytes(b"".join(code))
        listing = run("nvdisasm", "--binary", _MACHINES[target], "-ndf", str(image))
    return parse(listing, list(itertools.accumulate(map(len, code))))


def parse(listing: str, ends: Sequence[int]) -> list[list[Instruction]]:
    """The instructions of a listing, cut where pieces of code end, in bytes."""
    found: list[list[Instruction]] = [[] for _ in ends]
    for place, predicate, opcode, operands in _INSTRUCTION.findall(listing):
        address = int(place, 16)
        goal = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        always = not predicate and re.search(r"\bU?P\w", operands) is None
        one = Instruction(address, opcode, int(goal[1], 16) if goal else None, always)
        found[bisect.bisect_right(ends, address)].append(one)
    return found


def products_per_issue(code: Sequence[Instruction]) -> int:
    """Multiply-adds on tensor cores by instruction of a warp, in the loop that has most of them.

    Of loops in loops the inner one counts; a kernel whose products are in no loop counts as one. Of
    a turn's ways through the loop the one with most multiply-adds counts, of these the one with
    most loads of 16 bytes a thread (aligned maps), of these the shortest.
    """
    loops = [
        [other for other in code if one.branch <= other.address <= one.address]
        for one in code
        if one.branch is not None and one.branch < one.address
    ]
    loops = [loop for loop in loops if _multiply_adds(loop) > 0] or [list(code)]
    inner = [
        loop
        for loop in loops
        if not any(len(other) < len(loop) and other[0] in loop for other in loops)
    ]
    hottest = max(inner, key=_multiply_adds)
    products, _, length = _best_way(hottest)
    return round(products / max(length, 1))


def _best_way(loop: Sequence[Instruction]) -> tuple[int, int, int]:
    """Multiply-adds, wide loads and length of the best way from a loop's first to last instruction.

    Branches back and out are not followed: inner loops are gone through once.
    """
    never = (-1, 0, 0)
    index = {one.address: i for i, one in enumerate(loop)}
    best = [never] * len(loop)
    best[0] = (0, 0, 0)
    for i, one in enumerate(loop):
        if best[i] == never:
            continue
        products, loads, shorter = best[i]
        after = (products + _multiply_adds([one]), loads + _is_wide_load(one.opcode), shorter - 1)
        if i == len(loop) - 1:
            return after[0], after[1], -after[2]
        goals = [] if one.branch is None else [index.get(one.branch, 0)]
        if not (one.always and (one.branch is not None or one.opcode in ("EXIT", "RET"))):
            goals.append(i + 1)
        for goal in goals:
            if goal > i:
                best[goal] = max(best[goal], after)
    return _multiply_adds(loop), 0, len(loop)  # its end is reached by branches back alone


def _is_wide_load(opcode: str) -> bool:
    """Whether it loads 16 bytes a thread, or a tile, from global memory."""
    wide = ".128" in opcode or ".256" in opcode or opcode.startswith("UTMALDG")
    return wide and _is_load(opcode)


def _is_load(opcode: str) -> bool:
    return re.match(r"LDG\b|LDGSTS\b|UTMALDG\b", opcode) is not None


def _multiply_adds(code: Sequence[Instruction]) -> int:
    """Multiply-adds of a warp's tensor-core instructions, from the sizes in their names."""
    total = 0
    for one in code:
        if one.opcode.startswith("HMMA.16816"):
            total += 16 * 8 * 16
        elif one.opcode.startswith("HMMA.1688"):
            total += 16 * 8 * 8
        elif (size := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", one.opcode)) is not None:
            rows, columns, depth = map(int, size.groups())
            total += rows * columns * depth // 4  # four warps share it
    return total


def text_sections(cubin: bytes) -> dict[str, bytes]:
    """The machine code of each kernel in an ELF file of 64 bits, by its mangled name."""
    return _sections(cubin, ".text.")


def block_threads(cubin: bytes) -> dict[str, int]:
    """The most threads of a block of each kernel, as its launch bounds say, by its mangled name."""
    attribute = b"\x04\x05\x0c\x00"  # EIATTR_MAX_THREADS, 12 bytes: x, y, z
    found = {}
    for name, info in _sections(cubin, ".nv.info.").items():
        at = info.find(attribute)
        if at >= 0:
            found[name] = math.prod(struct.unpack_from("<III", info, at + len(attribute)))
    return found


def _sections(cubin: bytes, prefix: str) -> dict[str, bytes]:
    """Sections whose names begin so, by the rest of their names."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = headers[names_index][4]
    sections = {}
    for name, _, _, _, offset, length in headers:
        end = cubin.index(b"\0", names + name)
        title = cubin[names + name : end].decode()
        if title.startswith(prefix):
            sections[title.removeprefix(prefix)] = cubin[offset : offset + length]
    return sections


def counts(code: Sequence[Instruction]) -> dict[str, int]:
    """Of a kernel: tensor instructions, products an issue, loads of global memory, wide ones."""
    opcodes = [one.opcode for one in code]
    return {
        # HFMA2.MMA is a move in disguise, no product.
        "tensor_instructions": sum(bool(re.match(r"(HMMA|HGMMA|UTC\w*MMA)\b", o)) for o in opcodes),
        "products_per_issue": products_per_issue(code),
        "loads": sum(map(_is_load, opcodes)),
        "wide_loads": sum(map(_is_wide_load, opcodes)),
    }


def run(tool: str, *arguments: str) -> str:
    """The output of one of the disassembler's tools."""
    command = [str(tool_path(tool)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def tool_path(name: str) -> Path:
    """Where a tool is: Triton brings it along, and so does a CUDA toolkit.

    Raises:
        FileNotFoundError: neither is installed.
    """
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        brought = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        if brought.exists():
            return brought
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not there: it comes with Triton or a CUDA toolkit")
    return Path(found)
