"""Markdown from results: tables, and a report of everything that files hold.

Belongs here: how a cell, a table and a report look. Does not belong here: what of the results is shown
(``comparisons.py``), plots (``figures.py``), the project's own documents (``documents.py``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ncsn_fast.files import write_atomically

from . import figures as plots
from .comparisons import (
    AXES,
    COMPILE,
    EAGER,
    SAMPLE,
    UNSTEADY,
    Comparison,
    Series,
    comparisons_of,
    device_title,
    digits,
    duration,
    family,
    per_image,
    rate,
    series,
    speedup,
    two_digits,
    unit_of,
    variables,
)
from .measure import NOISY_LOAD, NOISY_SPREAD
from .results import FAILED, NOISY, NOT_RUN, WRONG, Result, Run, fastest, load

LAYOUTS = {"contiguous": "NCHW", "channels_last": "NHWC"}
SUITES = {"ops": "Operators", "model": "Network", "train": "Training", "sample": "Sampling"}
ABSENT = "–"
GAINS = ("vs eager", "vs compile", "vs engine")  # over Comparison.others
LEGEND = f"""\
- A time is the median of rounds in which all peers of a case took turns, ± half the distance between the quartiles.
  `~` marks a noisy figure: the quartiles lie {NOISY_SPREAD:.0%} of the median apart or more, or other processes used
  over {NOISY_LOAD:.0%} of the CPUs. Do not rely on it.
- *eager* is PyTorch as it is, *compile* is `torch.compile` (its mode is named unless it is the default), *native* and
  *triton* are kernels of this library, *ncsn_fast* is its network with the fastest of them, *reference* is its plain
  PyTorch, shown where there is no kernel.
- NCHW is the contiguous layout, NHWC is channels_last. Operators have a line for each layout; elsewhere, and in the
  speed-ups, the faster layout of each peer counts. Of several modes the fastest is shown.
- *vs eager*, *vs compile*: how many times as fast the fastest of ours is as the fastest eager or compiled peer.
  **Bold**: ours is slower.
- *rate (of limit)*: of ours, the bytes that must be moved at the least (B/s), or the operations of the direct algorithm
  (FLOP/s), over the time; in brackets its share of what a large copy, or a large matrix product, reached in the same
  run. Over 100% the operands stayed in the cache, or the algorithm needs fewer operations than the direct one.
