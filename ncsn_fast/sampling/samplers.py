"""Samplers as records: the one place that says what each is called, does, takes and starts from.

Belongs here: the table of the samplers, the checks of a sampler's options, and what help texts and documents say of
samplers. Does not belong here: the samplers themselves (``langevin.py``, ``ode.py``, ``solvers.py``), calling them
(``run.py``).

To add a sampler, add an entry to :data:`SAMPLERS`, and to :data:`OPTIONS` any option that is new.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..checks import integer, positive_int
from .defaults import SNR, STEP_SHARE
from .langevin import PREDICTORS, annealed_langevin, consistent_annealed, predictor_corrector
from .levels import SPACINGS
from .ode import probability_flow
from .solvers import ancestral, dpmpp_2m, dpmpp_2m_sde, euler, heun
from .start import INIT_DISTS

PRIOR = "prior"  # noise of the first sigma, N(0, sigma_1^2)
STARTS = (*INIT_DISTS, PRIOR)
# Options of the loop in engine.py, which all samplers take.
WATCHED = ("callback", "cuda_graph", "known", "mask", "return_intermediates", "verbose")


@dataclasses.dataclass(frozen=True)
class Option:
    """An option that some samplers take.

    Attributes:
        help: what it is, in a line.
        choices: the values it may have, if they are few.
        if_missing: what is done if it is not given and has no default.
    """

    help: str
    choices: tuple[str, ...] = ()
    if_missing: str = ""


OPTIONS: Mapping[str, Option] = {
    "step_lr": Option("Step size at the last level, in squared units of the data"),
    "snr": Option("Signal-to-noise ratio of the corrector's steps"),
    "predictor": Option("Step from each level to the next", PREDICTORS),
    "passes": Option(
        "Evaluations of the network, at most", if_missing="each level of the ladder is taken"
    ),
    "levels": Option("Spacing of the levels that are taken", SPACINGS),
    "churn": Option(
        "Noise that is added at each step, S_churn of EDM; above 0 for networks over sigma"
    ),
    "churn_min": Option("Smallest sigma at which churn adds noise, S_min of EDM"),
    "churn_max": Option("Largest sigma at which churn adds noise, S_max of EDM", if_missing="none"),
    "churn_noise": Option("Factor on the noise that churn adds, S_noise of EDM"),
    "corrector_steps": Option("Langevin steps at each level before the step to the next"),
}


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What there is to know of a sampler before it is called.

    Attributes:
        function: ``function(score, init, sigmas, *, n_steps_each, denoise, **options)``; for few passes,
            ``function(score, init, sigmas, *, conditions, **options)``.
        title: its name in words.
        summary: what it does, in a line, with its source.
        wants: what it wants of the ladder, in a line.
        defaults: the options of :data:`OPTIONS` that it takes, each with its default: a value, or a function of the
            ladder whose text says what it is.
        init_dists: what it may start from, its default first.
        of: what its score is a function of, beside x: ``"level"`` of the ladder, ``"sigma"``, any, or ``"either"``.
        clips_every_step: clamping is part of its step. If not, its states must be as wide as their noise, and only the
            result is clamped.
        level_count: of a sampler for few passes, ``level_count(passes, options)``: to how many levels the passes are
            enough. Such a sampler goes once down the levels, and ends at the expected clean sample.
    """

    function: Callable[..., Any]
    title: str
    summary: str
    wants: str
    defaults: Mapping[str, Any]
    init_dists: tuple[str, ...] = (PRIOR,)
    of: str = "level"
    clips_every_step: bool = False
    level_count: Callable[[int, Mapping[str, Any]], int] | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of all options that it takes."""
        return (*self.defaults, *WATCHED)


@dataclasses.dataclass(frozen=True)
class ShareOfVariance:
    """A default step size: a share of the last level's variance."""

    share: float

    def __call__(self, sigmas: Sequence[float]) -> float:
        return self.share * sigmas[-1] ** 2

    def __str__(self) -> str:
        return f"{self.share:g} * sigma_K**2"


