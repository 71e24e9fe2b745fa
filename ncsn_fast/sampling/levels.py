"""Which noise levels a solver takes when it is given a number of them.

Belongs here: spacings of a few levels between two ends, and the choice of levels from a ladder. Does not belong here:
ladders for training (``schedules.py``), solvers (``solvers.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..checks import one_of, positive_int

SPACINGS = ("log", "karras")
RHO = 7  # Karras et al., 2022, appendix D.1


def spaced_sigmas(begin: float, end: float, n: int, spacing: str = "log") -> list[float]:
    r"""``n`` noise levels from ``begin`` down to ``end``.

    ``"log"``: evenly in the logarithm. ``"karras"``, denser at small sigmas, with :math:`\rho = 7`:

    .. math:: \sigma_i = \Big(\sigma_1^{1/\rho} + \frac{i}{n - 1} (\sigma_n^{1/\rho} - \sigma_1^{1/\rho})\Big)^\rho

    With ``n = 1`` it is ``begin`` alone.

    Raises:
        ValueError: ``n < 1``, an unknown spacing.

    Reference: Karras et al., 2022, `arXiv:2206.00364 <https://arxiv.org/abs/2206.00364>`_, equation 5.
    """
    n = positive_int("n", n)
    if one_of("levels", spacing, SPACINGS) == "log":
        inner = [begin * (end / begin) ** (i / (n - 1)) for i in range(1, n - 1)]
    else:
        high, low = begin ** (1 / RHO), end ** (1 / RHO)
        inner = [(high + i / (n - 1) * (low - high)) ** RHO for i in range(1, n - 1)]
    return [begin, *inner, end] if n > 1 else [begin]


def spaced_levels(sigmas: Sequence[float], n: int, spacing: str = "log") -> list[int]:
    """``n`` different levels of a ladder, its ends among them, near in log sigma to those of :func:`spaced_sigmas`.

    Raises:
        ValueError: more levels than the ladder has; else as :func:`spaced_sigmas`.
    """
    if n > len(sigmas):
        raise ValueError(f"the ladder has {len(sigmas)} levels, and {n} were asked for")
    levels = [
        min(range(len(sigmas)), key=lambda level: abs(math.log(sigmas[level] / wanted)))
        for wanted in spaced_sigmas(sigmas[0], sigmas[-1], n, spacing)
    ]
    # Two wanted sigmas may have the same nearest level: the later one then takes the next level, as long as that leaves
    # levels enough for those after it.
    for i in range(1, n):
        levels[i] = max(levels[i], levels[i - 1] + 1)
    return [min(level, len(sigmas) - n + i) for i, level in enumerate(levels)]
