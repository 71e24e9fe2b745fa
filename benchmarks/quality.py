"""Distance to data against passes and seconds, of every sampler: what is measured, and the file that keeps it.

Belongs here: which samplers at which numbers of passes, the distances, the time beside the documented loop in plain
PyTorch. Does not belong here: tables and plots of the results (``quality_report.py``), timing of operators
(``suite.py``), choosing a sampler for a network (``ncsn-fast tune``).

A measurement is a sampler with its options, on a network, with a seed. The file holds those that are done, and a call
measures the others: it may be stopped at any time. Distances of images are Frechet distances of principal components,
to the training images (``tuning``: the table of ``sampling/auto.py`` was chosen by it) and to images held out
(``heldout``: what is reported). Those of the checkerboard are the share of points outside its dark squares.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsn_fast import info
from ncsn_fast.data import Checkerboard
from ncsn_fast.evaluation.tuning import Distances, draw
from ncsn_fast.files import write_atomically
from ncsn_fast.models.base import ScoreModel
from ncsn_fast.models.ncsn import NCSN
from ncsn_fast.sampling import ScoreError, annealed_langevin, initial_state
from ncsn_fast.sampling.auto import in_words
from ncsn_fast.sampling.defaults import STEP_SHARE
from ncsn_fast.sampling.levels import SPACINGS, spaced_sigmas
from ncsn_fast.sampling.samplers import SAMPLERS

from . import plain_torch
from .measure import Load
from .results import commit

PASSES = (10, 25, 5, 15, 40)  # in the order of what matters most
REFERENCE_PASSES = (201, 51)  # of annealed Langevin dynamics, about
FEW = ("dpmpp_2m_sde", "ancestral", "dpmpp_2m", "heun", "euler")
CORRECTOR_SNR = 0.3
DOCUMENTED_PASSES, TIMED_IMAGES, TIMED_ROUNDS = 1000, 16, 5
Options = dict[str, Any]
Point = dict[str, Any]


def jobs(n_levels: int | None, step_lr: float) -> Iterator[Options]:
    """Options of ``sample``, those that matter most first.

    Args:
        n_levels: of the ladder; ``None``: any number can be taken.
        step_lr: of annealed Langevin dynamics.
    """
    ladder = n_levels or 10
    references = [
        {
            "sampler": "ald",
            "n_steps_each": max(1, round((passes - 1) / ladder)),
            "step_lr": step_lr,
            "denoise": True,
            "init_dist": "normal",
        }
        for passes in REFERENCE_PASSES
    ]
    few = [list(_few_jobs(passes, n_levels)) for passes in PASSES]
    # As many passes as levels, or more: only a corrector can use the rest.
    second = few[1][0] if n_levels is None or n_levels >= PASSES[1] else few[1][-1]
    first = [few[0][0], references[0], second]
    seen = []
    for options in [*first, *(o for some in few for o in some), *references]:
        if options not in seen:
            seen.append(options)
            yield options


def _few_jobs(passes: int, n_levels: int | None) -> Iterator[Options]:
    """Those of the solvers for few passes."""
    most = passes if n_levels is None else min(passes, n_levels)
    heun = passes if n_levels is None else min(passes, 2 * n_levels - 1)
    for spacing in SPACINGS if n_levels is None or most < n_levels else SPACINGS[:1]:
        for sampler in FEW:
            count = heun if sampler == "heun" else most
            yield {"sampler": sampler, "passes": count, "levels": spacing}
    for each in sorted({2, passes // (n_levels or passes)} - {0, 1}):  # evaluations at a level
        count = each * (passes // each if n_levels is None else min(passes // each, n_levels))
        if count >= 2 * each:
            corrected = {"passes": count, "corrector_steps": each - 1}
            yield {"sampler": "ancestral", **corrected, "snr": CORRECTOR_SNR}


def passes_of(options: Mapping[str, Any], n_levels: int) -> int:
    """Evaluations of the network that options of ``sample`` cost."""
    if "n_steps_each" in options:
        return options["n_steps_each"] * n_levels + bool(options["denoise"])
    return options["passes"]


class Results:
    """What was measured on one kind of data, kept in a JSON file after every measurement."""

    def __init__(self, path: Path, data: str) -> None:
        self.path = path
        self.held: dict[str, Any] = {"data": data, "about": {}, "references": {}, "points": []}
        if path.is_file():
            self.held = json.loads(path.read_text(encoding="utf-8"))
            if self.held.get("data") != data:
                raise ValueError(f"{path} must be of {data}, got {self.held.get('data')}")

    def has(self, network: str, options: Options, seed: int, samples: int) -> bool:
        """Whether a measurement of as many samples, or more, is there."""
        return any(
            (point["network"], point["options"], point["seed"]) == (network, options, seed)
            and point["samples"] >= samples
            for point in self.held["points"]
        )

    def add(self, point: Point) -> None:
        """Keep a measurement, in place of one of fewer samples."""
        key = ("network", "options", "seed")
        self.held["points"] = [
            old for old in self.held["points"] if any(old[name] != point[name] for name in key)
        ] + [point]
        self.save()

    def save(self) -> None:
        """Write the file."""
        facts = {"device": info.processor(), "threads": torch.get_num_threads()}
        self.held["about"] = {**facts, "torch": torch.__version__, "commit": commit()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(self.held, indent=1) + "\n").encode())


def measure(
    results: Results,
    name: str,
    n_levels: int,
    todo: Sequence[Options],
    drawn: Callable[[Options, int], Tensor],
    distance: Callable[[Tensor], tuple[float, float]],
    *,
    samples: int,
    seeds: Sequence[int],
    until: float,
    say: Callable[[str], object],
) -> None:
    """Draw and compare, seed by seed, whatever is not in the results yet.

    Args:
        results: are added to.
        name: of the network.
        n_levels: of its ladder.
        todo: options of ``sample``.
        drawn: samples by options and a seed.
        distance: to the tuning data, and to the data held out.
        samples: how many ``drawn`` gives.
        seeds: of the samples.
        until: no measurement begins after this time of ``time.monotonic``.
        say: is told each result.
    """
    for seed in seeds:
        for options in todo:
            if results.has(name, options, seed, samples):
                continue
            if time.monotonic() > until:
                say("the time is over; the same command measures the rest")
                return
            begin = time.perf_counter()
            own = {k: v for k, v in options.items() if k != "sampler"}
            what = f"{name}, seed {seed}: {in_words(options['sampler'], own)}"
            try:
                with Load() as load:
                    x = drawn(options, seed)
            except ScoreError as error:  # as of an exact score too far from its data
                say(f"{what}: left out, {error}")
                continue
            seconds = time.perf_counter() - begin
            tuning, heldout = distance(x)
            point = {"network": name, "levels": n_levels, "options": options, "seed": seed}
            point |= {"passes": passes_of(options, n_levels), "samples": samples}
            point |= {"seconds": round(seconds, 3), "others": round(load.others, 3)}
            point |= {"tuning": round(tuning, 4)}
            results.add(point | {"heldout": round(heldout, 4)})
            say(f"{what}: {heldout:.4f}")


def measure_network(
    results: Results,
    name: str,
    model: ScoreModel,
    size: tuple[int, int],
    distances: Distances,
    *,
    samples: int,
    seeds: Sequence[int],
    until: float,
    say: Callable[[str], object],
) -> None:
    """All samplers on a network of images; and its time beside plain PyTorch, once."""
    n_levels = None if "sigma" in model.scores() else len(model.sigmas)
    step_lr = STEP_SHARE * float(model.sigmas[-1]) ** 2
    results.held["references"] = {"real": distances.real, "noise": distances.noise}
    measure(
        results,
        name,
        len(model.sigmas),
        list(jobs(n_levels, step_lr)),
        lambda options, seed: draw(model, options, size, samples, seed=seed),
        distances,
        samples=samples,
        seeds=seeds,
        until=until,
        say=say,
    )
    if isinstance(model, NCSN) and "speed" not in results.held and time.monotonic() < until:
        results.held["speed"] = {"network": name, **speed(model, size)}
        results.save()


def measure_checkerboard(
    results: Results,
    *,
    samples: int,
    seeds: Sequence[int],
    until: float,
    say: Callable[[str], object],
) -> None:
    """All samplers with the exact score, between the ends of the demo's ladder: what a perfect network would give."""
    points, begin, end, levels = Checkerboard(), 5.0, 0.02, 10
    ladder = spaced_sigmas(begin, end, levels)

    def at_level(x: Tensor, level: int) -> Tensor:
        return points.score(x, ladder[level])

    def drawn(options: Options, seed: int) -> Tensor:
        own, name = dict(options), options["sampler"]
        kind = own.pop("init_dist", "prior")
        init = initial_state((samples, 2), "normal", seed=seed) * (begin if kind == "prior" else 1)
        del own["sampler"]
        if name == "ald":
            return annealed_langevin(at_level, init, ladder, **own, seed=seed)
        count = SAMPLERS[name].level_count(own.pop("passes"), {"corrector_steps": 0, **own})
        sigmas = spaced_sigmas(begin, end, count, own.pop("levels", "log"))
        return SAMPLERS[name].function(
            points.score, init, sigmas, conditions=sigmas, seed=seed, **own
        )

    def outside(x: Tensor) -> tuple[float, float]:
        share = 1 - float(points.is_dark(x).float().mean())
        return share, share

    board = points.width * points.squares
    even = (torch.rand(100_000, 2, generator=torch.Generator().manual_seed(0)) - 0.5) * board
    real = points.sample(samples, seed=1)
    results.held["references"] = {"real": outside(real)[0], "noise": outside(even)[0]}
    todo = list(jobs(None, STEP_SHARE * end**2))
    arguments = {"samples": samples, "seeds": seeds, "until": until, "say": say}
    measure(results, "exact score", levels, todo, drawn, outside, **arguments)


