"""From a network to samples, by any sampler: the rules that all networks share.

Belongs here: :func:`draw`, which every network's ``sample`` calls, and evaluation mode meanwhile. Does not belong
here: the samplers (``samplers.py``), networks.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import one_of, positive_int
from ..progress import say
from .auto import AUTO, in_words, resolve
from .defaults import N_STEPS_EACH
from .levels import SPACINGS, spaced_levels, spaced_sigmas
from .samplers import PRIOR, STARTS, WATCHED, Sampler, find, own_options
from .start import check_init, draw_seed, initial_state
from .steps import use_graphs


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
    n_steps_each: int | None = None,
    denoise: bool | None = None,
    clip: tuple[float, float] | None = None,
    init: Tensor | None = None,
    init_dist: str | None = None,
    seed: int | None = None,
    sample_offset: int = 0,
    tuned: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Samples of a network, in evaluation mode meanwhile: the rules of all networks.

    Args:
        model: the network.
        name: of the sampler, or ``"auto"``.
        scores: ``"level"`` to ``score(x, level)``, ``"sigma"`` to ``score(x, sigma)``, what the network has; x is
            float32.
        shape: of the result, the sample first.
        sigmas: the ladder.
        device, layout: where and how the state lies.
        n_steps_each: steps at each level; ``None``: 100. Samplers for few passes take none.
        denoise: end with one step to the expected clean sample; ``None``: no. Samplers for few passes always do.
        clip: clamp to this range: at the end, and after every step if the sampler's record says so and the two ends
            are opposite.
        init: where to start; not modified.
        init_dist: without ``init``, the distribution to start from; ``None``: the sampler's default.
        seed, sample_offset: of all the randomness.
        tuned: what ``"auto"`` takes before its own table.
        options: those of the sampler's record; ``None``: not given.

    Raises:
        ValueError, TypeError: an argument out of its range, of another type, or not of this sampler.
        ScoreError: the network gave NaN or infinity.
    """
    asked = name
    name, options = resolve(name, options, _levels_to_choose_from(scores, sigmas), tuned)
    if asked == AUTO and options.get("verbose"):
        say(f"sampler {AUTO}: {in_words(name, options)}")
    sampler = find(name, tuple(scores))
    own = own_options(name, sigmas, options)
    of, steps = sampler.of, {}
    if sampler.level_count is None:
        steps["n_steps_each"] = N_STEPS_EACH if n_steps_each is None else n_steps_each
        steps["denoise"] = bool(denoise)
    else:
        _refuse_steps(asked, n_steps_each, denoise)
        count = _levels_for_passes(sampler, own, own.pop("passes"))
        of, sigmas, steps["conditions"] = _levels_to_take(scores, sigmas, count, own.pop("levels"))
    watched = {k: v for k, v in options.items() if k in WATCHED and v is not None}
    seed = draw_seed() if seed is None else seed
    noise = {"seed": seed, "sample_offset": sample_offset}
    init = _start(sampler, name, init, init_dist, shape, sigmas[0], noise, device)
    if layout == torch.channels_last:
        init = init.to(memory_format=layout)
    run: dict[str, Any] = {**own, **watched, **noise, **steps, "clip_end": clip}
    run["cuda_graph"] = use_graphs(device, options.get("cuda_graph"))
    if clip is not None and clip[0] == -clip[1] and sampler.clips_every_step:
        run["clip"] = clip[1]
    with evaluating(model):
        return sampler.function(scores[of], init, sigmas, **run)


def callback_sigmas(
    name: str, of: Sequence[str], sigmas: Sequence[float], options: Mapping[str, Any]
) -> list[float]:
    """The noise level to name at each call of a callback.

    Of a sampler on a ladder it is the level whose steps are done. One for few passes has gone to the next level that it
    takes, and from the last to 0.

    Args:
        name: of the sampler, not ``"auto"``.
        of: what the network's score is a function of, ``"level"``, ``"sigma"`` or both.
        sigmas: the ladder.
        options: of the sampler; ``None``: not given.
    """
    sampler, own = find(name, of), own_options(name, sigmas, options)
    if sampler.level_count is None:
        return list(sigmas)
    count = _levels_for_passes(sampler, own, own["passes"])
    return [*_levels_to_take(of, sigmas, count, own["levels"])[1][1:], 0.0]