- *peak memory*: what a call of ours took at most beyond what was held before; in brackets, what eager took.
- *wrong*, *failed*, *not run*: there is no time; the reasons are listed at the end. {ABSENT}: there is no such peer."""

ENGINES = """\
- *onnxruntime*, *openvino*, *opencv*, *ncnn* and *mnn* are inference engines, in processes of their own, given the
  network as ONNX with its labels folded in; *vs engine* is over the fastest of them. *off*: the relative L2
  distance from a float64 evaluation."""

# --- cells ----------------------------------------------------------------------------------------


def time_text(result: Result) -> str:
    """Median and spread."""
    unit, scale = unit_of(result.median_us)
    median, spread = result.median_us / scale, result.spread_us / scale
    return f"{mark(result)}{digits(median)} {unit} ±{digits(spread, 2)}"


def mark(*results: Result) -> str:
    return "~" if any(result.status == NOISY for result in results) else ""


def time_cell(results: Sequence[Result], *, layout: bool = True, error: bool = False) -> str:
    """The fastest of them with its layout and mode, and its error; if none has a time, why."""
    best = fastest(results)
    if best is None:
        statuses = {result.status for result in results}
        return next((s for s in (WRONG, FAILED, NOT_RUN) if s in statuses), ABSENT)
    mode = best.peer.removeprefix(family(best.peer))
    text = time_text(best) + (f" {_layout(best)}" if layout else "") + mode
    return f"{text}, {best.error:.0e} off" if error and best.error is not None else text


def short_time_cell(results: Sequence[Result]) -> str:
    """The time of the fastest of them alone; if none has a time, why."""
    best = fastest(results)
    return mark(best) + duration(best.median_us) if best else time_cell(results)


def speedup_cell(ours: Result | None, other: Result | None) -> str:
    """Such as 2.6x; bold if slower."""
    gain = speedup(ours, other)
    if gain is None:
        return ABSENT
    text = f"{mark(ours, other)}{two_digits(gain[0])}x"
    return f"**{text}**" if gain[0] < 1 else text


def rate_cell(result: Result | None) -> str:
    """GB/s or GFLOP/s, and the share of the limit."""
    if result is None or result.gflop_per_s is result.gb_per_s is None:
        return ABSENT
    if result.gflop_per_s is not None:
        text = rate(result.gflop_per_s, "FLOP/s")
    else:
        text = rate(result.gb_per_s, "B/s")
    share = result.limit_share
    if share is not None:
        text += f" ({share:.0%})" if share > 0.095 else f" ({100 * share:.1g}%)"
    return mark(result) + text


def memory_cell(ours: Result | None, eager: Result | None) -> str:
    texts = [
        ABSENT if r is None or r.memory_mib is None else f"{digits(r.memory_mib)} MiB"
        for r in (ours, eager)
    ]
    return ABSENT if texts[0] == ABSENT else f"{texts[0]} ({texts[1].removesuffix(' MiB')})"


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\|*_`<\[])", r"\\\1", " ".join(text.split()))


def _layout(result: Result) -> str:
    return LAYOUTS.get(result.layout, result.layout)


# --- tables ---------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table without the columns that are empty; all but the first ``texts`` are aligned to the right."""
    rows = [list(row) for row in rows]
    kept = [i for i in range(len(header)) if any(row[i] not in ("", ABSENT) for row in rows)]
    line = ["---" if i < texts else "---:" for i in range(len(header))]
    lines = (" | ".join(row[i] for i in kept) for row in (header, line, *rows))
    return "\n".join(f"| {text} |" for text in lines)


def case_table(cases: Sequence[Comparison], *, by_layout: bool = False) -> str:
    """A line for each case, or for each layout of each case."""
    found = (name for c in cases for name in (*c.engine_families, *c.our_families))
    peers = list(dict.fromkeys((EAGER, COMPILE, *found)))
    header = ["", "shape", "dtype", "layout"]
    header += [*peers, *GAINS, "rate (of limit)", "peak memory (eager)"]
    rows = []
    for comparison in cases:
        case, others = comparison.case, comparison.others()
        how = {"layout": not by_layout, "error": bool(comparison.engine_families)}
        for layout in dict.fromkeys(r.layout if by_layout else None for r in comparison.results):
            ours = comparison.ours(layout)
            rows.append(
                [
                    case.name,
                    case.shape,
                    f"{case.dtype} {case.setting}".strip(),
                    LAYOUTS.get(layout, layout or ""),
                    *(time_cell(comparison.of(name, layout=layout), **how) for name in peers),
                    *(speedup_cell(ours, other) for other in others),
                    rate_cell(ours),
                    memory_cell(ours, others[0]),
                ]
            )
    return table(header, rows, texts=4)


def short_table(cases: Sequence[Comparison]) -> str:
    """A line for each case, without spreads, layouts and modes, which :func:`case_table` has."""
    header = ["", "shape", "dtype", EAGER, COMPILE, "engine", "ours", *GAINS]
    rows = []
    for comparison in cases:
        case, ours = comparison.case, comparison.ours()
        peers = ((EAGER,), (COMPILE,), comparison.engine_families, comparison.our_families)
        times = [short_time_cell(comparison.of(*families)) for families in peers]
        if (engine := comparison.others()[-1]) is not None:
            times[2] += f" {engine.peer}"
        gains = (speedup_cell(ours, other) for other in comparison.others())
        rates = rate_cell(ours), memory_cell(ours, comparison.best(EAGER))
        dtype = f"{case.dtype} {case.setting}".strip()
        rows.append([f"`{case.group}` {case.name}", case.shape, dtype, *times, *gains, *rates])
    return table([*header, "rate (of limit)", "memory (eager)"], rows, texts=3)


