"""Documents whose figures come from results: marked blocks and the pictures beside them, filled and checked.

A block stands in a document between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, each on a line of its own. A
figure is a picture named ``KIND-FILE.png``: ``speedup-cpu.png`` is plotted from ``cpu.json``. The raw tables of
``cpu.json`` stand beside it in ``cpu.md``; the blocks show a few cases and link to them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ncsn_fast.files import write_atomically

from . import figures as plots
from .cases.official import PUBLISHED
from .comparisons import (
    COMPILE,
    EAGER,
    ENGINES,
    NETWORK,
    SAMPLE,
    Comparison,
    comparisons_of,
    device_title,
    duration,
    representative,
    speedup,
    two_digits,
)
from .report import load_runs, pictures_of, plain, render, short_table, summary_table, table
from .results import NOISY, Result, Run

# --- blocks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """What documents are filled from: the contents of ``benchmarks/results/``.

    Attributes:
        runs: benchmark results by the names of their files, CPUs first.
        demo: the numbers of the digits demo.
        points: those of the demos on points in the plane, by the names of their files.
        pages: where the raw tables of each of ``runs`` are.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    demo: dict[str, Any] | None = None
    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)

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
        pages = {path.stem: path.with_suffix(".md").as_posix() for path in results}
        return cls(load_runs(results), demo, points, pages)

    def seen_from(self, folder: Path) -> Sources:
        """The same, with the paths of the pages relative to a folder."""
        pages = {n: Path(os.path.relpath(p, folder)).as_posix() for n, p in self.pages.items()}
        return dataclasses.replace(self, pages=pages)

    def link(self, name: str) -> str:
        """A link to the raw tables of a run."""
        return f"[{name}]({self.pages[name]})"


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


@dataclass(frozen=True)
class _Device:
    """What was measured on a device: representative cases, and the files that hold them."""

    title: str
    files: dict[str, Run]
    cases: list[Comparison]

    @property
    def facts(self) -> str:
        rows = [run.results[0] for run in self.files.values()]
        versions, dates = sorted({r.torch for r in rows}), sorted({r.date for r in rows})
        return f"{self.title}, torch {', '.join(versions)}, {', '.join(dates)}"


def _files(sources: Sources) -> dict[str, dict[str, Run]]:
    """The runs of each device."""
    files: dict[str, dict[str, Run]] = {}
    for name, run in sources.runs.items():
        if run.results:
            files.setdefault(plain(device_title(run)), {})[name] = run
    return files


def _devices(sources: Sources, wanted: Callable[[Result], bool]) -> list[_Device]:
    """Each device with the cases that are wanted, in the order of SUITES."""
    devices = []
    for title, runs in _files(sources).items():
        cases = representative(r for run in runs.values() for r in run.results if wanted(r))
        cases.sort(key=lambda comparison: SUITES.index(comparison.case.suite))
        used = {n: run for n, run in runs.items() if any(wanted(r) for r in run.results)}
        devices.append(_Device(title, used, cases))
    return devices


SUITES = ("model", "train", "sample", "ops")
ELSEWHERE = "style transfer"  # the group of a network of other people
OTHER_NETWORKS = (ELSEWHERE, *PUBLISHED)
NOT_MEASURED = "Not measured yet on any device."


def summary(sources: Sources) -> str:
    """One table of our speed-ups on every device, at the smallest and the largest batch of each work."""
    devices = _devices(sources, lambda r: r.suite != "model" or r.group == NETWORK)
    if not devices:
        return NOT_MEASURED
    links = ", ".join(sources.link(name) for device in devices for name in device.files)
    return f"{_speed_ups(devices)}\n\n{SUMMARY_LEGEND}\nAll cases: {links}."


def headline(sources: Sources) -> str:
    """The same of the documented network alone: its pass, a training step, sampling."""
    groups = (NETWORK, "training", "sampling")
    devices = _devices(sources, lambda r: r.group in groups and r.name != "loop")
    devices = [device for device in devices if device.cases]
    return _speed_ups(devices) if devices else NOT_MEASURED


def _speed_ups(devices: Iterable[_Device]) -> str:
    groups = {}
    for device in devices:
        for dtype in dict.fromkeys(comparison.case.dtype for comparison in device.cases):
            cases = [comparison for comparison in device.cases if comparison.case.dtype == dtype]
            groups[f"{device.title}, {dtype}"] = cases
    return summary_table(groups)


SUMMARY_LEGEND = """\
Images of 32x32, of a preset of its size, operators of 128 channels. Of eager PyTorch the faster memory layout counts,
of `torch.compile` the fastest layout and mode. **Bold**: ours is slower; `~`: a noisy figure."""


