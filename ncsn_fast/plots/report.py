"""The page about a run: one HTML file with its curves, samples, settings and machine, that fetches nothing.

Belongs here: the page, from plain values. Does not belong here: reading them from a run's folder (``cli/report.py``),
what they are and when they are taken (``training/watching.py``), figures that others want too (``figures.py``).

Figures are SVG within the page, whose colours are variables of its style sheet: they follow the reader's dark or light
theme, and their text stays text.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import style
from .figures import running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (5.4, 3.4)  # inches: as wide as a phone's screen, so that the text can be read there
BINS = 400  # points of a curve, at most; more are not told apart
GROUP = 5  # steps, at least, whose range is shown
LEVELS = 6  # curves of noise levels, at most
TIMES = 4  # curves of times, at most
PICTURES = 12  # at most, evenly spread
# Colours of figures that stand for variables of the style sheet.
INK, SERIES = "#010203", "#010204"
SCALE = tuple(f"#0102{i:02x}" for i in range(0x10, 0x10 + LEVELS))
VARIABLES = {INK: "--ink", SERIES: "--series", **{c: f"--scale-{i}" for i, c in enumerate(SCALE)}}
LOOK = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **{"legend.frameon": False, "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "report"},
}

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f5f6f8; --ink: #1b1f27; --quiet: #5b6472;
  --line: #d9dde3; --series: #0072b2; SCALE_LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --card: #1d2128; --ink: #e7eaef; --quiet: #a2abb8; --line: #343a44; --series: #56b4e9;
    SCALE_DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.15rem; }
p, figcaption, dt, th, summary { color: var(--quiet); }
p { margin: .2rem 0 .8rem; max-width: 46rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.2rem 0 0; }
dl div { padding: .6rem .8rem; border-radius: .5rem; background: var(--card); }
dt { font-size: .82rem; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
dd small { display: block; font-size: .78rem; color: var(--quiet); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.figures svg { display: block; width: 100%; max-width: 44rem; height: auto; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 46%), 1fr)); gap: .9rem; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: .3rem; image-rendering: pixelated; }
figcaption { font-size: .85rem; font-variant-numeric: tabular-nums; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem 2rem; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 400; white-space: nowrap; }
details { margin-top: .6rem; font-size: .9rem; }
"""


