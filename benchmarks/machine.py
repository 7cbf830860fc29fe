"""What figures depend on: processor, threads, instruction sets, versions, and how busy it was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from fused.backends import cpu, native


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str | None:
    """Its name, if py-cpuinfo (which pytest-benchmark brings) is there to find it."""
    try:
        import cpuinfo
    except ImportError:
        return None
    return str(cpuinfo.get_cpu_info().get("brand_raw"))


def facts(threads: int) -> dict[str, Any]:
    """All but the processor's name, which pytest-benchmark finds out itself."""
    names = ("onnxruntime", "openvino", "onnx", "numpy")
    isa = None if cpu.LIBRARY.error is not None else native.kernel("cpu_isa")()
    return {
        "threads": threads,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python_version": platform.python_version(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "fused_cpu_isa": isa or str(cpu.LIBRARY.error),
        "versions": {"torch": torch.__version__} | {name: _version(name) for name in names},
    }


def line(info: dict[str, Any], when: str) -> str:
    """Those facts and the processor on a line."""
    versions = info.get("versions", {})
    parts = [
        info.get("cpu", {}).get("brand_raw") or info.get("processor") or "unknown processor",
        f"{info.get('cores')} cores, {info.get('threads')} threads",
        f"torch kernels {info.get('torch_capability')}, fused.cpu {info.get('fused_cpu_isa')}",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        f"Python {info.get('python_version')}",
        when[:19],
    ]
    load = info.get("load_average")
    if load:
        parts.append(f"load average at the end {load[0]:.1f}")
    return "; ".join(parts)
