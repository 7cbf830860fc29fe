"""`python -m fused.doctor`: what is installed, what was built, what runs here, and why not.

Exit code 0: every backend that the build plan promises is loaded. 1: a built library is missing
or does not load. Running without native code is not an error.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib import metadata

import torch

from . import backends
from .backends import cpu, cuda, native


def versions() -> list[str]:
    """Python, torch and this package."""
    try:
        own = metadata.version("mobilesteelnet")
    except metadata.PackageNotFoundError:
        own = "not installed, run from a source tree"
    return [
        f"mobilesteelnet {own}",
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, built for "
        + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"),
    ]


def build() -> list[str]:
    """What the build did, from the plan in the package."""
    plan = native.read_plan()
    if plan is None:
        return ["no build plan: the native code was never built here"]
    out = [f"FUSED_BUILD={plan['mode']} with torch {plan['torch'] or 'not asked'}"]
    if plan["cpu"]:
        out.append(f"fused._cpu: built with {plan['compiler']}")
    if plan["cuda"]:
        archs = ", ".join(plan["cuda_architectures"])
        out.append(f"fused._cuda: built with {plan['nvcc']} for {archs}")
    return out + [f"fused._{name}: not built, {why}" for name, why in plan["skipped"].items()]


def libraries() -> list[str]:
    """Which library is loaded, or the loader's error; the CPU's instruction sets."""
    out = []
    for library in (cpu.LIBRARY, cuda.LIBRARY):
        told = library.error or f"loaded from {library.path}"
        out.append(f"{library.name}: {told}")
    if cpu.LIBRARY.error is None:
        forced = os.environ.get("FUSED_CPU_ISA")
        how = f"FUSED_CPU_ISA={forced}" if forced else "widest found"
        found = native.kernel("cpu_isa_available")()
        out.append(f"instruction sets found: {found}; used: {native.kernel('cpu_isa')()} ({how})")
    return out


def devices() -> list[str]:
    """GPUs and Triton."""
    if torch.cuda.is_available():
        out = []
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            out.append(f"GPU {index}: {name}, compute capability {major}.{minor}")
    else:
        out = ["GPU: none visible to torch"]
    triton = importlib.util.find_spec("triton")
    out.append(f"Triton: {metadata.version('triton') if triton else 'not installed'}")
    return out


def registered() -> list[str]:
    """Each backend and what it says to a small map on each device."""
    places = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    out = []
    for place in places:
        x = torch.zeros(1, 32, 8, 8, device=place)
        for backend in backends.BACKENDS.values():
            runs = [op for op in backend.kernels if backend.why_not(op, x) is None]
            if runs:
                told = "runs " + ", ".join(op for op in runs if not op.endswith("_backward"))
            else:
                ops = list(backend.kernels) or ["channel_interaction"]
                told = f"no: {backend.why_not(ops[0], x)}"
            out.append(f"{backend.name} on {place}: {told}")
    return out


def main() -> int:
    """Print all sections; the exit code is in the module's docstring."""
    sections = {
        "Versions": versions,
        "Build": build,
        "Libraries": libraries,
        "Devices": devices,
        "Backends": registered,
    }
    for title, section in sections.items():
        print(title)
        for line in section():
            print(f"  {line}")
    plan = native.read_plan() or {}
    broken = [one for one in (cpu.LIBRARY, cuda.LIBRARY) if plan.get(one.name) and one.error]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
