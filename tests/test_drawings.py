"""Figures of the results page."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from matplotlib.text import Text

from mobilesteelnet.figures import new_figure
from mobilesteelnet.reproduction.drawings import _label_points


def test_names_of_points_hide_no_other_name_or_point() -> None:
    axes = new_figure((8, 4.6)).add_subplot()
    points = [(f"network number {i}", 1 + 0.05 * i, 50 + 0.01 * i) for i in range(4)]
    points += [("at the edge", 2.0, 51), ("the same place", 2.0, 51)]
    axes.plot([x for _, x, _ in points], [y for _, _, y in points], "o")
    _label_points(axes, points)
    assert [text.get_text() for text in axes.texts] == [name for name, _, _ in points]
    renderer = axes.figure.canvas.get_renderer()
    axes.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    for i, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1, points[i]
        assert not any(box.overlaps(other) for other in boxes[:i]), points[i]
        assert not any(box.contains(*axes.transData.transform(point[1:])) for point in points)
