"""Documents whose figures come from results: marked blocks and the pictures beside them, filled and checked.

A block stands in a document between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, each on a line of its own. A
figure is a picture named ``KIND-FILE.png``: ``speedup-cpu.png`` is drawn from ``cpu.json``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import figures as plots
from .comparisons import (
    COMPILE,
    EAGER,
    NETWORK,
    SAMPLE,
    comparisons_of,
    device_title,
    representative,
)
from .report import (
    GROWTH,
    case_table,
    growth_tables,
    load_runs,
    pictures_of,
    plain,
    speedup_cell,
    summary_table,
    table,
    time_cell,
)
from .results import Result, Run

# --- blocks ---------------------------------------------------------------------------------------

SHORT_LEGEND = (
    "(Medians ± half the distance between the quartiles, all peers in turns; `~`: noisy; *vs*: how many times as fast "
    "as the fastest eager or compiled peer, **bold** if slower; *limit*: a large copy or matrix product in the run.)"
)


@dataclass(frozen=True)
class Sources:
    """What documents are filled from: the contents of ``benchmarks/results/``.

    Attributes:
        runs: benchmark results by the names of their files, CPUs first.
        demo: the numbers of the digits demo.
        points: those of the demos on points in the plane, by the names of their files.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    demo: dict[str, Any] | None = None
    points: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, files: Iterable[Path]) -> Sources:
        """Takes each .json for what it holds; what is neither results nor a demo's is left out.

        Raises:
            ValueError: a file is no JSON, or is damaged; names it.
        """
        results, demo, points = [], None, {}
        for path in files:
            if path.suffix != ".json":
                continue
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is no JSON: {error}") from error
            if isinstance(held, dict) and isinstance(held.get("results"), list):
                results.append(path)
            elif isinstance(held, dict) and "frechet_samples" in held:
                demo = held
            elif isinstance(held, dict) and "relative_error_by_level" in held:
                points[path.stem] = held
        return cls(load_runs(results), demo, points)


def demo(sources: Sources) -> str:
    """The numbers of the digits demo."""
    run = sources.demo
    if run is None:
        return "Not measured yet."
    if run["resumed"]:
        raise ValueError("the demo was resumed: its seconds are not those of the training")
    rows = [
        ("samples", f"{run['frechet_samples']:.2f}", f"{run['nearest_samples']:.2f}"),
        ("real digits", f"{run['frechet_training']:.2f}", f"{run['nearest_heldout']:.2f}"),
        ("uniform noise", f"{run['frechet_noise']:.1f}", ""),
    ]
    distances = "Frechet distance to held-out digits", "nearest training digit (median distance)"
    facts = (
        f"({run['samples']} samples, {run['iterations']} training steps in "
        f"{run['training_seconds']:.0f} s, sampled in {run['sampling_seconds']:.0f} s; "
        f"{run['device']}, {run['threads']} threads, torch {run['torch']}; "
        "`benchmarks/results/demo-digits.json`)"
    )
    return f"{table(('', *distances), rows)}\n\n{facts}"


SHARES = {
    "mode_weights": "samples nearest to either Gaussian",
    "share_in_dark_squares": "samples in the dark squares",
}


def points(sources: Sources) -> str:
    """For each demo on points: the learned score's relative error by level, and where the samples lie."""
    parts = []
    for name, run in sorted(sources.points.items()):
        header = ["sigma", *(f"{sigma:.3g}" for sigma in run["sigmas"])]
        row = ["error of the score", *(f"{error:.1%}" for error in run["relative_error_by_level"])]
        parts += [table(header, [row])]
        for key, meaning in SHARES.items():
            if key in run:
                shares = run[key], run[f"{key}_of_data"]
                ours, data = (
                    ", ".join(f"{share:.1%}" for share in (of if isinstance(of, list) else [of]))
                    for of in shares
                )
                parts += [
                    f"({run['samples']} {meaning}: {ours}; of the data: {data}. Trained in "
                    f"{run['training_seconds']:.0f} s, sampled in {run['sampling_seconds']:.1f} s; "
                    f"`benchmarks/results/{name}.json`)"
                ]
    return "\n\n".join(parts) or "Not measured yet."


def langevin(sources: Sources) -> str:
    """The Langevin step on a CPU: eager's time, and how many times as fast the others are."""
    parts = []
    for name, run in sources.runs.items():
        found = comparisons_of(r for r in run.results if r.group == "langevin_step_")
        if found and found[0].case.device == "cpu":
            rows = []
            for comparison in found:
                eager, others = comparison.best(EAGER), (COMPILE, "native")
                gains = [speedup_cell(comparison.best(other), eager) for other in others]
                rows.append(
                    [comparison.case.shape, time_cell(comparison.of(EAGER), layout=False), *gains]
                )
            header = "state", "eager", "torch.compile", "native"
            parts += [table(header, rows), f"({_source(name, run)}, {found[0].case.dtype})"]
    return "\n\n".join(parts) or "Not measured yet on a CPU."


def summary(sources: Sources) -> str:
    """Our speed-ups on every device, at the smallest and the largest batch of each work."""
    return _each_run(sources, _summary_of, SUMMARY_LEGEND)


SUMMARY_LEGEND = (
    "(Times as fast as the fastest eager layout, and as the fastest layout and mode of `torch.compile`; 32x32, 128 "
    "channels. **Bold**: slower; `~`: noisy.)"
)