def speed(model: NCSN, size: tuple[int, int]) -> dict[str, Any]:
    """Seconds of the documented loop in eager PyTorch, and of ours with ten passes, on one network, in one run.

    Ours is timed several times, before and after, and counts by the median.
    """
    network = plain_torch.network_like(model).eval().requires_grad_(False)
    shape = (TIMED_IMAGES, model.config.in_channels, *size)
    start, sigmas = initial_state(shape, seed=0), model.sigmas
    steps = round(DOCUMENTED_PASSES / len(sigmas))
    few = {"sampler": "auto", "passes": 10, "verbose": False, "seed": 0}

    def ours() -> float:
        begin = time.perf_counter()
        model.sample(TIMED_IMAGES, size, **few)
        return time.perf_counter() - begin

    def plain(steps: int) -> float:
        begin = time.perf_counter()
        plain_torch.sample(network, start, sigmas, steps, STEP_SHARE * float(sigmas[-1]) ** 2)
        return time.perf_counter() - begin

    ours(), plain(1)  # memory, and the packed weights
    times = [ours() for _ in range(TIMED_ROUNDS)]
    documented = plain(steps)
    times += [ours() for _ in range(TIMED_ROUNDS)]
    return {
        "images": TIMED_IMAGES,
        "documented_passes": steps * len(sigmas),
        "documented_seconds": round(documented, 3),
        "few_passes": few["passes"],
        "few_seconds": round(statistics.median(times), 4),
        "times_as_fast": round(documented / statistics.median(times), 1),
    }