def summary_table(groups: Mapping[str, Sequence[Comparison]]) -> str:
    """A line for each work: our speed-ups at its smallest and at its largest batch; the groups under their names."""
    rows = []
    for name, cases in groups.items():
        works: dict[str, list[Comparison]] = {}
        for comparison in cases:
            work = f"`{comparison.case.group}` {comparison.case.name}"
            works.setdefault(work, []).append(comparison)
        rows.append([f"**{name}**", *(6 * [""])])
        for work, found in works.items():
            ends = found[0], found[-1] if len(found) > 1 else None
            rows.append([work, *(cell for comparison in ends for cell in _gains(comparison))])
    return table(["", *(2 * ["batch", "vs eager", "vs compile"])], rows)


def _gains(comparison: Comparison | None) -> tuple[str, str, str]:
    if comparison is None:
        return ABSENT, ABSENT, ABSENT
    ours, n = comparison.ours(), str(variables(comparison.case)["batch"])
    return n, *(speedup_cell(ours, comparison.best(name)) for name in (EAGER, COMPILE))


def growth_table(series: Series) -> str:
    """A line for each size: time per image, and how it stands to what is in proportion to the first."""
    names, per = series.families, "per image"
    if series.case.suite == SAMPLE:
        per += " and step"
    growths, turns = ({n: f(n) for n in names} for f in (series.growth, series.turns))
    lines = {name: series.line(name) for name in names}
    header = [
        series.axis,
        *(cell for name in names for cell in (f"{name}, {per}", "of linear")),
    ]
    rows = []
    for value in series.points:
        row = [str(value)]
        for name in names:
            result = lines[name].get(value)
            if result is None:
                row += [ABSENT, ABSENT]
                continue
            turn = turns[name].get(value)
            arrow = "" if turn is None else " ↑" if turn > 1 else " ↓"
            row += [
                mark(result) + duration(per_image(result)),
                f"{mark(result)}{two_digits(growths[name][value])}{arrow}",
            ]
        rows.append(row)
    return table(header, rows)


# --- a report -------------------------------------------------------------------------------------


def render(runs: Mapping[str, Run], figures: Mapping[str, Sequence[Path]]) -> str:
    """A report of everything that the files hold.

    Args:
        runs: by the names of their files.
        figures: the pictures of each, relative to the report.
    """
    engines = any(c.engine_families for run in runs.values() for c in comparisons_of(run.results))
    legend = f"{LEGEND}\n{ENGINES}" if engines else LEGEND
    parts = ["# Benchmarks", "## How to read this", legend]
    for name, run in runs.items():
        parts += _one_run(name, run, figures.get(name, ()))
    return "\n\n".join(parts) + "\n"


def _one_run(name: str, run: Run, pictures: Sequence[Path]) -> list[str]:
    if not run.results:
        return [f"## `{name}`", "This file holds no results."]
    cases = comparisons_of(run.results)
    parts = [f"## `{name}`: {plain(device_title(run))}", _facts(run)]
    parts += [f"**Warning:** {plain(warning)}" for warning in run.warnings]
    parts += [_in_short(run, cases)]
    parts += [f"![{plots.FIGURES[p.name.split('-')[0]].title}]({p.as_posix()})" for p in pictures]
    for suite, title in SUITES.items():
        groups = dict.fromkeys(c.case.group for c in cases if c.case.suite == suite)
        for i, group in enumerate(groups):
            parts += [f"### {title}"] if i == 0 else []
            found = [c for c in cases if (c.case.suite, c.case.group) == (suite, group)]
            parts += [f"#### `{group}`", case_table(found, by_layout=suite == "ops")]
    growth = growth_tables(run)
    parts += ["### Growth", GROWTH, *growth] if growth else []
    return [*parts, "### Wrong, failed and not run", _not_timed(cases)]


