"""How the native code is built. Metadata is in pyproject.toml.

FUSED_BUILD=auto|cpu|cuda|none says what to build; auto (the default) builds what can be built here
and says in the plan what it left out and why. TORCH_CUDA_ARCH_LIST names the CUDA architectures;
left out, they are those of the GPUs that are here, or one of each kind where there is none.
FUSED_SANITIZE=address,undefined builds the CPU library with GCC's sanitizers, for tests.
Nothing is downloaded. Linux is tested; the Windows and macOS flags are not.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

MODES = ("auto", "cpu", "cuda", "none")
# Compute capabilities built when TORCH_CUDA_ARCH_LIST is unset and no GPU is here, as far as nvcc
# knows them: one of each major version, whose code runs on the later minor ones (8.0's on 8.6 and
# 8.9). The last one is also kept as PTX, for the GPUs to come.
DEFAULT_CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
NVCC_FLAGS = ["-O3", "-std=c++20"]
ROOT = Path(__file__).resolve().parent
PLAN_FILE = "build_plan.json"
PACKAGES = find_packages(include=["fused", "fused.*", "mobilesteelnet", "mobilesteelnet.*"])

CPU_SOURCES = [
    "csrc/register_cpu.cpp",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").rglob("*.cpp")),
]
CUDA_SOURCES = [
    "csrc/register_cuda.cpp",
    *sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc" / "cuda").iterdir()
        if path.suffix in (".cpp", ".cu")
    ),
]
HEADERS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("common", "cpu", "cuda")
    for path in (ROOT / "csrc" / folder).rglob("*")
    if path.suffix in (".h", ".cuh")
)

# The stable ABI of torch 2.10 is all that the code may use: one library for every later torch.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]


@dataclass
class Plan:
    """What is built, for what, and what is left out and why; goes into the package as JSON."""

    mode: str
    torch: str | None = None
    cpu: bool = False
    cuda: bool = False
    compiler: str | None = None
    nvcc: str | None = None
    cuda_architectures: list[str] = field(default_factory=list)
    cuda_ptx: list[str] = field(default_factory=list)  # what GPUs from these on compile themselves
    cuda_runtime: list[str] = field(default_factory=list)  # folders to link from; not packaged
    skipped: dict[str, str] = field(default_factory=dict)
    system: str = f"{platform.system()} {platform.machine()}"

    def lines(self) -> list[str]:
        """The plan in words."""
        out = [f"FUSED_BUILD={self.mode} on {self.system}, torch {self.torch or 'not asked'}"]
        if self.cpu:
            out.append(f"fused._cpu: built with {self.compiler}")
        if self.cuda:
            out.append(f"fused._cuda: built with {self.nvcc} for {self.cuda_architectures}")
        out += [f"fused._{name}: not built, {why}" for name, why in self.skipped.items()]
        return out


def first_line(command: list[str]) -> tuple[bool, str]:
    """Run a command; (it succeeded, the line of its output that tells most)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return False, str(error)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] if done.returncode else lines
    return done.returncode == 0, (telling or lines or ["no output"])[0].strip()


# A part of C++20 that came late, and the newest instruction set that csrc/cpu asks for.
PROBE = """#include <span>
int f(std::span<int> s) { return s.size() > 0; }
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
int g() { return __builtin_cpu_supports("avx512bf16"); }
#endif
"""


