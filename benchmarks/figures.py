"""Plots of results, each made from plain data that is picked first.

Belongs here: how plots look, and the hash by which a picture knows its data. Does not belong here: what a case or a
series is (``comparisons.py``), Markdown. Colours, new figures and files are the package's
(``ncsn_fast/plots/style.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncsn_fast.plots import style

from .comparisons import (
    AXES,
    COMPILE,
    EAGER,
    ENGINES,
    REFERENCE,
    SAMPLE,
    Series,
    device_title,
    duration,
    family,
    is_usual,
    per_image,
    rate,
    representative,
    series,
    speedup,
    two_digits,
)
from .results import NOISY, Result, Run

# A colour and a marker for each family of peers, the same in all figures; grey is what all are compared with.
STYLES = {
    EAGER: (style.GREY, "o"),
    COMPILE: (style.ORANGE, "s"),
    "native": (style.BLUE, "D"),
    "triton": (style.GREEN, "^"),
    "ncsn_fast": (style.VERMILION, "v"),
    "ncsn_fast + compile": (style.PURPLE, "P"),
    REFERENCE: (style.SKY, "X"),
}
STYLES |= {name: ("black", marker) for name, marker in zip(ENGINES, "x+*pd", strict=True)}
OTHER = ("black", ".")  # a peer of no family
HASH_KEY = "ncsn_fast data"  # in the PNG's metadata

# --- what each figure shows -----------------------------------------------------------------------

# Plain, and all that is plotted: its hash tells whether a picture is out of date.
Data = dict[str, Any]
Cell = tuple[Result, str, float, bool]


def speedup_data(run: Run) -> Data:
    """How many times as fast as eager the fastest of ours, the fastest compiled peer and the engines are, by case."""
    cells = []
    for comparison in representative(run.results):
        eager = comparison.best(EAGER)
        engines = (comparison.best(name) for name in comparison.engine_families)
        for result in (comparison.ours(), comparison.best(COMPILE), *engines):
            if (gain := speedup(result, eager)) is not None:
                cells.append((result, result.group, *gain))
    return _rows(run, cells)


def roofline_data(run: Run) -> Data:
    """The share of the machine's limit that each family reaches, by case."""
    cells = []
    for comparison in representative(run.results):
        for name in (EAGER, COMPILE, *comparison.our_families):
            result = comparison.best(name)
            if result is not None and result.limit_share is not None:
                limit = "copy" if result.gflop_per_s is None else "matrix product"
                head = f"{result.group}, of the {limit}"
                cells.append((result, head, result.limit_share, result.status == NOISY))
    return _rows(run, cells) | {"limits": dict(run.limits)} if cells else {}


def _rows(run: Run, cells: list[Cell]) -> Data:
    """By headed row, dtype and family: a value, and whether it is noisy."""
    rows: dict[str, dict[str, Any]] = {}
    for result, head, value, noisy in cells:
        label = f"{result.name}  {result.shape}"
        label += "" if is_usual(result) else f" {result.setting}"
        row = rows.setdefault(head, {}).setdefault(label, {})
        row.setdefault(result.dtype, {})[family(result.peer)] = [value, noisy]
    dtypes = sorted({result.dtype for result, *_ in cells})
    return {"device": device_title(run), "dtypes": dtypes, "rows": rows} if rows else {}


def scaling_data(run: Run) -> Data:
    """Time per image against batch, resolution and width: of each the longest series of the network."""
    panels = []
    for axis in ("batch", "resolution", "width"):
        found = [s for s in series(run.results, axis, 3) if s.case.suite != SAMPLE and s.families]
        if found:
            longest = max(found, key=lambda one: len(one.points))
            # Of one image, the time does not grow with the batch if all goes well.
            power = 0 if axis == "batch" else AXES[axis]
            panels.append(_panel(longest, "time per image", power, per_image))
    return _panels(run, "The network's forward pass", panels)


def sampling_data(run: Run) -> Data:
    """Time of a whole sampling loop against the batch."""
    found = [s for s in series(run.results, "batch") if s.case.suite == SAMPLE and s.families]
    panels = [_panel(s, "time of the loop", 1, lambda r: r.median_us) for s in found[:3]]
    return _panels(run, "Sampling: a loop in plain PyTorch, and ours", panels)


def _panels(run: Run, title: str, panels: list[Data]) -> Data:
    return {"title": title, "device": device_title(run), "panels": panels} if panels else {}


def _panel(one: Series, what: str, power: int, time: Callable[[Result], float]) -> Data:
    lines = {
        name: [[v, time(r), r.status == NOISY] for v, r in one.line(name).items()]
        for name in one.families
    }
    return {"axis": one.axis, "title": one.title, "what": what, "power": power, "lines": lines}


