"""Results as comparisons: peers of a case by family, representative cases, series of cases, numbers as text.

Belongs here: what tables and plots have in common. Does not belong here: how either looks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .results import NOISY, Result, Run, case_groups, fastest

EAGER, COMPILE, REFERENCE = "eager", "compile", "reference"
# What a peer's name begins with; PyTorch's own first, then other engines, then ours.
OURS = ("native", "triton", "ncsn_fast", "ncsn_fast + compile", REFERENCE)
# Of other makers, which ``ncsn-fast bench --peers`` measures.
ENGINES = ("onnxruntime", "openvino", "opencv", "ncnn", "mnn")
FAMILIES = (EAGER, COMPILE, *ENGINES, *OURS)
NETWORK = "network"  # the group whose growth is looked at
SAMPLE = "sample"  # the suite, the same
UNSTEADY = 0.1  # by how much a time per unit may change and still count as constant

# --- one case -------------------------------------------------------------------------------------


def family(peer: str) -> str:
    """The longest name of FAMILIES that the peer's begins with: "compile max-autotune" is of "compile"."""
    return max((name for name in FAMILIES if peer.startswith(name)), key=len, default=peer)


@dataclass(frozen=True)
class Comparison:
    """All peers of one case."""

    results: tuple[Result, ...]

    @property
    def case(self) -> Result:
        """Any of the rows, for what they have in common."""
        return self.results[0]

    @property
    def families(self) -> list[str]:
        found = {family(r.peer) for r in self.results}
        return [name for name in FAMILIES if name in found] + sorted(found - set(FAMILIES))

    @property
    def our_families(self) -> list[str]:
        """What is of no other maker; the reference only where an operator has no kernel."""
        ours = [name for name in self.families if name not in (EAGER, COMPILE, *ENGINES)]
        return [name for name in ours if name != REFERENCE] or ours

    @property
    def engine_families(self) -> list[str]:
        """Inference engines."""
        return [name for name in self.families if name in ENGINES]

    def of(self, *families: str, layout: str | None = None) -> list[Result]:
        return [
            r for r in self.results if family(r.peer) in families and layout in (None, r.layout)
        ]

    def best(self, *families: str, layout: str | None = None) -> Result | None:
        return fastest(self.of(*families, layout=layout))

    def ours(self, layout: str | None = None) -> Result | None:
        return self.best(*self.our_families, layout=layout)

    def others(self) -> tuple[Result | None, ...]:
        """What ours is compared with: the fastest eager and compiled peers, and the fastest engine."""
        return self.best(EAGER), self.best(COMPILE), self.best(*self.engine_families)


def comparisons_of(results: Iterable[Result]) -> list[Comparison]:
    """The results by case, in their order."""
    return [Comparison(tuple(rows)) for rows in case_groups(results).values()]


def speedup(ours: Result | None, other: Result | None) -> tuple[float, bool] | None:
    """How many times as fast ours is, and whether either is noisy; None if either was not timed."""
    if ours is None or other is None:
        return None
    return other.median_us / ours.median_us, NOISY in (ours.status, other.status)


def variables(result: Result) -> dict[str, Any]:
    """What can vary from case to case: batch, channels, resolution and all of the setting; ``nf`` is the width."""
    batch, channels, *size = (int(n) for n in result.shape.split("x"))
    pairs = (part.partition("=") for part in result.setting.split())
    setting = {key: int(value) if value.isdigit() else value for key, _, value in pairs}
    if "nf" in setting:
        setting["width"] = setting.pop("nf")
    resolution = {"resolution": size[0]} if size else {}
    return {"batch": batch, "channels": channels} | resolution | setting


def representative(results: Iterable[Result]) -> list[Comparison]:
    """The smallest and the largest batch of each work and dtype, at the sizes of the documented network."""
    works: dict[tuple[str, ...], list[Comparison]] = {}
    for comparison in comparisons_of(results):
        case = comparison.case
        works.setdefault((case.suite, case.group, case.name, case.dtype), []).append(comparison)
    chosen = []
    for work in works.values():
        usual = [comparison for comparison in work if is_usual(comparison.case)] or work
        by_batch = {
            variables(comparison.case)["batch"]: comparison for comparison in reversed(usual)
        }
        chosen += [by_batch[n] for n in sorted({min(by_batch), max(by_batch)})]
    return chosen