def probe(compiler: list[str], suffix: str, flags: list[str]) -> str | None:
    """None if the compiler takes a small C++20 source, else why not."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"probe{suffix}")
        source.write_text(PROBE)
        output = str(Path(folder, "probe.o"))
        good, line = first_line([*compiler, *flags, "-c", str(source), "-o", output])
    return None if good else f"{' '.join(compiler)} cannot build C++20 as it is used here: {line}"


def find_cpu_compiler() -> tuple[str | None, str]:
    """(description of the C++ compiler, "") or (None, why there is none)."""
    if sys.platform == "win32":
        found = shutil.which("cl")
        return (found, "") if found else (None, "cl is not on PATH (open a Visual Studio prompt)")
    from torch.utils.cpp_extension import get_cxx_compiler

    command = get_cxx_compiler().split()
    if shutil.which(command[0]) is None:
        return None, f"no C++ compiler: {command[0]!r} is not there (set CXX)"
    why_not = probe(command, ".cpp", ["-std=c++20"])
    return (None, why_not) if why_not else (first_line([*command, "--version"])[1], "")


def cuda_runtime_folders(nvcc: Path) -> list[str]:
    """Folders of nvcc's own toolkit that hold the CUDA runtime; nvcc may be a wrapper elsewhere."""
    if sys.platform == "win32":
        return [str(nvcc.parents[1] / "lib" / "x64")]
    command = [str(nvcc), "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    home = Path(top[1].strip()).resolve() if top else nvcc.parents[1]
    folders = [home / "lib64", home / "lib", *map(Path, re.findall(r'"-L([^"]+)"', told))]
    return [str(folder) for folder in folders if (folder / "libcudart.so").exists()]


def find_nvcc() -> tuple[Path | None, str]:
    """(path of an nvcc that suits this torch, its release) or (None, why there is none)."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    name = "nvcc.exe" if sys.platform == "win32" else "nvcc"
    nvcc = Path(CUDA_HOME, "bin", name) if CUDA_HOME else None
    if nvcc is None or not nvcc.exists():
        return None, f"nvcc not found (CUDA_HOME is {CUDA_HOME or 'unset'})"
    told = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.(\d+)", told.stdout)
    if release is None:
        return None, f"{nvcc} does not tell its release"
    if release[1] != torch.version.cuda.split(".")[0]:
        wanted = torch.version.cuda
        return None, f"{nvcc} is release {release[1]}.{release[2]}, torch is built for {wanted}"
    if not cuda_runtime_folders(nvcc):
        return None, f"the toolkit of {nvcc} has no libcudart to link with"
    why_not = None if sys.platform == "win32" else probe([str(nvcc)], ".cu", ["-std=c++20"])
    return (None, why_not) if why_not else (nvcc, f"{release[1]}.{release[2]}")


def family_of(architecture: str) -> int:
    """The compute capability, as 86, for whose family a file is compiled to PTX once.

    From 10.0 on nvcc writes other loops; no kernel asks for more than 8.0 has.
    """
    return 100 if int(architecture.replace(".", "")) >= 100 else 80


def code_flag(architecture: str) -> str:
    """nvcc's flag that makes code for ``8.6``."""
    number = architecture.replace(".", "")
    return f"-gencode=arch=compute_{family_of(architecture)},code=sm_{number}"


def cuda_flags(architectures: list[str]) -> list[str]:
    """nvcc's flags for a list as ``["8.0", "9.0+PTX"]``."""
    flags = [code_flag(name.removesuffix("+PTX")) for name in architectures]
    families = [name.replace(".", "") for name in ptx_of(architectures)]
    return flags + [f"-gencode=arch=compute_{f},code=compute_{f}" for f in families]


def ptx_of(architectures: list[str]) -> list[str]:
    """Compute capabilities, as ``8.0``, whose PTX a list as ``["8.0", "9.0+PTX"]`` keeps."""
    kept = {family_of(a.removesuffix("+PTX")) for a in architectures if a.endswith("+PTX")}
    return [f"{family // 10}.{family % 10}" for family in sorted(kept)]


def architectures_here() -> list[str]:
    """Compute capabilities, from 8.0 on and in their order, of the GPUs that torch sees."""
    from torch import cuda

    found = {cuda.get_device_capability(index) for index in range(cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(found) if major >= 8]


def choose_architectures(nvcc: Path) -> list[str]:
    """TORCH_CUDA_ARCH_LIST; else those of the GPUs here or the default list, if nvcc knows them."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    here = architectures_here() if not asked or asked == ["native"] else []
    if asked == ["native"]:
        if not here:
            raise SystemExit("TORCH_CUDA_ARCH_LIST=native: torch sees no GPU from 8.0 on")
        asked = []
    chosen = []
    for name in asked:
        number = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if number is None or int(number[1]) < 8:
            wanted = "numbers from 8.0 on, as '8.0 9.0+PTX'"
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST names {name!r}: must be {wanted}")
        # No kernel needs what 9.0a has above 9.0, whose code runs there too.
        chosen.append(f"{number[1]}.{number[2]}{number[3] or ''}")
    if chosen:
        return list(dict.fromkeys(chosen))
    command = [str(nvcc), "--list-gpu-arch"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", told))
    wanted = here if all(one.replace(".", "") in known for one in here) else []
    chosen = [one for one in wanted or DEFAULT_CUDA_ARCHITECTURES if one.replace(".", "") in known]
    if not chosen:
        raise SystemExit(f"{nvcc} knows none of {DEFAULT_CUDA_ARCHITECTURES}")
    return [*chosen[:-1], f"{chosen[-1]}+PTX"]


def make_plan() -> Plan:
    """Read FUSED_BUILD and look around.

    Raises:
        SystemExit: FUSED_BUILD is unknown, or asks for what cannot be built here.
    """
    mode = os.environ.get("FUSED_BUILD", "") or "auto"
    if mode not in MODES:
        raise SystemExit(f"FUSED_BUILD={mode!r} is unknown, use one of {', '.join(MODES)}")
    plan = Plan(mode)
    if mode == "none":
        plan.skipped = dict.fromkeys(("cpu", "cuda"), "FUSED_BUILD=none")
        return plan
    import torch

    plan.torch = torch.__version__
    plan.compiler, why_not = find_cpu_compiler()
    plan.cpu = plan.compiler is not None
    if not plan.cpu:
        if mode != "auto":
            raise SystemExit(f"FUSED_BUILD={mode}: {why_not}")
        plan.skipped = dict.fromkeys(("cpu", "cuda"), why_not)
        return plan
    if mode == "cpu":
        plan.skipped["cuda"] = "FUSED_BUILD=cpu"
        return plan
    nvcc, told = find_nvcc()
    if nvcc is None:
        if mode == "cuda":
            raise SystemExit(f"FUSED_BUILD=cuda: {told}")
        plan.skipped["cuda"] = told
        return plan
    plan.cuda, plan.nvcc = True, f"nvcc {told}"
    plan.cuda_runtime = cuda_runtime_folders(nvcc)
    plan.cuda_architectures = choose_architectures(nvcc)
    plan.cuda_ptx = ptx_of(plan.cuda_architectures)
    return plan


def compiler_flags() -> list[str]:
    """Flags for C++ sources; never -march=native: the instruction set is chosen at run time.

    Multiply-adds are fused where the source says so and nowhere else: a difference that should be
    zero would otherwise be what a product lost in rounding.
    """
    if sys.platform == "win32":
        return ["/O2", "/std:c++20", *STABLE_ABI]
    flags = ["-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", *STABLE_ABI]
    return [*flags, *(["-O1", "-g1", *sanitizer_flags()] if sanitizer_flags() else [])]


def sanitizer_flags() -> list[str]:
    """For FUSED_SANITIZE=address,undefined: what the tests build to find errors of memory."""
    wanted = os.environ.get("FUSED_SANITIZE")
    return [f"-fsanitize={wanted}", "-fno-sanitize-recover=undefined"] if wanted else []


def extensions(plan: Plan) -> list[Extension]:
    """The extension modules of a plan."""
    if not plan.cpu:
        return []
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    cxx = compiler_flags()
    common: dict[str, Any] = {"py_limited_api": True, "depends": HEADERS}
    cpu = {"extra_compile_args": {"cxx": cxx}, "extra_link_args": sanitizer_flags()}
    out = [CppExtension("fused._cpu", CPU_SOURCES, **cpu, **common)]
    if plan.cuda:
        nvcc = [*NVCC_FLAGS, "--threads=2", "-DUSE_CUDA", *STABLE_ABI]
        nvcc += cuda_flags(plan.cuda_architectures)
        flags = {"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc}
        cuda = CUDAExtension("fused._cuda", CUDA_SOURCES, extra_compile_args=flags, **common)
        cuda.library_dirs += plan.cuda_runtime
        out.append(cuda)
    return out


def commands(plan: Plan) -> dict[str, type]:
    """The build commands, which leave the plan beside the code and nothing stale."""
    facts = {name: value for name, value in asdict(plan).items() if name != "cuda_runtime"}
    text = json.dumps(facts, indent=2) + "\n"

    class BuildPython(build_py):
        def run(self) -> None:
            if not self.editable_mode:  # libraries and modules of an earlier plan must not stay
                for package in ("fused", "mobilesteelnet"):
                    shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
            else:  # a library beside the sources would be loaded, whatever the plan says
                for name in ("cpu", "cuda"):
                    for left in () if getattr(plan, name) else ROOT.glob(f"fused/_{name}*"):
                        left.unlink()
            super().run()
            folder = ROOT / "fused" if self.editable_mode else Path(self.build_lib, "fused")
            (folder / PLAN_FILE).write_text(text)

    if not plan.cpu:
        return {"build_py": BuildPython}
    from torch.utils.cpp_extension import BuildExtension

    class BuildNative(BuildExtension):
        def run(self) -> None:
            super().run()
            if self.inplace:
                (ROOT / "fused" / PLAN_FILE).write_text(text)

        def get_export_symbols(self, ext: Extension) -> list[str]:
            """Nothing to export: torch loads the library, Python does not import it."""
            return []

    return {"build_py": BuildPython, "build_ext": BuildNative}


if __name__ == "__main__":
    os.chdir(ROOT)
    PLAN = make_plan()
    print("\n".join(f"[fused] {line}" for line in PLAN.lines()), flush=True)
    setup(
        packages=PACKAGES,
        package_data={
            "fused": ["py.typed", "backends/*.json"],
            "mobilesteelnet": ["py.typed", "*.html"],
            "mobilesteelnet.reproduction": ["*.json"],
            "mobilesteelnet.weights": ["*.safetensors", "*.json", "*.md"],
        },
        ext_modules=extensions(PLAN),
        cmdclass=commands(PLAN),
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if PLAN.cpu else {},
    )
