"""Coordinate attention: directional gates and the group norm's statistics (spec.md 2.2)."""

from __future__ import annotations

from typing import Any

from .measure import run
from .providers import Provider
from .stages import Case

SUBJECT = "coordinate_attention"


def test_coordinate_attention(
    case: Case, provider: Provider, mode: str, benchmark: Any, settings: dict[str, Any]
) -> None:
    run(benchmark, case, provider, mode, **settings)
