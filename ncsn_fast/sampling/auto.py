"""The sampler ``"auto"``: from a number of passes to a solver, its levels and its constants.

Belongs here: the table of what was measured, and the choice from it. Does not belong here: the solvers
(``solvers.py``), measuring another network (``ncsn-fast tune``, whose choice goes before this table).

The table comes from ``ncsn-fast bench --suite quality`` on the digits (``benchmarks/results/quality-digits.md``): five
trained networks of 40 levels, 2,000 samples each. Each row is what came nearest to the training images; the distances
that are reported there are to images held out. Other data may want something else: ``ncsn-fast tune`` finds out.
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
# Twice as many passes as levels, or more: ancestral sampling, with Langevin steps of this ratio at each level.
SPARE_SNR = 0.3


def choose(passes: int, n_levels: int | None = None) -> dict[str, Any]:
    """The options of ``sample`` for a number of passes: ``sampler``, ``passes``, and what that sampler takes.

    Args:
        passes: evaluations of the network, at most.
        n_levels: of the ladder; ``None`` for a network over a continuous sigma, which can be asked at any number.

    Raises:
        ValueError: ``passes < 1``.
    """
    passes = positive_int("passes", passes)
    if n_levels is not None and passes >= 2 * n_levels:
        each = passes // n_levels
        spare = {"corrector_steps": each - 1, "snr": SPARE_SNR}
        return {"sampler": "ancestral", "passes": each * n_levels, **spare}
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