# --- plotting -------------------------------------------------------------------------------------

WIDTH, DPI = 9.0, 150  # inches, and dots an inch: more than GitHub shows, so that text stays sharp
ROW = 0.27  # inches for a row of bars or dots
FONT = 9.5


def _figure(height: float) -> Any:
    return style.new_figure((WIDTH, height), DPI, extra="bench")


def _heading(
    figure: Any, title: str, families: Iterable[str], *, noisy: bool, linear: bool = False
) -> None:
    """The title, and in a row under it the families and what hollow and dotted mean if anything is."""
    from matplotlib.lines import Line2D

    found, handles = set(families), []
    for name in [name for name in STYLES if name in found] + sorted(found - STYLES.keys()):
        color, marker = STYLES.get(name, OTHER)
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="", label=name))
    if linear:
        handles.append(Line2D([], [], color="black", linestyle=":", label="in proportion"))
    if noisy:
        style = {"marker": "o", "markerfacecolor": "white", "linestyle": ""}
        handles.append(Line2D([], [], color="black", **style, label="hollow: noisy"))
    legend = figure.legend(
        handles=handles,
        title=title,
        loc="outside upper center",
        ncols=len(handles),
        fontsize=FONT,
        title_fontsize=FONT + 1.5,
        frameon=False,
        columnspacing=1.2,
        handletextpad=0.2,
    )
    legend.get_title().set_multialignment("center")


def _by_case(data: Data, title: str, plot_row: Callable[[Any, float, Data], None]) -> Any:
    """Rows of cases under headings, a column of axes for each dtype."""
    ticks: list[tuple[str, Data | None]] = []
    for head, rows in data["rows"].items():
        ticks += [(head, None), *rows.items()]
    figure = _figure(1.5 + ROW * len(ticks))
    columns = figure.subplots(1, len(data["dtypes"]), sharey=True, sharex=True, squeeze=False)[0]
    for axes, dtype in zip(columns, data["dtypes"], strict=True):
        axes.set_title(dtype, fontsize=FONT)
        axes.set_yticks(range(len(ticks)), [text for text, _ in ticks], fontsize=FONT)
        axes.set_ylim(len(ticks) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=FONT)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        axes.axvline(1, color="black", linewidth=1)
        for y, (_, row) in enumerate(ticks):
            if row is not None:
                plot_row(axes, y, row.get(dtype, {}))
    for label, (_, row) in zip(columns[0].get_yticklabels(), ticks, strict=True):
        label.set_fontweight("bold" if row is None else "normal")
    cells = [cell for rows in data["rows"].values() for r in rows.values() for cell in r.values()]
    noisy = any(noisy for cell in cells for _, noisy in cell.values())
    families = (name for cell in cells for name in cell)
    _heading(figure, f"{title}\n{data['device']}", families, noisy=noisy)
    return figure


def _numbers(data: Data) -> list[float]:
    rows = (row for rows in data["rows"].values() for row in rows.values())
    return [number for row in rows for cell in row.values() for number, _ in cell.values()]


def plot_speedup(data: Data) -> Any:
    """Bars from 1x: to the right what is faster than eager, to the left what is slower."""

    def bars(axes: Any, y: float, cell: Data) -> None:
        height = 0.4  # of a row, which has two bars at most
        for i, (name, (gain, noisy)) in enumerate(cell.items()):
            color = STYLES.get(name, OTHER)[0]
            at = y + (i - (len(cell) - 1) / 2) * height
            fill = {"facecolor": "white" if noisy else color, "edgecolor": color}
            axes.barh(at, gain - 1, left=1, height=0.85 * height, **fill)
            text = f"{'~' if noisy else ''}{two_digits(gain)}x"
            side = {"ha": "left" if gain >= 1 else "right", "va": "center_baseline"}
            move = {"xytext": (3 if gain >= 1 else -3, 0), "textcoords": "offset points"}
            axes.annotate(text, (gain, at), fontsize=FONT - 2.5, **side, **move)

    figure = _by_case(data, "Times as fast as eager PyTorch", bars)
    numbers = [1.0, *_numbers(data)]
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        axes.set_xlim(min(numbers) / 1.5, max(numbers) * 1.6)  # with room for the labels
    return figure