def run_page(
    title: str,
    *,
    losses: Sequence[float],
    records: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[tuple[int, bytes]] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The page as HTML.

    Args:
        title: of the page, the run's name.
        losses: of the steps 1, 2, ...; at least one.
        records: of the run's ``log.jsonl``, in their order, see :class:`~ncsn_fast.training.Watch`.
        pictures: samples on the way, each a step and a PNG.
        settings: what the run was made from, plain values.

    Raises:
        ValueError: no losses.
        ImportError: matplotlib is not installed.
    """
    if not losses:
        raise ValueError("losses must hold at least one number, got none")
    settings = settings or {}
    held_out = [(r["step"], r["held_out"]) for r in records if "held_out" in r]
    parts = [
        f"<h1>{_text(title)}</h1>{_times(records)}",
        _tiles(_facts(losses, records, held_out, settings)),
        "<h2>Loss</h2><p>Of the training, summed over a sample: the range within a group of steps, and the running "
        "mean.</p>",
        f'<div class="figures">{_figure(lambda axes: _draw_loss(axes, losses), "training loss")}</div>',
        _held_out_section(held_out),
        _pictures_section(pictures),
        _settings_section(settings, records),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


# --- sections -------------------------------------------------------------------------------------


def _facts(
    losses: Sequence[float],
    records: Sequence[Mapping[str, Any]],
    held_out: Sequence[tuple[int, Mapping[str, Any]]],
    settings: Mapping[str, Any],
) -> list[tuple[str, str, str]]:
    """What stands above all: name, value, remark."""
    steps, asked = len(losses), settings.get("iterations")
    facts = [("steps", f"{steps:,}", f"of {asked:,}" if isinstance(asked, int) else "")]
    if isinstance(settings.get("batch_size"), int):
        facts.append(("images seen", f"{steps * settings['batch_size']:,}", ""))
    facts.append(("loss", f"{float(running_mean(losses)[-1]):.4g}", "running mean"))
    known = [(found["loss"], step) for step, found in held_out if found["loss"] is not None]
    if known:
        best, where = min(known)
        facts.append(("held-out loss", f"{known[-1][0]:.4g}", f"lowest {best:.4g}, step {where:,}"))
    speeds = [r["images_per_second"] for r in records if r.get("images_per_second")]
    if speeds:
        facts.append(("images a second", f"{statistics.median(speeds):,.4g}", "median"))
    memory = [r["memory_bytes"] for r in records if r.get("memory_bytes")]
    if memory:
        facts.append(("memory", f"{max(memory) / 1e9:.2f} GB", "at most"))
    return facts


def _times(records: Sequence[Mapping[str, Any]]) -> str:
    times = [str(record["time"])[:16].replace("T", " ") for record in records if "time" in record]
    return f"<p>Recorded from {_text(times[0])} to {_text(times[-1])} UTC.</p>" if times else ""


def _tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    tiles = (
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}<small>{_text(remark)}</small></dd></div>"
        for name, value, remark in facts
    )
    return f"<dl>{''.join(tiles)}</dl>"


def _held_out_section(held_out: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    title = "<h2>Held-out loss by level</h2>"
    if not held_out:
        return f"{title}<p>Not measured: train with --held-out 0.05, or another share or data.</p>"
    figures = _figure(
        lambda axes: _draw_over_time(axes, held_out), "held-out loss of some levels over the steps"
    )
    last_step, last = held_out[-1]
    if len(last["sigmas"]) > 1:
        figures += _figure(
            lambda axes: _draw_by_level(axes, held_out), "held-out loss by level at some steps"
        )
    rows = zip(last["sigmas"], last["loss_by_level"], strict=True)
    table = _table((f"σ = {_number(sigma)}", _number(loss)) for sigma, loss in rows)
    return (
        f"{title}<p>Of images that were not trained on, by the moving average, with noise that is always the same; "
        "weighted by σ², a dimension, so that a network that knows nothing has 1.</p>"
        f'<div class="figures">{figures}</div>'
        f"<details><summary>Numbers of step {last_step:,}</summary>{table}</details>"
    )


def _pictures_section(pictures: Sequence[tuple[int, bytes]]) -> str:
    title = "<h2>Samples</h2>"
    if not pictures:
        return f"{title}<p>None were drawn: train with --samples-every 1000.</p>"
    shown = "".join(
        f'<figure><img alt="samples after step {step}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>step {step:,}</figcaption></figure>"
        for step, png in _some(pictures, PICTURES)
    )
    return (
        f"{title}<p>Of the moving average, with few passes, always from the same noise.</p>"
        f'<div class="pictures">{shown}</div>'
    )


def _settings_section(settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    machines: list[tuple[Mapping[str, Any], list[int]]] = []
    for record in records:
        if "machine" in record:
            if not machines or machines[-1][0] != record["machine"]:
                machines.append((record["machine"], []))
            machines[-1][1].append(record["step"])
    columns = [f"<section><h2>Settings</h2>{_table(settings.items())}</section>"]
    for machine, starts in machines:
        begun = ", ".join(f"{step:,}" for step in dict.fromkeys(starts))
        rows = {**machine, "started after step": begun}
        columns.append(f"<section><h2>Machine</h2>{_table(rows.items())}</section>")
    return f'<div class="tables">{"".join(columns)}</div>'


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = (f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _some(sequence: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly spread, the first and the last among them."""
    if len(sequence) <= most:
        return list(sequence)
    places = np.linspace(0, len(sequence) - 1, most).round().astype(int)
    return [sequence[place] for place in places]


# --- figures --------------------------------------------------------------------------------------


def _style() -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    def scale(low: float, high: float) -> str:
        # Its dark end is lost on black, and its light one on white.
        colors = colormaps[style.MAGNITUDES](np.linspace(low, high, LEVELS))
        return " ".join(f"--scale-{i}: {to_hex(color)};" for i, color in enumerate(colors))

    return STYLE.replace("SCALE_LIGHT", scale(0, 0.82)).replace("SCALE_DARK", scale(0.3, 1))


def _figure(draw: Callable[[Axes], None], name: str) -> str:
    """A figure as SVG, with variables for its colours."""
    style.new_figure((1, 1))  # says what to install if matplotlib is missing
    import matplotlib

    with matplotlib.rc_context(LOOK):
        figure = style.new_figure(SIZE)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    # Without its own size it takes that of the page; its view box says the shape.
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_text(name)}" ', 1)


