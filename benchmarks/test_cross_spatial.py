"""Cross-spatial learning and cross-attention: the 2G small networks (spec.md 2.3)."""

from __future__ import annotations

from typing import Any

from .measure import run
from .providers import Provider
from .stages import Case

SUBJECT = "cross_spatial"


def test_cross_spatial(
    case: Case, provider: Provider, mode: str, benchmark: Any, settings: dict[str, Any]
) -> None:
    run(benchmark, case, provider, mode, **settings)
