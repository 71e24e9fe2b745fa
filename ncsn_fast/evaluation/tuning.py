"""Which sampler for few passes suits a trained network best: candidates are drawn with and compared with data.

Belongs here: the candidates, and the choice among them. Does not belong here: the solvers, the table for any network
(``sampling/auto.py``), the file that keeps a choice (``models/sampling_settings.py``), the command (``cli``).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import positive_int
from ..data.ranges import to_image_range
from ..models.base import ScoreModel
from ..progress import progress
from ..sampling.auto import choose, in_words
from ..sampling.levels import SPACINGS
from .metrics import PCAFeatures, frechet_distance

SNRS = (0.1, 0.2, 0.3)  # of a corrector's steps
CHURNS = (2.0, 10.0)  # of Heun's method, where a network can be asked between its levels
KEPT = 4  # candidates that are drawn with every seed, after all were with the first
MOST_IMAGES = 20_000  # of a set, that are compared with: more would not change a distance
DIMS = 32  # principal components, at most

Options = dict[str, Any]


class Distances:
    """Distances of samples to two sets of images: one to choose by, and another to report.

    They are Frechet distances in principal components of the first set's pixels.

    Args:
        tuning: images ``(N, C, H, W)`` in [-1, 1] to choose by.
        reported: others, that nothing is chosen by.

    Raises:
        ValueError: sets of other shapes, or of fewer than two images.
    """

    def __init__(self, tuning: Tensor, reported: Tensor) -> None:
        for name, images in (("tuning", tuning), ("reported", reported)):
            if len(images) < 2 or images.shape[1:] != tuning.shape[1:]:
                raise ValueError(
                    f"there must be two {name} images at least, of one shape with the others, got {tuple(images.shape)}"
                )
        tuning, reported = _some(tuning), _some(reported)
        self._features = PCAFeatures(tuning, min(DIMS, tuning[0].numel(), len(tuning) - 1))
        self._tuning, self._reported = self._features(tuning), self._features(reported)
        noise = torch.rand(
            reported.shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32
        )
        self.real = frechet_distance(self._tuning, self._reported)
        self.noise = frechet_distance(self._features(2 * noise - 1), self._reported)

    def __call__(self, samples: Tensor) -> tuple[float, float]:
        """To the tuning images, and to those that are reported."""
        features = self._features(samples)
        return frechet_distance(features, self._tuning), frechet_distance(features, self._reported)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A candidate, with a distance for each seed that it was drawn with.

    Attributes:
        options: of ``sample``.
        tuning: distances to the images that are chosen by.
        reported: to the others.
    """

    options: Options
    tuning: tuple[float, ...]
    reported: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean distance that is chosen by."""
        return statistics.mean(self.tuning)


def candidates(passes: int, n_levels: int | None = None) -> list[Options]:
    """Options of ``sample`` that are worth trying for a number of passes, what the table says first.

    Args:
        passes: evaluations of the network, at most.
        n_levels: of the ladder; ``None`` for a network over a continuous sigma.

    Raises:
        ValueError: ``passes < 1``.
    """
    passes = positive_int("passes", passes)
    most = passes if n_levels is None else min(passes, n_levels)
    spacings = SPACINGS if most < (n_levels or most + 1) else SPACINGS[:1]  # of all levels: one
    found = [choose(passes, n_levels)]
    for levels in spacings:
        for sampler in ("dpmpp_2m_sde", "ancestral", "dpmpp_2m", "euler"):
            found.append({"sampler": sampler, "levels": levels, "passes": most})
    heun = passes if n_levels is None else min(passes, 2 * n_levels - 1)
    for levels in SPACINGS:
        found.append({"sampler": "heun", "levels": levels, "passes": heun})
        if n_levels is None:
            found += [{**found[-1], "churn": churn} for churn in CHURNS]
    for each in {2, passes // (n_levels or passes)} - {0, 1}:  # evaluations at a level
        count = passes // each if n_levels is None else min(passes // each, n_levels)
        if count >= 2:
            corrected = {"sampler": "ancestral", "levels": SPACINGS[0], "passes": count * each}
            found += [{**corrected, "corrector_steps": each - 1, "snr": snr} for snr in SNRS]
    return [options for i, options in enumerate(found) if options not in found[:i]]


def tune(
    model: ScoreModel,
    distances: Distances,
    size: tuple[int, int] | None,
    passes: int,
    *,
    n: int = 500,
    seeds: Sequence[int] = (0, 1, 2),
    batch: int = 256,
    verbose: bool = False,
) -> list[Measured]:
    """Draw with every candidate, and with the best again, with every seed.

    Args:
        model: with its ladder set; of images.
        distances: to what.
        size: height and width of the images.
        passes: evaluations of the network, at most.
        n: samples of a candidate and seed.
        seeds: at least one; all candidates are drawn with the first, the best few of those with the others.
        batch: samples drawn at once.
        verbose: show a progress bar.

    Returns:
        The candidates, the nearest to the tuning images first, those drawn with every seed before the others.
    """
    tried = candidates(passes, None if "sigma" in model.scores() else len(model.sigmas))
    total = len(tried) + min(KEPT, len(tried)) * (len(seeds) - 1)
    with progress(total, shown=verbose, desc="tuning", unit="set") as bar:

        def measured(options: Options, some: Sequence[int]) -> Measured:
            bar.set_postfix_str(in_words("", options).lstrip(", "))
            pairs = []
            for seed in some:
                pairs.append(distances(draw(model, options, size, n, seed=seed, batch=batch)))
                bar.update()
            return Measured(options, *zip(*pairs, strict=True))

        first = sorted((measured(o, seeds[:1]) for o in tried), key=lambda m: m.mean)
        best, rest = first[:KEPT], first[KEPT:]
        if len(seeds) > 1:
            again = [measured(one.options, seeds[1:]) for one in best]
            best = [
                Measured(a.options, a.tuning + b.tuning, a.reported + b.reported)
                for a, b in zip(best, again, strict=True)
            ]
    return sorted(best, key=lambda m: m.mean) + rest


def draw(
    model: ScoreModel,
    options: Mapping[str, Any],
    size: tuple[int, int] | None,
    n: int,
    *,
    seed: int,
    batch: int = 256,
) -> Tensor:
    """``n`` samples in [-1, 1], on the CPU."""
    parts = [
        model.sample(
            min(batch, n - begin),
            size,
            clip=False,
            seed=seed,
            sample_offset=begin,
            verbose=False,
            **options,
        )
        for begin in range(0, n, batch)
    ]
    return to_image_range(torch.cat(parts), model.data_range).cpu()


def _some(images: Tensor) -> Tensor:
    """At most :data:`MOST_IMAGES` of them, evenly."""
    step = -(-len(images) // MOST_IMAGES)
    return images[::step]
