"""metrics.png is drawn once, with margins that its labels fit into."""

import re
from pathlib import Path

import pytest
from dpop_trainer.run_folder import plot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
WIDE = {
    "tokens/per_second": 1_234_567.0,
    "learning_rate": 1.25e-7,
    "rewards/margins": -123_456.0,
    "memory/peak_gib": 0.125,
}


def lines(keys):
    return [{"step": step, **{key: WIDE.get(key, 0.5) * (1 + step / 7) for key in keys}} for step in range(1, 30)]


ALL = [line.key for panel in plot._PANELS for line in panel.lines]


@pytest.mark.parametrize("keys", [ALL, ALL[:1], ALL[:9]], ids=["all", "one", "an odd number"])
def test_labels_stay_in_their_panel(keys):
    """Each panel's, with all that is written around its axes, is within a width of its cell, and above the next row."""
    figure, grid, panels = plot._empty_figure(lines(keys))
    for axes, panel in zip(grid, panels, strict=False):
        plot._draw(axes, panel, lines(keys))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [axes.get_tightbbox(canvas.get_renderer()) for axes in grid[: len(panels)]]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_colours_are_said_once():
    """Of figures in their style, of pages in their shell."""
    files = [path for package in ("trainer", "benchmarks") for path in (ROOT / package).rglob("*.py")]
    with_colours = {path.name for path in files if re.search(r"#[0-9A-Fa-f]{6}\b", path.read_text())}
    assert with_colours == {"plot_style.py", "html_page.py"}


def test_it_is_drawn_once(monkeypatch):
    drawn = []
    draw = Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda figure, renderer: drawn.append(figure) or draw(figure, renderer))
    assert plot.draw_metrics(lines(ALL)).startswith(b"\x89PNG")
    assert len(drawn) == 1
