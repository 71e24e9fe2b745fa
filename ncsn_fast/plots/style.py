"""How figures look and how they are made and written, here and in the benchmarks.

Belongs here: colours, new figures of matplotlib, files of figures. Does not belong here: what a figure shows
(``figures.py``; ``figures.py`` of the benchmarks). Matplotlib comes with an extra and is imported where used.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which eyes of every kind tell apart; viridis for magnitudes likewise.
BLUE, SKY, GREEN, ORANGE, VERMILION, PURPLE = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
)
GREY = "#707070"
MAGNITUDES = "viridis"
DPI = 120
INSTALL = 'pip install "ncsn_fast[{extra}]"'


def new_figure(size: tuple[float, float], dpi: int = DPI, *, extra: str = "demo") -> Figure:
    """An empty figure of matplotlib itself: pyplot would keep state and might look for a display.

    Args:
        size: width and height in inches.
        dpi: dots an inch.
        extra: of ncsn_fast, to install where matplotlib is missing.

    Raises:
        ImportError: matplotlib is not installed; says what to do.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots take matplotlib: {INSTALL.format(extra=extra)}") from error
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def grid(axes: Axes) -> None:
    """Faint lines at the major ticks."""
    axes.grid(True, which="major", alpha=0.3)


def plain_ticks(axis: Axis) -> None:
    """Numbers such as 20 and 0.5 on a logarithmic axis, of which there are some in less than a decade too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def write(figure: Figure, path: str | Path, **options: Any) -> None:
    """Writes a figure as a PNG that is whole or not there.

    Args:
        figure: what to write.
        path: the file.
        options: of ``Figure.savefig``, such as ``metadata``.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    write_atomically(Path(path), buffer.getvalue())