def plot_roofline(data: Data) -> Any:
    """Dots on the share of the limit; at 100% the device does what a large copy or matrix product does."""
    from matplotlib.ticker import LogLocator, NullLocator

    def dots(axes: Any, y: float, cell: Data) -> None:
        for name, (share, noisy) in cell.items():
            color, marker = STYLES.get(name, OTHER)
            fill = {"markerfacecolor": "white" if noisy else color, "linestyle": ""}
            axes.plot(share, y, color=color, marker=marker, markersize=6, zorder=3, **fill)
        shares = [share for share, _ in cell.values()]
        if shares:
            axes.plot([min(shares), max(shares)], [y, y], color="#bbbbbb", linewidth=1, zorder=2)

    figure = _by_case(data, "Share of the limit measured in the same run", dots)
    for axes, dtype in zip(figure.axes, data["dtypes"], strict=True):
        limits = {"copy": "copy GB/s", "matrix product": f"matmul {dtype} GFLOP/s"}
        found = {what: data["limits"].get(key) for what, key in limits.items()}
        texts = [f"{w} {rate(v, limits[w].rsplit(' G')[-1])}" for w, v in found.items() if v]
        axes.set_title("\n".join([dtype, ", ".join(texts)]), fontsize=FONT - 0.5)
    for axes in figure.axes:
        if max(_numbers(data)) > 1.6:  # what stays in the cache is faster than a large copy
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.set_xlim(-0.03, None)
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g}%")
    return figure


def plot_lines(data: Data) -> Any:
    """A panel for each series: time against what grows, both logarithmic."""
    figure = _figure(4.3)
    columns = figure.subplots(1, len(data["panels"]), squeeze=False)[0]
    for axes, panel in zip(columns, data["panels"], strict=True):
        for name, points in panel["lines"].items():
            color, marker = STYLES.get(name, OTHER)
            x, y = [p[0] for p in points], [p[1] for p in points]
            axes.plot(x, y, color=color, linewidth=1.6)
            linear = [y[0] * (at / x[0]) ** panel["power"] for at in x]
            axes.plot(x, linear, color=color, linestyle=":", linewidth=1.2)
            for at, time, noisy in points:
                fill = "white" if noisy else color
                axes.plot(at, time, color=color, marker=marker, markersize=6, markerfacecolor=fill)
        _time_axes(
            axes, sorted({point[0] for points in panel["lines"].values() for point in points})
        )
        axes.set_title(panel["title"].replace(", levels", ",\nlevels"), fontsize=FONT - 0.5)
        axes.set_xlabel(panel["axis"], fontsize=FONT)
    columns[0].set_ylabel(data["panels"][0]["what"], fontsize=FONT)
    lines = [line for panel in data["panels"] for line in panel["lines"].items()]
    noisy = any(noisy for _, points in lines for *_, noisy in points)
    families = (name for name, _ in lines)
    _heading(figure, f"{data['title']}\n{data['device']}", families, noisy=noisy, linear=True)
    return figure


def _time_axes(axes: Any, values: list[int]) -> None:
    """What grows and time, both logarithmic, with labels that can be read."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(xscale="log", yscale="log")
    axes.set_xticks(values, [str(value) for value in values])
    low, high = axes.get_ylim()
    subs = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 10 else (1, 2, 5) if high / low < 1000 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(lambda us, _: duration(us))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=FONT - 1)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


# --- the figures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A figure by what it shows (nothing: a run has no such case) and how that is plotted."""

    title: str
    data: Callable[[Run], Data]
    plot: Callable[[Data], Any]


FIGURES = {
    "speedup": Figure("Speed-up over eager PyTorch", speedup_data, plot_speedup),
    "roofline": Figure("Share of the machine's limit", roofline_data, plot_roofline),
    "scaling": Figure("Growth with batch, resolution and width", scaling_data, plot_lines),
    "sampling": Figure("Sampling against the batch", sampling_data, plot_lines),
}


def fingerprint(name: str, run: Run) -> str | None:
    """The hash of exactly what a figure shows; None if the run has nothing for it."""
    data = FIGURES[name].data(run)
    text = json.dumps([name, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest() if data else None


def plot(name: str, run: Run, path: Path) -> Path:
    """Writes a figure as a PNG that carries the hash of its data.

    Args:
        name: of FIGURES.
        run: whose results.
        path: the file.

    Raises:
        ValueError: the run has nothing for it.
        ImportError: matplotlib is not installed.
    """
    data = FIGURES[name].data(run)
    if not data:
        raise ValueError(f"these results hold nothing for the figure {name!r}")
    figure = FIGURES[name].plot(data)
    metadata = {HASH_KEY: fingerprint(name, run)}
    style.write(figure, path, metadata=metadata, pil_kwargs={"optimize": True})
    return path


def fingerprint_in(path: Path) -> str | None:
    """The hash in a PNG's metadata; None if there is none, or no file."""
    from PIL import Image  # comes with matplotlib

    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(HASH_KEY)
