"""Figures by matplotlib, without a window system and without its global state."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING

from distmuon.errors import see
from distmuon.pictures.page import WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Twice the page's width in pixels, for screens that have them.
_DPI = 100
_SCALE = 2


def require_matplotlib() -> None:
    """Say what to install where matplotlib is missing.

    Raises:
        ModuleNotFoundError: if it is.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "Pictures need matplotlib, which is not installed. Run: pip install 'distmuon[plot]'"
            + see("missing-package")
        )


def new_figure(height: int) -> Figure:
    """Make an empty figure as wide as a page.

    Args:
        height: In pixels at the page's width.

    Returns:
        The figure, whose parts matplotlib keeps from overlapping ("constrained" layout).

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """Draw a figure.

    Args:
        figure: From `new_figure`.

    Returns:
        A PNG file, twice as many pixels wide as the page, so that it is sharp everywhere.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI * _SCALE)
    return buffer.getvalue()