def _facts(run: Run) -> str:
    row = run.results[0]
    facts = {
        "device": f"{row.device_name} ({row.device})",
        "threads": str(row.threads),
        "platform": str(run.machine.get("platform", "")),
        "Python": str(run.machine.get("python", "")),
        "torch": row.torch,
        "triton": row.triton,
        "ncsn_fast": f"{row.ncsn_fast}, commit {row.commit}",
        "date": row.date,
    }
    if not run.limits:
        facts["limits"] = "not in this file"
    facts |= {f"measured limit: {key}": f"{value:,.4g}" for key, value in run.limits.items()}
    return table(("", ""), ([key, plain(fact)] for key, fact in facts.items() if fact), texts=2)


def _in_short(run: Run, cases: Sequence[Comparison]) -> str:
    count = Counter(result.status for result in run.results)
    kinds = ", ".join(f"{n} {status}" for status, n in count.items())
    lines = [f"Cases: {len(cases)}. Rows: {len(run.results)} ({kinds})."]
    for name in (EAGER, COMPILE):
        gains = [speedup(c.ours(), c.best(name)) for c in cases]
        gains = [gain for gain, _ in filter(None, gains)]
        if gains:
            faster = sum(gain > 1 for gain in gains)
            lines.append(
                f"Ours is faster than the fastest {name} peer in {faster} of {len(gains)} where both were timed."
            )
    return " ".join(lines)


def _not_timed(cases: Sequence[Comparison]) -> str:
    """A line for each case, status and reason, with the peers it holds for."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for comparison in cases:
        for r in comparison.results:
            if r.status in (WRONG, FAILED, NOT_RUN):
                parts = (r.group, r.name, r.shape, r.dtype, r.setting)
                case = " ".join(part for part in parts if part)
                lines.setdefault((r.status, case, r.note), []).append(f"{r.peer} {_layout(r)}")
    listed = [
        f"- **{status}** {plain(case)}: {plain(', '.join(peers))}: {plain(note)}"
        for (status, case, note), peers in lines.items()
    ]
    return "\n".join(listed) or "None: every peer of every case was right, and was timed."


GROWTH = (
    "*of linear*: the time over what it would be in proportion to the first line, where the work grows with the batch, "
    "the levels and the steps, and with the square of the resolution and of the width. ↑ and ↓ mark where the time "
    f"per unit of work rises or falls by over {UNSTEADY:.0%}; between the marks it is constant."
)


def growth_tables(run: Run) -> list[str]:
    parts = []
    for axis in AXES:
        for one in series(run.results, axis, least=3):
            if one.families:
                what = f"{one.case.group} {one.case.name}"
                parts += [f"**{what}, by {axis}** ({one.title})", growth_table(one)]
    return parts


# --- files ----------------------------------------------------------------------------------------


def write(files: Sequence[Path], out: Path) -> list[Path]:
    """Writes ``report.md`` and its figures into a folder.

    Args:
        files: .json or .csv of results; only a .json holds the limits and the facts of the machine.
        out: the folder; it is made.

    Returns:
        What was written, the report first.

    Raises:
        ValueError: a file holds no results, or two have one name.
        ImportError: matplotlib is not installed.
    """
    runs = load_runs(files)
    out.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, list[Path]] = {}
    for picture, (kind, name) in pictures_of(runs).items():
        pictures.setdefault(name, []).append(plots.plot(kind, runs[name], out / picture))
    report = out / "report.md"
    beside = {name: [Path(path.name) for path in paths] for name, paths in pictures.items()}
    write_atomically(report, render(runs, beside).encode())
    return [report, *(path for paths in pictures.values() for path in paths)]


def load_runs(files: Iterable[Path]) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for path in files:
        if path.stem in runs:
            raise ValueError(
                f"two files are named {path.stem}: figures and sections would be mixed up"
            )
        runs[path.stem] = load(path)

    def order(item: tuple[str, Run]) -> tuple[bool, str]:
        return any(result.device != "cpu" for result in item[1].results), item[0]

    return dict(sorted(runs.items(), key=order))


def pictures_of(runs: Mapping[str, Run]) -> dict[str, tuple[str, str]]:
    """Names of pictures, each with the kind of its figure and the name of its run."""
    return {
        f"{kind}-{name}.png": (kind, name)
        for name, run in runs.items()
        for kind, figure in plots.FIGURES.items()
        if run.results and figure.data(run)
    }
