"""Fused CIEMA kernels behind drop-in PyTorch layers.

`FusedCIEMA` and `FusedMSFF` are the layers, `fuse` puts them into an existing model, `explain`
says which backend runs each stage and why, `set_backend` chooses one for all, and
`optimize_for_inference` makes the frozen, fastest form of a model.
"""

from __future__ import annotations

from . import flops
from .backends import BackendError, explain, set_backend
from .convert import fuse
from .frozen import FrozenError
from .inference import optimize_for_inference
from .modules import FusedCIEMA, FusedMSFF

__all__ = [
    "BackendError",
    "FrozenError",
    "FusedCIEMA",
    "FusedMSFF",
    "explain",
    "fuse",
    "optimize_for_inference",
    "set_backend",
]

# After the backends, which read how Triton is to run before anything imports it: torch's counter
# imports it where it is installed.
flops.register()