def _cases(wanted: Callable[[Result], bool]) -> Block:
    """A block with a table for each device: the cases that are wanted."""

    def block(sources: Sources) -> str:
        parts = []
        for device in _devices(sources, wanted):
            if device.cases:
                links = ", ".join(sources.link(name) for name in device.files)
                parts += [short_table(device.cases), f"({device.facts}; all cases: {links})"]
            else:
                parts += [f"Not measured yet on {device.title}."]
        return "\n\n".join(parts) or NOT_MEASURED

    return block


def engines(sources: Sources) -> str:
    """For each device: the network's pass in inference engines, their times over ours, and all errors."""
    parts = []
    for title, files in _files(sources).items():
        cases = comparisons_of(r for run in files.values() for r in run.results)
        cases = [c for c in cases if c.ours() and c.best(*c.engine_families)]
        if not cases:
            continue
        families = [EAGER, COMPILE, *(name for name in ENGINES if any(c.of(name) for c in cases))]
        rows = [
            (c.case.shape, c.case.setting, _timed(c.ours()), *(_behind(c, f) for f in families))
            for c in cases
        ]
        header = ("shape", "", "ours", *families)
        used = {n: run for n, run in files.items() if any(c.case in run.results for c in cases)}
        facts = _Device(title, used, cases).facts
        versions = sorted(
            {c.best(n).backend for c in cases for n in c.engine_families if c.best(n)}
        )
        links = ", ".join(sources.link(name) for name in used)
        parts += [table(header, rows), f"({facts}; {', '.join(versions)}; all rows: {links})"]
    return "\n\n".join(parts) or NOT_MEASURED


def _timed(result: Result) -> str:
    noise = "~" if result.status == NOISY else ""
    return f"{noise}{duration(result.median_us)} ({result.error:.0e})"


def _behind(comparison: Comparison, family: str) -> str:
    """How many times as long as ours it takes, and its error."""
    other = comparison.best(family)
    ratio = speedup(comparison.ours(), other)
    if ratio is None:
        return "–"
    text = f"{'~' if ratio[1] else ''}{two_digits(ratio[0])}x"
    return f"{f'**{text}**' if ratio[0] < 1 else text} ({other.error:.0e})"


Block = Callable[[Sources], str]
BLOCKS: dict[str, Block] = {
    "demo": demo,
    "points": points,
    "summary": summary,
    "headline": headline,
    "operators": _cases(lambda r: r.suite == "ops"),
    "network": _cases(lambda r: r.suite in ("model", "train") and r.group not in OTHER_NETWORKS),
    "engines": engines,
    "official": _cases(lambda r: r.group in PUBLISHED),
    "elsewhere": _cases(lambda r: r.group == ELSEWHERE),
    "sampling": _cases(lambda r: r.suite == SAMPLE and r.group not in OTHER_NETWORKS),
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
    """Writes blocks of documents, the pictures that they show and the raw tables, where these are not up to date.

    A picture is up to date if the hash that it carries is that of the data: how it looks depends on matplotlib. To have
    one made anew, delete it.

    Args:
        documents: Markdown files.
        files: of results; see :meth:`Sources.load`. The raw tables of ``NAME.json`` are ``NAME.md`` beside it.
        images: the folder of the pictures.
        check: write nothing.

    Returns:
        The documents, pictures and tables that were out of date.

    Raises:
        ValueError: see :func:`fill`; or a document shows a picture that the results cannot give.
    """
    sources = Sources.load(files)
    pictures = pictures_of(sources.runs)
    texts: dict[Path, str] = {}
    stale: dict[Path, None] = {}
    for document in documents:
        before = document.read_text(encoding="utf-8")
        texts[document] = fill(before, sources.seen_from(document.parent))
        if texts[document] != before:
            stale[document] = None
        for picture in _figures_shown(document, texts[document], images):
            if picture.name not in pictures:
                names = ", ".join(pictures) or "none"
                raise ValueError(
                    f"{document} shows {picture.name}, which no results give; there are: {names}"
                )
            kind, name = pictures[picture.name]
            if plots.fingerprint_in(picture) != plots.fingerprint(kind, sources.runs[name]):
                stale[picture] = None
    for name, run in sources.runs.items():
        page = Path(sources.pages[name])
        texts[page] = render({name: run}, {})
        if not page.is_file() or page.read_text(encoding="utf-8") != texts[page]:
            stale[page] = None
    for path in stale if not check else ():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path in texts:
            write_atomically(path, texts[path].encode())
        else:
            kind, name = pictures[path.name]
            plots.plot(kind, sources.runs[name], path)
    return list(stale)


def _figures_shown(document: Path, text: str, images: Path) -> list[Path]:
    """The pictures in a document that are ours to make, by folder and name."""
    links = (link for link in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text) if "://" not in link)
    return [
        images / Path(link).name
        for link in links
        if (document.parent / link).resolve().parent == images.resolve()
        and Path(link).name.partition("-")[0] in plots.FIGURES
    ]