def is_usual(case: Result) -> bool:
    """32x32, images or 128 channels, 128 wide, not dilated."""
    has = variables(case)
    sizes = has.get("resolution") == 32 and has["channels"] in (3, 128)
    return sizes and has.get("width", 128) == 128 and has.get("dilation", 1) == 1


# --- numbers --------------------------------------------------------------------------------------


def digits(value: float, count: int = 3) -> str:
    """A number to so many digits, without an exponent."""
    return f"{float(f'{value:.{count}g}'):,.10g}"


def duration(us: float) -> str:
    """A time in the unit that suits it."""
    unit, scale = unit_of(us)
    return f"{digits(us / scale)} {unit}"


def two_digits(ratio: float) -> str:
    """At the least: 0.21, 3.0, 13, 134."""
    return f"{ratio:.{max(0, 1 - math.floor(math.log10(ratio)))}f}"


def rate(giga: float, unit: str) -> str:
    """Giga- or tera-something a second."""
    return f"{digits(giga / 1e3)} T{unit}" if giga >= 1e3 else f"{digits(giga)} G{unit}"


def unit_of(us: float) -> tuple[str, float]:
    """The unit of a time, and its microseconds."""
    return next(((u, s) for u, s in (("s", 1e6), ("ms", 1e3)) if us >= 0.9995 * s), ("µs", 1.0))


def per_image(result: Result) -> float:
    """Microseconds for an image; in sampling, for an image and step."""
    has = variables(result)
    passes = has["levels"] * has["steps"] if result.suite == SAMPLE else 1
    return result.median_us / has["batch"] / passes


# --- series ---------------------------------------------------------------------------------------

# What can grow, and with which power of it the work does.
AXES = {"batch": 1, "resolution": 2, "width": 2, "levels": 1, "steps": 1}


@dataclass(frozen=True)
class Series:
    """Cases that differ in one thing, the smallest first."""

    axis: str
    points: dict[int, Comparison]

    @property
    def case(self) -> Result:
        """Any row, for what does not vary."""
        return next(iter(self.points.values())).case

    @property
    def title(self) -> str:
        """What does not vary."""
        has = {k: v for k, v in variables(self.case).items() if k not in (self.axis, "channels")}
        size = has.pop("resolution", None)
        parts = [f"{size}x{size}"] if size else []
        parts += [f"{'nf' if key == 'width' else key}={value}" for key, value in has.items()]
        return ", ".join([self.case.dtype, *parts])

    @property
    def families(self) -> list[str]:
        """Those timed in two points or more."""
        names = dict.fromkeys(
            name for comparison in self.points.values() for name in comparison.families
        )
        return [name for name in names if len(self.line(name)) > 1]

    def line(self, name: str) -> dict[int, Result]:
        """The fastest of a family in each point that it has a time in."""
        best = {value: comparison.best(name) for value, comparison in self.points.items()}
        return {value: result for value, result in best.items() if result is not None}

    def growth(self, name: str) -> dict[int, float]:
        """Time per unit of work over that of the first point: 1 all along is linear."""
        line = self.line(name)
        first, start = next(iter(line.items()))
        work = {value: (value / first) ** AXES[self.axis] for value in line}
        return {v: r.median_us / start.median_us / work[v] for v, r in line.items()}

    def turns(self, name: str) -> dict[int, float]:
        """Where the time per unit stops being constant: what it is there over what it was before."""
        found, level = {}, 1.0
        for value, growth in self.growth(name).items():
            if abs(growth / level - 1) > UNSTEADY:
                found[value], level = growth / level, growth
        return found


def series(results: Iterable[Result], axis: str, least: int = 2) -> list[Series]:
    """All series of at least so many points along an axis, in the network's forward pass and in sampling."""
    found: dict[tuple, dict[int, Comparison]] = {}
    for comparison in comparisons_of(results):
        case, has = comparison.case, variables(comparison.case)
        if axis not in has or (case.group != NETWORK and case.suite != SAMPLE):
            continue
        rest = tuple(sorted((key, value) for key, value in has.items() if key != axis))
        key = (case.suite, case.group, case.name, case.dtype, case.device, rest)
        found.setdefault(key, {})[has[axis]] = comparison
    return [Series(axis, dict(sorted(p.items()))) for p in found.values() if len(p) >= least]


def device_title(run: Run) -> str:
    """The device by its name; a CPU with its threads."""
    row = run.results[0]
    return f"{row.device_name}, {row.threads} threads" if row.device == "cpu" else row.device_name
