"""A sanitizer for Triton kernels: the launches of Triton's interpreter, computed right and checked.

* Arithmetic as on a GPU: bfloat16, casts, TF32, products that add in float32 (`arithmetic.py`).
* Loads and stores outside of an argument, between its elements, or misaligned.
* Reads of memory that nobody wrote, and results of an op with elements that nobody wrote.
* Races between the programs of a launch, threads of a program that need a barrier, two lanes of a
  store that write different values to one address, results that depend on the programs' order.
* Writes to an op's inputs.
* Which bytes each launch reads and writes, per argument (`collecting`).

Nothing is followed through pointers that are cast to a narrower type, and programs are ordered by
nothing but atomics of a single element that release and acquire.

Only tests use it, with FUSED_TRITON_INTERPRETER=1; FUSED_TRITON_ORDER says in which order programs
run, FUSED_TRITON_CONFIG which of a kernel's configurations is taken (see conftest.py).
"""

from .checker import operation, sanitized
from .operation import Finding, Operation
from .traffic import ArgumentTraffic, LaunchTraffic, collecting

__all__ = [
    "ArgumentTraffic",
    "Finding",
    "LaunchTraffic",
    "Operation",
    "collecting",
    "operation",
    "sanitized",
]
