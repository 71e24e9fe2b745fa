"""Samplers as records, and the one way from a network to samples by any of them.

Belongs here: what each sampler is called, takes and starts from, and the checks of that, shared by every network and by
the command line. Does not belong here: the samplers themselves (``sampling.py``, ``probability_flow.py``), networks.

A sampler more is one more entry of :data:`SAMPLERS`; a network more calls :func:`draw` with its score.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .checks import positive_int, positive_number
from .engine import use_graphs
from .probability_flow import probability_flow
from .sampling import (
    INIT_DISTS,
    annealed_langevin,
    check_init,
    consistent_annealed,
    draw_seed,
    initial_state,
    predictor_corrector,
)

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


@torch.no_grad()
def draw(
    model: nn.Module,
    name: str,
    scores: Mapping[str, Callable[[Tensor, Any], Tensor]],
    shape: tuple[int, ...],
    sigmas: Sequence[float],
    *,
    device: torch.device,
    layout: torch.memory_format = torch.contiguous_format,
    n_steps_each: int,
    denoise: bool,
    clip: float | None = None,
    init: Tensor | None = None,
    init_dist: str | None = None,
    seed: int | None = None,
    sample_offset: int = 0,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Samples of a network, in evaluation mode meanwhile: the rules of all networks.

    Args:
        model: the network.
        name: of the sampler.
        scores: ``"level"`` to ``score(x, level)``, ``"sigma"`` to ``score(x, sigma)``, what the network has; x is
            float32.
        shape: of the result, the sample first.
        sigmas: the ladder.
        device, layout: where and how the state lies.
        n_steps_each: steps at each level.
        denoise: end with one step to the expected clean sample.
        clip: clamp to ``[-clip, clip]``, after every step or at the end, as the sampler's record says.
        init: where to start; not modified.
        init_dist: without ``init``, the distribution to start from; ``None``: the sampler's default.
        seed, sample_offset: of all the randomness.
        options: those of the sampler's record; ``None``: not given.

    Raises:
        ValueError, TypeError: an argument out of its range, of another type, or not of this sampler.
        ScoreError: the network gave NaN or infinity.
    """
    sampler = find(name, tuple(scores))
    own = own_options(name, sigmas, options)
    watched = {k: v for k, v in options.items() if k in WATCHED and v is not None}
    if init_dist is not None and init_dist not in sampler.init_dists:
        if init_dist not in STARTS:
            raise ValueError(f"init_dist must be one of {STARTS}, got {init_dist!r}")
        raise ValueError(
            f"sampler {name!r} starts from init_dist {' or '.join(sampler.init_dists)}, got {init_dist!r}"
        )
    if clip is not None:
        clip = positive_number("clip", clip)
    seed = draw_seed() if seed is None else seed
    noise = {"seed": seed, "sample_offset": sample_offset}
    if init is not None:
        init = check_init(init, shape).to(device)
    else:
        init_dist = init_dist or sampler.init_dists[0]
        prior = init_dist == PRIOR
        init = initial_state(shape, "normal" if prior else init_dist, **noise, device=device)
        init = sigmas[0] * init if prior else init
    if layout == torch.channels_last:
        init = init.to(memory_format=layout)
    run: dict[str, Any] = {"n_steps_each": n_steps_each, "denoise": denoise, **own, **watched}
    if sampler.of == "level":
        run |= noise | {"cuda_graph": use_graphs(device, options.get("cuda_graph"))}
    if sampler.clips_every_step:
        run["clip"] = clip
    with evaluating(model):
        drawn = sampler.function(scores[sampler.of], init, sigmas, **run)
    if clip is not None and not sampler.clips_every_step:
        (drawn[0] if isinstance(drawn, tuple) else drawn).clamp_(-clip, clip)
    return drawn


@dataclasses.dataclass
class _Sampling:
    """A model that is being sampled: the threads that do, once for each call, and its modes before the first."""

    threads: list[int]
    modes: list[tuple[nn.Module, bool]]


_sampled: weakref.WeakKeyDictionary[nn.Module, _Sampling] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a block; then each module has its own mode back.

    Where blocks of several threads (or one within another) overlap, the first notes the modes and the last restores.
    """
    me = threading.get_ident()
    with _lock:
        if model not in _sampled:
            _sampled[model] = _Sampling([], [(m, m.training) for m in model.modules()])
            model.eval()
        _sampled[model].threads.append(me)
    try:
        yield
    finally:
        with _lock:
            entry = _sampled[model]
            entry.threads.remove(me)
            if not entry.threads:
                del _sampled[model]
                for module, training in entry.modes:
                    module.training = training


def sampled_here(model: nn.Module) -> bool:
    """Whether this thread is in a block of :func:`evaluating` with the model."""
    entry = _sampled.get(model)
    return entry is not None and threading.get_ident() in entry.threads
