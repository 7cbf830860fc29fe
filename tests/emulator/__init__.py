"""CUDA kernels on the CPU, with checks: the Python face of ``csrc/emulator``."""

from __future__ import annotations

from .build import CSRC, build, missing_tool
from .launcher import emulate, emulated
from .session import ORDERS, Report, Session

__all__ = ["CSRC", "ORDERS", "Report", "Session", "build", "emulate", "emulated", "missing_tool"]
