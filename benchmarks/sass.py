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
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.M
)


class Instruction(NamedTuple):
    """One instruction: its address, its name with modifiers, and where it branches to."""

    address: int
    opcode: str
    branch: int | None = None


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
    found: list[list[Instruction]] = [[] for _ in code]
    ends = list(itertools.accumulate(map(len, code)))
    for place, opcode, operands in _INSTRUCTION.findall(listing):
        address = int(place, 16)
        goal = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        one = Instruction(address, opcode, int(goal[1], 16) if goal else None)
        found[bisect.bisect_right(ends, address)].append(one)
    return found


def products_per_issue(code: Sequence[Instruction]) -> int:
    """Multiply-adds on tensor cores by instruction of a warp, in the loop that has most of them.

    Of loops in loops the inner one counts; a kernel whose products are in no loop counts as one.
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
    return round(_multiply_adds(hottest) / max(len(hottest), 1))


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
    loads = [o for o in opcodes if re.match(r"LDG\b|LDGSTS\b|UTMALDG\b", o)]
    return {
        # HFMA2.MMA is a move in disguise, no product.
        "tensor_instructions": sum(bool(re.match(r"(HMMA|HGMMA|UTC\w*MMA)\b", o)) for o in opcodes),
        "products_per_issue": products_per_issue(code),
        "loads": len(loads),
        "wide_loads": sum(".128" in o or ".256" in o or "UTMALDG" in o for o in loads),
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
