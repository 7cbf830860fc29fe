"""MobileSteelNet: a network for steel surface defects, and its command line.

`from mobilesteelnet import MobileSteelNet, load_checkpoint`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint
    from .model import MobileSteelNet

__all__ = ["MobileSteelNet", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    # Imported when first used: the command line's --help must not wait for torch.
    if name == "MobileSteelNet":
        from .model import MobileSteelNet

        return MobileSteelNet
    if name == "load_checkpoint":
        from .checkpoint import load_checkpoint

        return load_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
