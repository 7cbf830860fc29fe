"""Channel interaction: statistics, gates and the C×C product (spec.md 2.1)."""

from __future__ import annotations

from typing import Any

from .measure import run
from .providers import Provider
from .stages import Case

SUBJECT = "channel_interaction"


def test_channel_interaction(
    case: Case, provider: Provider, mode: str, benchmark: Any, settings: dict[str, Any]
) -> None:
    run(benchmark, case, provider, mode, **settings)