def _draw_loss(axes: Axes, losses: Sequence[float]) -> None:
    values = np.asarray(losses, dtype=np.float64)
    n = len(losses)
    groups = itertools.pairwise(_places(n, max(1, min(BINS, n // GROUP))))
    middles, low, high = zip(
        *(((a + b + 1) / 2, values[a:b].min(), values[a:b].max()) for a, b in groups), strict=True
    )
    axes.fill_between(middles, low, high, color=SERIES, alpha=0.25, linewidth=0, label="range")
    steps = _places(n, min(n, BINS))[1:]
    mean = running_mean(losses).numpy()[steps - 1]
    axes.plot(steps, mean, color=SERIES, linewidth=1.6, label="running mean")
    axes.set(xlabel="step", ylabel="loss")
    _finish(axes, values)


def _places(n: int, parts: int) -> np.ndarray:
    """Where 0..n is divided into parts, int64 ``(parts + 1,)``."""
    return np.linspace(0, n, parts + 1).round().astype(np.int64)


def _draw_over_time(axes: Axes, held_out: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    steps = [step for step, _ in held_out]
    sigmas = held_out[-1][1]["sigmas"]
    everything = [_finite(found["loss"]) for _, found in held_out]
    marker = "o" if len(steps) == 1 else None
    axes.plot(
        steps, everything, color=INK, linewidth=2, linestyle="--", marker=marker, label="mean"
    )
    levels = _some(range(len(sigmas)), LEVELS)
    for level, color in zip(levels, _scale(len(levels)), strict=True):
        values = [_finite(found["loss_by_level"][level]) for _, found in held_out]
        everything += values
        label = f"σ = {_number(sigmas[level])}"
        axes.plot(steps, values, color=color, linewidth=1.4, marker=marker, label=label)
    axes.set(xlabel="step", ylabel="held-out loss")
    _finish(axes, everything)


def _draw_by_level(axes: Axes, held_out: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    everything: list[float] = []
    times = _some(held_out, TIMES)
    for (step, found), color in zip(times, _scale(len(times)), strict=True):
        values = [_finite(loss) for loss in found["loss_by_level"]]
        everything += values
        axes.plot(found["sigmas"], values, color=color, linewidth=1.4, label=f"step {step:,}")
    axes.set(xlabel="σ of the level", ylabel="held-out loss", xscale="log")
    style.plain_ticks(axes.xaxis)
    _finish(axes, everything)


def _scale(n: int) -> list[str]:
    """Colours from one end of the scale to the other."""
    return [SCALE[-1]] if n == 1 else [SCALE[round(i * (LEVELS - 1) / (n - 1))] for i in range(n)]


def _finite(value: float | None) -> float:
    """A number for a curve, which has a gap where it is missing."""
    return math.nan if value is None else value


def _finish(axes: Axes, values: Iterable[float]) -> None:
    known = [value for value in values if math.isfinite(value)]
    if known and min(known) > 0:
        axes.set_yscale("log")
        style.plain_ticks(axes.yaxis)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    style.grid(axes)
    axes.figure.legend(loc="outside lower center", ncols=4, fontsize="small", handlelength=1.5)
