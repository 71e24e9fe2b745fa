"""From a network to samples, by any sampler: the rules that all networks share.

Belongs here: :func:`draw`, which every network's ``sample`` calls, and evaluation mode meanwhile. Does not belong
here: the samplers (``samplers.py``), networks.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import positive_number
from .samplers import PRIOR, STARTS, WATCHED, find, own_options
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