def _levels_to_choose_from(of: Iterable[str], sigmas: Sequence[float]) -> int | None:
    """How many levels a network can be asked at; ``None``: any number, of one over a continuous sigma."""
    return None if "sigma" in of else len(sigmas)


def _start(
    sampler: Sampler,
    name: str,
    init: Tensor | None,
    init_dist: str | None,
    shape: tuple[int, ...],
    first_sigma: float,
    noise: Mapping[str, int],
    device: torch.device,
) -> Tensor:
    """The first state: the one that was given, or noise of the sampler's kind."""
    if init_dist is not None and init_dist not in sampler.init_dists:
        if init_dist not in STARTS:
            raise ValueError(f"init_dist must be one of {STARTS}, got {init_dist!r}")
        raise ValueError(
            f"sampler {name!r} starts from init_dist {' or '.join(sampler.init_dists)}, got {init_dist!r}"
        )
    if init is not None:
        return check_init(init, shape).to(device)
    init_dist = init_dist or sampler.init_dists[0]
    if init_dist == PRIOR:
        return first_sigma * initial_state(shape, "normal", **noise, device=device)
    return initial_state(shape, init_dist, **noise, device=device)


def _refuse_steps(name: str, n_steps_each: int | None, denoise: bool | None) -> None:
    """ValueError for what a sampler for few passes does not take."""
    if n_steps_each is not None:
        raise ValueError(
            f"sampler {name!r} goes once down the levels: it takes passes, and no n_steps_each"
        )
    if denoise is not None and not denoise:
        raise ValueError(
            f"sampler {name!r} always ends at the expected clean sample: it takes no denoise=False"
        )


def _levels_for_passes(sampler: Sampler, own: Mapping[str, Any], passes: int | None) -> int | None:
    """At how many levels a sampler with these options can be for so many passes; ``None``: at all of the ladder."""
    if passes is None:
        return None
    count = sampler.level_count(positive_int("passes", passes), own)
    if count < 1:
        raise ValueError(f"passes must be enough for one level, got {passes}")
    return count


def _levels_to_take(
    of: Iterable[str],
    sigmas: Sequence[float],
    count: int | None,
    spacing: str,
) -> tuple[str, list[float], list[float] | list[int] | None]:
    """The levels at which a network is asked, if there shall be ``count`` of them.

    A network over a continuous sigma is asked at any sigma between the ends of its ladder, another one at its levels.

    Returns:
        ``"sigma"`` or ``"level"``, which of the network's scores is asked; the sigmas; and what the score is asked
        with at each: the sigma, or the level's number; ``None``: the numbers 0, 1, ...
    """
    one_of("levels", spacing, SPACINGS)
    if "sigma" in of:
        chosen = list(sigmas)
        if count is not None:
            chosen = spaced_sigmas(sigmas[0], sigmas[-1], count, spacing)
        return "sigma", chosen, chosen
    if count is None:
        return "level", list(sigmas), None
    levels = spaced_levels(sigmas, count, spacing)
    return "level", [sigmas[level] for level in levels], levels


@dataclasses.dataclass
class _InUse:
    """A model that is being sampled.

    Attributes:
        threads: that sample it, each once for every call.
        modes: its modules, and whether each was in training mode before the first call.
    """

    threads: list[int]
    modes: list[tuple[nn.Module, bool]]


_sampled: weakref.WeakKeyDictionary[nn.Module, _InUse] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a block; then each module has its own mode back.

    Where blocks of several threads (or one within another) overlap, the first notes the modes and the last restores.
    """
    me = threading.get_ident()
    with _lock:
        if model not in _sampled:
            _sampled[model] = _InUse([], [(m, m.training) for m in model.modules()])
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
