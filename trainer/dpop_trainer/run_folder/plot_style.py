"""How every picture looks: colours that colour-blind readers tell apart (Okabe and Ito's), sizes, a light grid.

Figures are made without pyplot: no global state, no display.
"""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY_BLUE, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#8A8A8A"

TITLE, LABEL, SMALL = 9, 8, 7
"""Points: titles of panels, labels of axes and legends, numbers along axes."""
LINE_WIDTH = 1.5
ZERO_LINE: dict[str, Any] = {"color": "0.35", "linewidth": 0.8}
SCREEN, PRINT = 110, 200
"""Dots per inch: of a picture that is looked at while it grows, and of one that is shown to others."""


def finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title, labels and grid of a panel."""
    axes.set_title(title, fontsize=TITLE)
    axes.set_xlabel(xlabel, fontsize=LABEL)
    axes.set_ylabel(ylabel, fontsize=LABEL)
    axes.tick_params(which="both", labelsize=SMALL)
    axes.grid(visible=True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure, resolution: int = PRINT) -> bytes:
    """The picture as it is kept."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=resolution, facecolor="white")
    return image.getvalue()
