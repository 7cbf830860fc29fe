"""Fused CIEMA kernels behind drop-in PyTorch layers.

`FusedCIEMA` and `FusedMSFF` are the layers, `fuse` puts them into an existing model, `explain`
says which backend runs each stage and why, `set_backend` chooses one for all.
"""

from __future__ import annotations

from .backends import BackendError, explain, set_backend
from .convert import fuse
from .modules import FusedCIEMA, FusedMSFF

__all__ = ["BackendError", "FusedCIEMA", "FusedMSFF", "explain", "fuse", "set_backend"]
