"""Samplers as records: what each is called, takes and starts from.

Belongs here: the table of the samplers, and the checks of a sampler's options, shared by every network and by the
command line. Does not belong here: the samplers themselves (``langevin.py``, ``ode.py``), calling them (``run.py``).

A sampler more is one more entry of :data:`SAMPLERS`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..checks import positive_int
from .langevin import annealed_langevin, consistent_annealed, predictor_corrector
from .ode import probability_flow
from .start import INIT_DISTS

PRIOR = "prior"  # noise of the first sigma, N(0, sigma_1^2)
STARTS = (*INIT_DISTS, PRIOR)
# What the loop of engine.py offers with any sampler on a ladder.
WATCHED = ("callback", "cuda_graph", "known", "mask", "return_intermediates", "verbose")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What there is to know of a sampler before it is called.

    Attributes:
        function: ``function(score, init, sigmas, *, n_steps_each, denoise, **options)``.
        defaults: the options that are its own, each with its default: a value, or a function of the ladder.
        init_dists: what it may start from, its default first.
        of: what its score is a function of, beside x: ``"level"`` of the ladder, or ``"sigma"``, any.
        clips_every_step: clamping is part of its step; else, as its states must be as wide as their noise, only the
            result is clamped.
    """

    function: Callable[..., Any]
    defaults: Mapping[str, Any]
    init_dists: tuple[str, ...] = (PRIOR,)
    of: str = "level"
    clips_every_step: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that it takes beside those that all samplers take."""
        return (*self.defaults, *(WATCHED if self.of == "level" else ()))


def share_of_variance(share: float) -> Callable[[Sequence[float]], float]:
    """A default step size: a share of the last level's variance."""
    return lambda sigmas: share * sigmas[-1] ** 2


def _ode(
    score: Callable[[Tensor, float], Tensor],
    init: Tensor,
    sigmas: Sequence[float],
    *,
    n_steps_each: int,
    denoise: bool,
) -> Tensor:
    """The probability-flow ODE, each gap of the ladder divided geometrically into ``n_steps_each``."""
    steps = positive_int("n_steps_each", n_steps_each)
    fine = [
        high * (low / high) ** (i / steps)
        for high, low in itertools.pairwise(sigmas)
        for i in range(steps)
    ]
    return probability_flow(score, init, [*fine, sigmas[-1]], denoise=denoise)


SAMPLERS: Mapping[str, Sampler] = {
    "ald": Sampler(
        annealed_langevin,
        # The last step of the paper, 2e-5 in this library's convention, for its last sigma of 0.01.
        {"step_lr": share_of_variance(0.2)},
        init_dists=(PRIOR, *INIT_DISTS),
        clips_every_step=True,
    ),
    # To the expected clean sample, and all noise anew: the one step size that every ladder allows.
    "cas": Sampler(consistent_annealed, {"step_lr": share_of_variance(1.0)}),
    "pc": Sampler(predictor_corrector, {"snr": 0.16, "predictor": "reverse_diffusion"}),
    "ode": Sampler(_ode, {}, of="sigma"),
}


def find(name: str, of: Sequence[str] = ("level", "sigma")) -> Sampler:
    """The sampler of that name; ValueError if none is that a score of ``of`` can serve."""
    names = tuple(known for known, sampler in SAMPLERS.items() if sampler.of in of)
    if name not in names:
        raise ValueError(f"sampler must be one of {names}, got {name!r}")
    return SAMPLERS[name]


def check_options(name: str, given: Mapping[str, Any]) -> None:
    """Refuse what the sampler does not take; an option that is ``None`` was not given.

    Raises:
        ValueError: an unknown sampler; an option that is another sampler's.
        TypeError: an option of no sampler.
    """
    sampler = find(name)
    for option, value in given.items():
        if not any(option in other.options for other in SAMPLERS.values()):
            raise TypeError(f"no sampler takes an option {option!r}")
        if value is not None and option not in sampler.options:
            takes = ", ".join(sampler.options) or "none of its own"
            raise ValueError(f"sampler {name!r} takes no {option}; its options are {takes}")


def own_options(name: str, sigmas: Sequence[float], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are the sampler's own, with its defaults where ``given`` has none.

    Raises:
        Those of :func:`check_options`.
    """
    check_options(name, given)
    return {
        option: (default(sigmas) if callable(default) else default)
        if given.get(option) is None
        else given[option]
        for option, default in SAMPLERS[name].defaults.items()
    }
