"""The report's section on confidence."""

from __future__ import annotations

from .calibration import Calibration, least_threshold
from .report_html import percent, safe

TRUSTED = 0.99
"""Share of right ones among the accepted pictures that a threshold is looked for."""


def confidence_section(found: Calibration | None, image: str) -> str:
    """How far the probabilities can be trusted; empty without a calibration."""
    if found is None:
        return ""
    lines = "".join(
        f"<tr><td>{item.threshold:g}</td><td>{percent(item.coverage)}</td>"
        f"<td>{percent(item.accuracy)}</td></tr>"
        for item in found.coverage
    )
    return (
        f"<section><h2>Confidence</h2><figure>{image}</figure>"
        f'<p class="soft">Expected calibration error {percent(found.expected_error)} %. A picture '
        "whose most probable class is less probable than the threshold of "
        f"<code>predict --min-confidence</code> is rejected. "
        f"{safe(_advice(found))}</p><details><summary>Accuracy and "
        "coverage by threshold</summary><div class=scroll><table><caption>In per cent."
        "</caption><thead><tr><th scope=col>threshold</th><th scope=col>accepted</th>"
        f"<th scope=col>accuracy</th></tr></thead><tbody>{lines}</tbody></table></div></details>"
        "</section>"
    )


def _advice(found: Calibration) -> str:
    least = least_threshold(found.coverage, TRUSTED)
    if least is None or least.accuracy is None:
        text = f"There is no threshold from which on {100 * TRUSTED:g} % of the accepted are right"
        known = [item for item in found.coverage if item.accuracy is not None]
        if not known:
            return f"{text}."
        best = max(known, key=lambda item: (item.accuracy, item.coverage))
        return (
            f"{text}; nearest comes {best.threshold:g}, with {percent(best.accuracy)} % right of "
            f"the {percent(best.coverage)} % that are accepted."
        )
    return (
        f"From {least.threshold:g} on at least {100 * TRUSTED:g} % of the accepted pictures are "
        f"right; there {percent(least.coverage)} % are accepted."
    )