def _ode(
    score: Callable[[Tensor, Any], Tensor],
    init: Tensor,
    sigmas: Sequence[float],
    *,
    n_steps_each: int,
    callback: Callable[[int, Tensor], object] | None = None,
    **run: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The probability-flow ODE, each gap of the ladder divided geometrically into ``n_steps_each``."""
    steps = positive_int("n_steps_each", n_steps_each)
    fine = [
        high * (low / high) ** (i / steps)
        for high, low in itertools.pairwise(sigmas)
        for i in range(steps)
    ]

    def after_level(point: int, x: Tensor) -> None:
        if (point + 1) % steps == 0 or point == len(fine):
            callback(point // steps, x)

    watch = None if callback is None else after_level
    return probability_flow(score, init, [*fine, sigmas[-1]], callback=watch, **run)


def _one_pass(passes: int, options: Mapping[str, Any]) -> int:
    """One evaluation a level."""
    return passes


def _two_passes(passes: int, options: Mapping[str, Any]) -> int:
    """Two evaluations a level, one at the last."""
    return (passes + 1) // 2


def _with_corrector(passes: int, options: Mapping[str, Any]) -> int:
    """One evaluation a level, and one for each step of the corrector."""
    return passes // (1 + integer("corrector_steps", options["corrector_steps"], 0))


_FEW = {"passes": None, "levels": SPACINGS[0]}
_ANY_PART = "any part of a ladder; a network over a continuous sigma is asked between its levels"

SAMPLERS: Mapping[str, Sampler] = {
    "ald": Sampler(
        annealed_langevin,
        "annealed Langevin dynamics",
        "Langevin steps at each level (Song & Ermon 2019)",
        "many steps at each level",
        {"step_lr": ShareOfVariance(STEP_SHARE)},
        init_dists=(PRIOR, *INIT_DISTS),
        clips_every_step=True,
    ),
    "cas": Sampler(
        consistent_annealed,
        "consistent annealed sampling",
        "noise is added so that exactly the next level's remains (Jolicoeur-Martineau et al. 2020)",
        "a fine ladder; `step_lr` of at least `(1 - ratio) * sigma_K**2`, the error says how much",
        # To the expected clean sample, and all noise anew: the one step size that every ladder allows.
        {"step_lr": ShareOfVariance(1.0)},
    ),
    "pc": Sampler(
        predictor_corrector,
        "predictor-corrector",
        "reverse diffusion or ancestral steps from level to level, Langevin steps at each (Song et al. 2021)",
        "a fine ladder",
        {"snr": SNR, "predictor": PREDICTORS[0]},
    ),
    "ode": Sampler(
        _ode,
        "probability-flow ODE",
        "solved by Heun's method on a finer grid; deterministic but for the start (Song et al. 2021)",
        "a network over a continuous sigma; each gap of the ladder is divided into `n_steps_each`",
        {},
        of="sigma",
    ),
    "euler": Sampler(
        euler,
        "Euler's method (DDIM)",
        "first-order steps along the probability-flow ODE (Song et al. 2020)",
        _ANY_PART,
        _FEW,
        of="either",
        level_count=_one_pass,
    ),
    "heun": Sampler(
        heun,
        "Heun's method (EDM)",
        "second-order steps along the probability-flow ODE, two passes each, with churn if wanted (Karras et al. 2022)",
        _ANY_PART,
        {**_FEW, "churn": 0.0, "churn_min": 0.0, "churn_max": None, "churn_noise": 1.0},
        of="either",
        level_count=_two_passes,
    ),
    "dpmpp_2m": Sampler(
        dpmpp_2m,
        "DPM-Solver++ (2M)",
        "second-order steps along the probability-flow ODE, from the last two passes (Lu et al. 2022)",
        _ANY_PART,
        _FEW,
        of="either",
        level_count=_one_pass,
    ),
    "dpmpp_2m_sde": Sampler(
        dpmpp_2m_sde,
        "SDE-DPM-Solver++ (2M)",
        "the same for the reverse SDE, with noise in each step (Lu et al. 2022)",
        _ANY_PART,
        _FEW,
        of="either",
        level_count=_one_pass,
    ),
    "ancestral": Sampler(
        ancestral,
        "ancestral sampling",
        "steps of the reverse process, with Langevin steps at each level if wanted (Song et al. 2021)",
        _ANY_PART,
        {**_FEW, "corrector_steps": 0, "snr": SNR},
        of="either",
        level_count=_with_corrector,
    ),
}

NAMES = tuple(SAMPLERS)
FEW_PASSES = tuple(name for name, sampler in SAMPLERS.items() if sampler.level_count is not None)


def find(name: str, of: Sequence[str] = ("level", "sigma")) -> Sampler:
    """The sampler of that name; ValueError if there is none, or none for a score that is a function of ``of``."""
    names = tuple(known for known, sampler in SAMPLERS.items() if sampler.of in (*of, "either"))
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
        if not takers(option):
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


def takers(option: str) -> tuple[str, ...]:
    """The samplers that take an option."""
    return tuple(name for name, sampler in SAMPLERS.items() if option in sampler.options)


def sampler_help() -> str:
    """All samplers by name and title, for a help text."""
    return "; ".join(f"{name}: {sampler.title}" for name, sampler in SAMPLERS.items()) + "."


def option_help(option: str) -> str:
    """A line on an option, for a help text, with the samplers that take it."""
    return f"{OPTIONS[option].help}; of {', '.join(takers(option))}."


def option_default(option: str) -> str:
    """The default of an option in words, for a help text: one, or one for each sampler."""
    defaults = {name: SAMPLERS[name].defaults[option] for name in takers(option)}
    defaults = {
        name: OPTIONS[option].if_missing if default is None else str(default)
        for name, default in defaults.items()
    }
    if len(set(defaults.values())) == 1:
        return next(iter(defaults.values()))
    return ", ".join(f"{name}: {default}" for name, default in defaults.items())


def markdown_table() -> str:
    """The samplers as a table for the documents."""
    rows = [("`sampler=`", "is", "what it does", "own options", "wants"), ("---",) * 5]
    for name, sampler in SAMPLERS.items():
        options = ", ".join(f"`{option}`" for option in sampler.defaults) or "none"
        rows.append((f'`"{name}"`', sampler.title, sampler.summary, options, sampler.wants))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
