"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the stage tests, clean."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# What the sanitized library runs: every op, half and single precision, layouts with tails and gaps.
SELECTED = "test_forward_and_gradients and cpu and not float64 and (contiguous or strided)"
# Products of Strassen's form, which the stage tests' sizes do not reach.
LARGE = "both_forms or (wide_maps and 1024)"
FILES = ("test_stages.py", "test_cpu_products.py", "test_cpu_training.py")


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done


def runtime() -> str | None:
    """What the interpreter must load first; None if it is not there.

    The sanitizer's library, and that of C++, whose exceptions it has to find when it starts.
    """
    if sys.platform != "linux" or shutil.which("g++") is None:
        return None
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        told = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
        paths.append(told.stdout.strip())
    return " ".join(paths) if all(Path(path).is_absolute() for path in paths) else None


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree whose CPU library is instrumented."""
    if runtime() is None:
        pytest.skip("g++ has no AddressSanitizer here")
    tree = tmp_path_factory.mktemp("sanitized")
    skip = shutil.ignore_patterns("*.so", "__pycache__", "build_plan.json", "*.egg-info")
    for name in ("csrc", "fused", "mobilesteelnet", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run(build, tree, FUSED_BUILD="cpu", FUSED_SANITIZE="address,undefined")
    return tree


def under_sanitizer(tree: Path, command: list[str], **environment: str) -> str:
    """Output of a command that loads the tree's library."""
    settings = {
        "LD_PRELOAD": str(runtime()),
        # Python and torch keep memory until the end, and torch's own code is not of interest.
        "ASAN_OPTIONS": "detect_leaks=0:detect_container_overflow=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "2",
    }
    return run([sys.executable, *command], tree, **settings, **environment).stdout


def test_the_sanitizer_sees_the_library(sanitized: Path) -> None:
    """Without this a run that found nothing would say nothing."""
    code = "import fused.backends.cpu as c; print(c.LIBRARY.path, c.LIBRARY.error)"
    told = under_sanitizer(sanitized, ["-c", code])
    assert told.split() == [str(sanitized / "fused" / "_cpu.abi3.so"), "None"]
    symbols = subprocess.run(
        ["nm", "-D", str(sanitized / "fused" / "_cpu.abi3.so")], capture_output=True, text=True
    ).stdout
    assert "__asan_report_load" in symbols
    assert "__ubsan_handle" in symbols


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512bf16", "avx2", "portable"])
def test_stage_tests_are_clean(sanitized: Path, isa: str) -> None:
    code = "from fused.backends import native; print(native.kernel('cpu_isa_available')())"
    available = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    if isa not in available.split()[0].split(",") and isa not in available:
        pytest.skip(f"this processor has {available.strip()}")
    selected = SELECTED if isa == "avx512bf16" else f"{SELECTED} and float32"
    tests = [str(ROOT / "tests" / name) for name in FILES]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--rootdir", str(ROOT), "-k", f"({selected}) or {LARGE}", *tests]
    told = under_sanitizer(sanitized, command, FUSED_CPU_ISA=isa)
    assert " passed" in told
