"""CIEMA as a layer: the figure to quote (spec.md 2)."""

from __future__ import annotations

from typing import Any

from .measure import run
from .providers import Provider
from .stages import Case

SUBJECT = "ciema"


def test_ciema(
    case: Case, provider: Provider, mode: str, benchmark: Any, settings: dict[str, Any]
) -> None:
    run(benchmark, case, provider, mode, **settings)
