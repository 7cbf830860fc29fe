"""The build: what a wheel holds, what the plan says, and that broken libraries break nothing."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fused.backends import cuda, native

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
SIMD = ROOT / "csrc" / "cpu" / "simd"
USE_IT = """
import torch, fused
from fused.backends import cpu, cuda
x = torch.arange(24.0).reshape(1, 2, 3, 4)
for backend in (cpu.BACKEND, cuda.BACKEND):
    print(backend.name, "|", backend.why_not("channel_statistics", x))
if cpu.LIBRARY.error is None:
    print([t.tolist() for t in torch.ops.ciema_native.channel_statistics(x)])
"""


def run(
    command: list[str], cwd: Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=580, check=False
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def use(folder: Path, code: str = USE_IT, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code with only `folder` to import from, away from the source tree."""
    return run([sys.executable, "-c", code], folder, check, PYTHONPATH=str(folder))


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, with stale and broken libraries lying about."""
    tree = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns("*.so", "__pycache__", "build_plan.json", "build", "*.egg-info")
    for name in ("csrc", "fused", "mobilesteelnet", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    (tree / "fused" / "_cpu.abi3.so").write_bytes(b"stale")
    (tree / "fused" / "build_plan.json").write_text('{"stale": true}')
    return tree


def build_wheel(tree: Path, mode: str) -> Path:
    out = tree / f"wheel-{mode}"
    pip = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    run([*pip, "--no-index", "-w", str(out)], tree, FUSED_BUILD=mode)
    (wheel,) = out.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def unpack(wheel: Path, folder: Path) -> Path:
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def pure_wheel(tree: Path) -> Path:
    return build_wheel(tree, "none")


def check_content(names: list[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fused", "mobilesteelnet"}
    assert "fused/build_plan.json" in names
    for package in ("fused", "mobilesteelnet"):  # the Python files, templates, py.typed
        files = [path for path in (ROOT / package).rglob("*") if path.is_file()]
        kept = [p for p in files if p.suffix not in (".so", ".pyc") and p.name != "build_plan.json"]
        assert {p.relative_to(ROOT).as_posix() for p in kept} <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".cuh"))]


def test_a_wheel_without_native_code_works_and_says_why(pure_wheel, tmp_path):
    names = names_in(pure_wheel)
    check_content(names)
    assert not [name for name in names if name.endswith(".so")]
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    folder = unpack(pure_wheel, tmp_path)
    plan = json.loads((folder / "fused" / "build_plan.json").read_text())
    assert (plan["mode"], plan["cpu"], plan["cuda"]) == ("none", False, False)
    assert plan["skipped"] == {"cpu": "FUSED_BUILD=none", "cuda": "FUSED_BUILD=none"}
    told = use(folder).stdout
    for name in ("cpu", "cuda"):
        assert f"{name} | fused._{name} is not built: FUSED_BUILD=none" in told


def test_an_editable_build_leaves_no_library_that_it_did_not_make(tree, tmp_path):
    copy = shutil.copytree(tree, tmp_path / "tree")
    (copy / "fused" / "_cpu.abi3.so").write_bytes(b"stale")
    code = f"from setuptools import build_meta as b; b.build_editable({str(tmp_path)!r})"
    run([sys.executable, "-c", code], copy, FUSED_BUILD="none")
    assert not list(copy.glob("fused/_c*.so"))
    told = use(copy).stdout
    assert "cpu | fused._cpu is not built: FUSED_BUILD=none" in told


@pytest.mark.parametrize("plan", ["{}", "[]", '{"mode": "cpu"}', "{", None])
def test_a_damaged_plan_is_no_plan(pure_wheel, tmp_path, plan):
    folder = unpack(pure_wheel, tmp_path)
    if plan is None:  # whole, but the library that it promises is gone
        plan = '{"mode": "cpu", "cpu": true, "cuda": false, "skipped": {"cuda": "no nvcc"}}'
    (folder / "fused" / "build_plan.json").write_text(plan)
    told = use(folder).stdout
    why = "its file is gone" if "skipped" in plan else "no build plan"
    assert f"cpu | fused._cpu is not built: {why}" in told


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x7fELF" + bytes(60)])
def test_a_broken_library_is_a_reason(pure_wheel, tmp_path, content):
    folder = unpack(pure_wheel, tmp_path)
    (folder / "fused" / "_cpu.abi3.so").write_bytes(content)
    (folder / "fused" / "_cuda.abi3.so").write_bytes(content)
    told = use(folder).stdout
    for name in ("cpu", "cuda"):
        assert f"{name} | fused._{name} does not load: " in told


def test_the_doctor_fails_only_if_something_promised_is_broken(pure_wheel, tmp_path):
    folder = unpack(pure_wheel, tmp_path)
    (folder / "fused" / "_cpu.abi3.so").write_bytes(b"garbage")
    doctor = [sys.executable, "-m", "fused.doctor"]
    done = run(doctor, folder, check=False, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    for told in ("fused._cpu does not load", "FUSED_BUILD=none", "reference on cpu: runs"):
        assert told in done.stdout
    plan = folder / "fused" / "build_plan.json"
    facts = json.loads(plan.read_text())
    plan.write_text(json.dumps({**facts, "cpu": True, "compiler": "c++", "skipped": {}}))
    done = run(doctor, folder, check=False, PYTHONPATH=str(folder))
    assert done.returncode == 1, done.stderr[-2000:]


@pytest.mark.slow
def test_a_cpu_wheel_computes_away_from_the_source(tree, tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    wheel = build_wheel(tree, "cpu")
    names = names_in(wheel)
    check_content(names)
    assert [name for name in names if name.endswith(".so")] == ["fused/_cpu.abi3.so"]
    assert "-cp310-abi3-" in wheel.name
    folder = unpack(wheel, tmp_path)
    told = use(folder).stdout
    assert "cpu | None" in told
    assert "[[[5.5, 17.5]], [[11.0, 23.0]], [[11, 11]]]" in told
    assert "cuda | fused._cuda is not built: FUSED_BUILD=cpu" in told
    library = (folder / "fused" / "_cpu.abi3.so").read_bytes()
    assert b"libcudart" not in library  # a torch without CUDA has none
    assert b"PyInit" not in library  # no Python module: no Python version to match
    for size in (100, len(library) // 2, len(library) - 1):  # a copy on a full disk
        (folder / "fused" / "_cpu.abi3.so").write_bytes(library[:size])
        assert "cpu | fused._cpu does not load: " in use(folder).stdout


def test_the_source_distribution_holds_the_sources_and_no_build(tree):
    run([sys.executable, "setup.py", "sdist"], tree, FUSED_BUILD="none")
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = [name.split("/", 1)[1] for name in tar.getnames() if "/" in name]
    assert not [name for name in names if name.startswith("tests/")]  # their helpers would lack
    for needed in ("csrc/register_cpu.cpp", "csrc/cuda/channel_statistics.cuh", "setup.py"):
        assert needed in names
    assert "csrc/cpu/simd/channel_statistics_body.h" in names
    assert not [name for name in names if name.endswith((".so", "build_plan.json"))]


def plan_of(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "setup.py", "--version"], tree, check=False, **environment)


def test_unknown_mode_is_refused(tree):
    done = plan_of(tree, FUSED_BUILD="gpu")
    assert done.returncode != 0
    assert "FUSED_BUILD='gpu' is unknown, use one of auto, cpu, cuda, none" in done.stderr


@pytest.mark.parametrize("name", ["7.5", "Hopper", "9.0b", "8"])
def test_an_architecture_that_cannot_be_built_for_is_refused(tree, name):
    done = plan_of(tree, FUSED_BUILD="cuda", TORCH_CUDA_ARCH_LIST=f"8.6 {name}")
    if "FUSED_BUILD=cuda: " in done.stderr:
        pytest.skip("no nvcc")
    assert done.returncode != 0
    assert f"TORCH_CUDA_ARCH_LIST names '{name}': must be numbers from 8.0 on" in done.stderr


@pytest.mark.parametrize(
    ("found", "environment", "want"),
    [
        ([], "", ["8.0", "9.0", "12.0+PTX"]),
        ([(9, 0), (8, 6), (9, 0), (7, 5)], "", ["8.6", "9.0+PTX"]),
        ([(7, 5)], "", ["8.0", "9.0", "12.0+PTX"]),
        ([(13, 0)], "", ["8.0", "9.0", "12.0+PTX"]),  # newer than nvcc
        ([(8, 6)], "native", ["8.6+PTX"]),
        ([(8, 6)], "8.9;9.0+PTX", ["8.9", "9.0+PTX"]),
        ([(9, 0)], "9.0 9.0a 10.0f+PTX", ["9.0", "10.0+PTX"]),
    ],
)
def test_architectures_are_those_of_the_gpus_here(found, environment, want, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nfor n in 75 80 86 90 120; do echo compute_$n; done\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", environment)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[index])
    choose = runpy.run_path(str(ROOT / "setup.py"), run_name="build")["choose_architectures"]
    assert choose(nvcc) == want


def test_native_without_a_gpu_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    choose = runpy.run_path(str(ROOT / "setup.py"), run_name="build")["choose_architectures"]
    with pytest.raises(SystemExit, match="native: torch sees no GPU"):
        choose(tmp_path / "nvcc")


@pytest.mark.parametrize(
    ("architectures", "runs", "fails"),
    [
        (["8.0", "9.0", "10.0", "12.0+PTX"], [80, 86, 89, 90, 100, 103, 110, 120, 121, 130], [75]),
        (["9.0+PTX"], [80, 86, 90, 120], [75]),  # its PTX is of the family of 8.0
        (["8.6"], [86, 89], [80, 90, 120]),
        (["9.0"], [90], [80, 100]),
    ],
)
def test_a_gpu_that_the_library_has_no_code_for_is_known(architectures, runs, fails):
    ptx = runpy.run_path(str(ROOT / "setup.py"), run_name="build")["ptx_of"](architectures)
    plan = {"cuda": True, "cuda_architectures": architectures, "cuda_ptx": ptx}
    for numbers, holds in ((runs, True), (fails, False)):
        for number in numbers:
            assert cuda.holds_code_for(divmod(number, 10), plan) is holds, number


def test_a_plan_that_did_not_build_the_library_says_nothing_of_it():
    assert cuda.holds_code_for((9, 0), {"cuda": False, "cuda_architectures": []})


@pytest.mark.parametrize(
    ("major", "minor", "reason"),
    [
        (9, 0, None),
        (7, 5, "a GPU has compute capability 7.5, the cuda kernels need 8.0"),
        (8, 0, r"was built for 9.0: build it again here, or with TORCH_CUDA_ARCH_LIST=8.0"),
    ],
)
def test_why_a_gpu_cannot_run_the_library_is_said(major, minor, reason, monkeypatch):
    gpu = SimpleNamespace(name="a GPU", major=major, minor=minor)
    plan = {"cuda": True, "cuda_architectures": ["9.0"], "cuda_ptx": []}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(native, "read_plan", lambda: plan)
    told = cuda._device_reason.__wrapped__(0)
    assert told == reason if told is None else re.search(reason, told)


def test_a_file_is_compiled_to_ptx_once_for_a_family_of_gpus():
    flags = runpy.run_path(str(ROOT / "setup.py"), run_name="build")["cuda_flags"]
    assert flags(["8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_80,code=sm_87",
        "-gencode=arch=compute_80,code=sm_89",
        "-gencode=arch=compute_80,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=sm_103",
        "-gencode=arch=compute_100,code=sm_120",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_cuda_without_nvcc_is_an_error_and_auto_goes_without(tree):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    nowhere = {"CUDA_HOME": str(tree / "nowhere")}
    done = plan_of(tree, FUSED_BUILD="cuda", **nowhere)
    assert done.returncode != 0
    assert "FUSED_BUILD=cuda: " in done.stderr
    done = plan_of(tree, FUSED_BUILD="auto", **nowhere)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fused._cpu: built with" in done.stdout
    assert "fused._cuda: not built, " in done.stdout


@pytest.mark.parametrize("compiler", ["no-such-compiler", "broken"])
def test_no_compiler_is_an_error_for_cpu_and_said_for_auto(tree, tmp_path, compiler):
    if compiler == "broken":
        compiler = str(tmp_path / "c++")
        Path(compiler).write_text("#!/bin/sh\necho 'error: cannot do C++20' >&2\nexit 1\n")
        Path(compiler).chmod(0o755)
    done = plan_of(tree, FUSED_BUILD="cpu", CXX=compiler)
    assert done.returncode != 0
    assert "FUSED_BUILD=cpu: " in done.stderr
    assert compiler in done.stderr
    done = plan_of(tree, FUSED_BUILD="auto", CXX=compiler)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fused._cpu: not built, " in done.stdout
    assert "fused._cuda: not built, " in done.stdout


@pytest.mark.parametrize("source", sorted(SIMD.glob("*.cpp")), ids=lambda path: path.stem)
def test_an_instruction_set_file_shows_the_linker_nothing_but_its_table(source, tmp_path):
    compiler, nm = shutil.which("c++"), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("needs c++ and nm")
    obj = tmp_path / "object.o"
    flags = ["-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    run([compiler, *flags, "-c", str(source), "-o", str(obj)], tmp_path)
    symbols = run([nm, "-C", "--defined-only", "--extern-only", str(obj)], tmp_path).stdout
    tables = [line.split(maxsplit=2)[2] for line in symbols.splitlines()]
    stem, _, isa = source.stem.rpartition("_")
    assert tables == [f"ciema::cpu::k{isa.capitalize()}{stem.title().replace('_', '')}"]


def test_torch_in_use_is_new_enough():
    """The stable ABI the sources ask for is one this torch offers."""
    asked = re.search(r"TORCH_TARGET_VERSION=0x02(0[0-9a-f])", (ROOT / "setup.py").read_text())
    assert asked is not None
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert version >= (2, int(asked[1], 16))
