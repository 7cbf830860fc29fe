"""MSFF: resize, concatenate, 1×1 convolution, norm, ReLU (spec.md 1)."""

from __future__ import annotations

from typing import Any

from .measure import run
from .providers import Provider
from .stages import Case

SUBJECT = "msff"


def test_msff(
    case: Case, provider: Provider, mode: str, benchmark: Any, settings: dict[str, Any]
) -> None:
    run(benchmark, case, provider, mode, **settings)
