"""The sampler ``"auto"``: from a number of passes to a solver, its levels and its constants.

Belongs here: the table of what was measured, and the choice from it. Does not belong here: the solvers
(``solvers.py``), measuring another network (``ncsn-fast tune``, whose choice goes before this table).

Where the table comes from: the digits (8x8) after the demo's training, Frechet distances to held-out images. 600
samples, networks of 10 and 40 levels: SDE-DPM-Solver++ (2M) with ten passes 1.29 and 1.35, annealed Langevin dynamics
with 201 passes 1.41 and 1.33. A run before, one seed: on 40 levels SDE-DPM-Solver++ 0.81, Euler and Heun 1.5; on 10
levels ancestral steps 1.24, DPM-Solver++ (2M) 1.54, Euler 1.63. Langevin steps beside the solver's do not pay: on 10
levels ancestral steps with one at each, 20 passes, had 0.99, the plain solver with 10 passes 0.80 (500 samples, one
network). So no more passes are taken than the ladder has levels. All these are distances to the images that the
choice was made by, and other data may want something else: ``ncsn-fast tune`` and ``ncsn-fast bench --suite quality``
measure with two sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import positive_int
from .samplers import NAMES, WATCHED, takers

AUTO = "auto"
CHOICES = (AUTO, *NAMES)
PASSES = 10  # unless told otherwise

# From so many passes on, these options of ``sample``.
TABLE: Sequence[tuple[int, Mapping[str, Any]]] = (
    (1, {"sampler": "dpmpp_2m_sde", "levels": "log"}),
)


def choose(passes: int, n_levels: int | None = None) -> dict[str, Any]:
    """The options of ``sample`` for a number of passes: ``sampler``, ``passes``, and what that sampler takes.

    Args:
        passes: evaluations of the network, at most.
        n_levels: of the ladder, which is the most passes that are taken; ``None`` for a network over a continuous
            sigma, which can be asked at any number of them.

    Raises:
        ValueError: ``passes < 1``.
    """
    passes = positive_int("passes", passes)
    chosen = [options for least, options in TABLE if least <= passes][-1]
    return {**chosen, "passes": passes if n_levels is None else min(passes, n_levels)}


def resolve(
    name: str,
    options: Mapping[str, Any],
    n_levels: int | None,
    tuned: Mapping[str, Any] | None = None,
) -> tuple[str, dict[str, Any]]:
    """The sampler and its options in place of ``"auto"``; any other name is handed back with its options.

    Args:
        name: of the sampler.
        options: given by the user; ``None``: not given. ``"auto"`` takes ``passes`` and what all samplers take.
        n_levels: as in :func:`choose`.
        tuned: a choice that was measured for this network; it holds for its own number of passes, and where none is
            given.

    Raises:
        ValueError: an option that is chosen by the sampler, ``passes < 1``.
        TypeError: an option of no sampler.
    """
    if name != AUTO:
        return name, dict(options)
    for option, value in options.items():
        if value is None or option in ("passes", *WATCHED):
            continue
        if not takers(option):
            raise TypeError(f"no sampler takes an option {option!r}")
        raise ValueError(f"sampler {AUTO!r} takes passes and chooses the rest, got {option}")
    passes = options.get("passes")
    if tuned and passes in (None, tuned["passes"]):
        chosen = dict(tuned)
    else:
        chosen = choose(PASSES if passes is None else passes, n_levels)
    return chosen.pop("sampler"), {**options, **chosen}


def in_words(sampler: str, options: Mapping[str, Any]) -> str:
    """A choice as a line: the sampler, then its options."""
    own = {k: v for k, v in options.items() if v is not None and k not in WATCHED}
    return ", ".join([sampler, *(f"{name} {value}" for name, value in own.items())])