def _summary_of(run: Run) -> list[str]:
    found = representative(run.results)
    dtypes = dict.fromkeys(comparison.case.dtype for comparison in found)
    parts = []
    for dtype in dtypes:
        parts += [f"{dtype}:"] if len(dtypes) > 1 else []
        parts += [
            summary_table([comparison for comparison in found if comparison.case.dtype == dtype])
        ]
    return parts


def _cases(wanted: Callable[[Result], bool], *, by_layout: bool = False) -> Block:
    """A block with the table of the cases that are wanted."""

    def tables(run: Run) -> list[str]:
        found = comparisons_of(result for result in run.results if wanted(result))
        return [case_table(found, by_layout=by_layout)] if found else []

    return lambda sources: _each_run(sources, tables, SHORT_LEGEND)


def _each_run(sources: Sources, tables: Callable[[Run], list[str]], legend: str) -> str:
    """What there is for each file under its name; a line for each device that no file has it for."""
    parts, devices, measured = [], {}, set()
    for name, run in sources.runs.items():
        device = plain(device_title(run)) if run.results else f"`{name}`"
        devices[device] = None
        found = tables(run)
        if found:
            measured.add(device)
            parts += [f"**{_source(name, run)}**", *found]
    parts += [legend] if parts else []
    parts += [f"Not measured yet on {device}." for device in devices if device not in measured]
    return "\n\n".join(parts) or "Not measured yet on any device."


def _source(name: str, run: Run) -> str:
    file = f"`benchmarks/results/{name}.json`"
    if not run.results:
        return file
    row = run.results[0]
    return f"{plain(device_title(run))}, torch {row.torch}, commit {row.commit}, {row.date}, {file}"


Block = Callable[[Sources], str]
BLOCKS: dict[str, Block] = {
    "demo": demo,
    "points": points,
    "langevin": langevin,
    "summary": summary,
    "norm": _cases(lambda r: r.group == "cond_instance_norm_elu", by_layout=True),
    "pool": _cases(lambda r: r.group == "max_pool5", by_layout=True),
    "conv": _cases(lambda r: r.group == "norm_elu_conv3x3", by_layout=True),
    "layers": _cases(lambda r: r.suite == "model" and r.group != NETWORK),
    "forward": _cases(lambda r: r.group == NETWORK),
    "training": _cases(lambda r: r.suite == "train"),
    "sampling": _cases(lambda r: r.suite == SAMPLE),
    "scaling": lambda sources: _each_run(sources, growth_tables, f"({GROWTH})"),
}


def fill(text: str, sources: Sources) -> str:
    """A document with every marked block written anew.

    Raises:
        ValueError: a block of a name that is not in BLOCKS, or one that does not end.
    """
    names = re.findall(r"^<!-- begin (\S+) -->$", text, flags=re.M)
    for name, begun in Counter(names).items():
        if name not in BLOCKS:
            raise ValueError(f"no block is named {name!r}; there are {', '.join(BLOCKS)}")
        block = BLOCKS[name](sources)
        pattern = rf"^(<!-- begin {name} -->\n).*?^(<!-- end {name} -->)$"
        text, filled = re.subn(
            pattern, lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.M | re.S
        )
        if filled != begun:
            raise ValueError(f"the block {name!r} does not end with <!-- end {name} -->")
    return text


# --- files ----------------------------------------------------------------------------------------


def update(
    documents: Iterable[Path], files: Iterable[Path], images: Path, check: bool
) -> list[Path]:
    """Fills the blocks of documents and draws the figures that they show, where these are not up to date.

    A figure is up to date if the hash that it carries is that of the data: how it looks depends on matplotlib. To have
    one drawn anew, delete it.

    Args:
        documents: Markdown files.
        files: of results; see :meth:`Sources.load`.
        images: the folder of the figures.
        check: write nothing.

    Returns:
        The documents and figures that were out of date.

    Raises:
        ValueError: see :func:`fill`; or a document shows a figure that the results cannot give.
    """
    sources = Sources.load(files)
    pictures = pictures_of(sources.runs)
    stale: dict[Path, None] = {}
    for document in documents:
        text = document.read_text(encoding="utf-8")
        filled = fill(text, sources)
        if filled != text:
            stale[document] = None
            if not check:
                document.write_text(filled, encoding="utf-8")
        for picture in _figures_shown(document, filled, images):
            if picture.name not in pictures:
                names = ", ".join(pictures) or "none"
                raise ValueError(
                    f"{document} shows {picture.name}, which no results give; there are: {names}"
                )
            kind, name = pictures[picture.name]
            if plots.fingerprint_in(picture) != plots.fingerprint(kind, sources.runs[name]):
                stale[picture] = None
                if not check:
                    images.mkdir(parents=True, exist_ok=True)
                    plots.plot(kind, sources.runs[name], picture)
    return list(stale)


def _figures_shown(document: Path, text: str, images: Path) -> list[Path]:
    """The pictures in a document that are ours to draw, by folder and name."""
    links = (link for link in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text) if "://" not in link)
    return [
        images / Path(link).name
        for link in links
        if (document.parent / link).resolve().parent == images.resolve()
        and Path(link).name.partition("-")[0] in plots.FIGURES
    ]
