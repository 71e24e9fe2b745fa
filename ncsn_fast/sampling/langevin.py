"""Samplers on a ladder of noise levels: from noise to samples, given only a score function.

Belongs here: samplers of Langevin steps, as short functions over ``score(x, level)``. Does not belong here: networks
(any function will do), the records of the samplers (``samplers.py``), the loop that all of them share (``engine.py``),
the arithmetic of one step (``ops.langevin_step_``), the probability-flow ODE (``ode.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import positive_int, positive_number
from .defaults import N_STEPS_EACH, SNR, STEP_LR
from .engine import Chain
from .steps import Position

PREDICTORS = ("reverse_diffusion", "ancestral")


@torch.no_grad()
def annealed_langevin(
    score: Callable[[Tensor, int], Tensor],
    init: Tensor,
    sigmas: Sequence[float],
    *,
    n_steps_each: int = N_STEPS_EACH,
    step_lr: float = STEP_LR,
    clip: float | None = None,
    clip_end: tuple[float, float] | None = None,
    denoise: bool = False,
    seed: int | None = None,
    sample_offset: int = 0,
    verbose: bool = False,
    callback: Callable[[int, Tensor], object] | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    return_intermediates: int | None = None,
    cuda_graph: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Annealed Langevin dynamics (Song & Ermon, 2019, algorithm 1).

    For each level :math:`i`, ``n_steps_each`` times, with :math:`z \sim N(0, I)`:

    .. math::
        \eta_i = \text{step\_lr} \cdot (\sigma_i / \sigma_K)^2, \qquad
        x \leftarrow x + \eta_i\, s(x, i) + \sqrt{2 \eta_i}\, z

    The paper writes :math:`\alpha_i / 2` and :math:`\sqrt{\alpha_i}`: its step size is twice this
    :math:`\eta_i`.

    Args:
        score: ``score(x, level)`` gives the score at ``x`` (float32) for level ``0 <= level < K``,
            in the shape of ``x`` and any floating dtype.
        init: where the chains start, ``(N, ...)``; it is not modified.
        sigmas: the ladder, K positive Python floats, strictly descending.
        n_steps_each: steps at each level.
        step_lr: step size at the last level, in squared units of the data.
        clip: clamp to ``[-clip, clip]`` after every step and at the end; ``None`` for no clamping.
        clip_end: clamp to this range at the end only; ``None``: as ``clip`` says.
        denoise: end with :math:`x \leftarrow x + \sigma_K^2\, s(x, K-1)` without noise: by Tweedie's
            formula, the expected clean image.
        seed: of the noise, ``0 <= seed < 2**64``. ``None``: drawn from torch's default CPU
            generator, so that ``torch.manual_seed`` governs.
        sample_offset: number of the first sample in the noise stream. Sample ``i`` of a seed has
            the same noise whatever the batch, so ``sample_offset`` continues a set of samples, here
            or in another process.
        verbose: show a progress bar with the level's sigma.
        callback: called as ``callback(level, x)`` after each level, with a copy of the state.
        known: values of a region that is given, for inpainting: of the shape of ``init``, or one
            that broadcasts to it. Before every step that region is set to ``known`` with noise of
            the level's sigma, drawn anew (stream 1, steps from 2**31 on); at the end, to ``known``.
        mask: bool, True where ``known`` is known; broadcasts too. Both or neither.
        return_intermediates: also return the state after every so many steps, kept on the device.
        cuda_graph: replay the steps from CUDA graphs. ``init`` is on a GPU then, and ``score`` is
            called with ``level`` as an int64 tensor ``(1,)``; it must not wait for the device.

    Returns:
        float32 tensor of the shape and on the device of ``init``, contiguous, without gradient.
        With ``return_intermediates``, that and a tensor ``(M, N, ...)`` of the states.

    Raises:
        ValueError: ``n_steps_each < 1``, ``step_lr`` not positive and finite, a ladder that does
            not descend, ``known`` or ``mask`` of a shape that does not fit.
        ScoreError: the score was NaN or infinite; the message says from which step on. Looked at
            after a hundred steps or more, at the end of a level, so that no step waits.

    Reference: `arXiv:1907.05600 <https://arxiv.org/abs/1907.05600>`_.
    """
    n_steps_each = positive_int("n_steps_each", n_steps_each)
    step_lr = positive_number("step_lr", step_lr)
    if clip is not None and clip_end is None:
        clip_end = (-clip, clip)
    chain = Chain(
        score,
        init,
        sigmas,
        clip_end=clip_end,
        seed=seed,
        sample_offset=sample_offset,
        known=known,
        mask=mask,
        verbose=verbose,
        callback=callback,
        return_intermediates=return_intermediates,
        cuda_graph=cuda_graph,
    )
    eta = chain.table(step_lr * (sigma / chain.sigmas[-1]) ** 2 for sigma in chain.sigmas)

    def langevin(x: Tensor, position: Position) -> None:
        step_size = position.of(eta)
        ops.langevin_step_(
            x, chain.score(x, position), step_size, step=position.step, clip=clip, **chain.noise
        )

    levels = [[langevin] * n_steps_each] * len(sigmas)
    return chain.run(levels, end=chain.denoise if denoise else None)


@torch.no_grad()
def consistent_annealed(
    score: Callable[[Tensor, int], Tensor],
    init: Tensor,
    sigmas: Sequence[float],
    *,
    n_steps_each: int = 1,
    step_lr: float = STEP_LR,
    denoise: bool = False,
    **run: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Consistent annealed sampling (Jolicoeur-Martineau et al., 2020, algorithm 2).

    Noise is added so that what remains of it is exactly the next level's: with
    :math:`\eta = \text{step\_lr} / \sigma_K^2`, from noise :math:`\sigma` to :math:`\sigma'`,

    .. math::
        x \leftarrow x + \eta \sigma^2 s(x, i) + \beta \sigma' z, \qquad
        \beta = \sqrt{1 - \big((1 - \eta)\, \sigma / \sigma'\big)^2}

    The last of a level's ``n_steps_each`` steps goes to the next level, those before it stay. After
    the last level :math:`\sigma' = 0`, as in the paper: its last step adds no noise. With
    ``denoise`` that step stays at the level, and the denoising step ends it.

    Args:
        score, sigmas, denoise: as in :func:`annealed_langevin`.
        init: clean data plus noise of the first sigma, or, if that is large, ``sigmas[0] * z``.
        n_steps_each: steps at each level; the paper has one, on a finer ladder.
        step_lr: :math:`\eta \sigma_K^2`. Needed: :math:`|1 - \eta| \le \sigma_{i+1} / \sigma_i`.
        run: ``seed``, ``sample_offset``, ``verbose``, ``callback``, ``known``, ``mask``,
            ``return_intermediates``, ``clip_end`` and ``cuda_graph``, as in :func:`annealed_langevin`.

    Returns:
        As :func:`annealed_langevin`.

    Raises:
        ValueError: a step size with which the noise cannot fall as fast as the ladder; else those of
            :func:`annealed_langevin`.

    Reference: `arXiv:2009.05475 <https://arxiv.org/abs/2009.05475>`_.
    """
    n_steps_each = positive_int("n_steps_each", n_steps_each)
    step_lr = positive_number("step_lr", step_lr)
    chain = Chain(score, init, sigmas, **run)
    sigmas = chain.sigmas
    rate = step_lr / sigmas[-1] ** 2
    steepest = min((low / high for high, low in pairwise(sigmas)), default=1.0)
    if abs(1 - rate) > steepest:
        raise ValueError(
            f"step_lr must be from {(1 - steepest) * sigmas[-1] ** 2:.3g} to "
            f"{(1 + steepest) * sigmas[-1] ** 2:.3g} on this ladder, whose steepest ratio is "
            f"{steepest:.3g}, got {step_lr:.3g}"
        )

    def noise_to(sigma: float, target: float) -> float:
        return math.sqrt(target**2 - ((1 - rate) * sigma) ** 2)

    eta = chain.table(rate * sigma**2 for sigma in sigmas)
    staying = chain.table(noise_to(sigma, sigma) for sigma in sigmas)
    falling = chain.table([*(noise_to(high, low) for high, low in pairwise(sigmas)), 0.0])

    def stay(x: Tensor, position: Position) -> None:
        s, z = chain.score(x, position), chain.normal(position.step)
        x.addcmul_(s, position.of(eta)).addcmul_(z, position.of(staying))

    def fall(x: Tensor, position: Position) -> None:
        s, z = chain.score(x, position), chain.normal(position.step)
        x.addcmul_(s, position.of(eta)).addcmul_(z, position.of(falling))

    levels = [[stay] * (n_steps_each - 1) + [fall]] * len(sigmas)
    if denoise:
        levels[-1] = [stay] * n_steps_each
    return chain.run(levels, end=chain.denoise if denoise else None)


@torch.no_grad()
def predictor_corrector(
    score: Callable[[Tensor, int], Tensor],
    init: Tensor,
    sigmas: Sequence[float],
    *,
    n_steps_each: int = 1,
    snr: float = SNR,
    predictor: str = "reverse_diffusion",
    denoise: bool = False,
    **run: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Predictor-corrector sampling of the variance exploding SDE (Song et al., 2021, algorithm 2).

    At each level ``n_steps_each`` corrector steps, Langevin dynamics whose step has the
    signal-to-noise ratio :math:`r` (algorithm 4); then the predictor's step to the next level:

    .. math::
        \text{corrector:}\quad &
        x \leftarrow x + \epsilon_i\, s(x, i) + \sqrt{2 \epsilon_i}\, z, \qquad
        \epsilon_i = 2 (r \sigma_i)^2 \\
        \text{reverse diffusion:}\quad &
        x \leftarrow x + (\sigma_i^2 - \sigma_{i+1}^2)\, s(x, i)
          + \sqrt{\sigma_i^2 - \sigma_{i+1}^2}\, z \\
        \text{ancestral:}\quad &
        \text{the same with noise } \sqrt{\sigma_{i+1}^2 (\sigma_i^2 - \sigma_{i+1}^2) / \sigma_i^2}

    The paper has :math:`\epsilon = 2 (r \|z\| / \|s\|)^2`. Here :math:`\sigma_i` stands for the ratio
    of the norms: a score is :math:`-E[z \mid x] / \sigma_i`, so the ratio is near
    :math:`\sigma_i` for images, and not below it on average. The norms themselves, of a sample,
    would bias few-dimensional data (:math:`\epsilon` would depend on z and on x); their mean over
    the batch, as in the authors' program, would let a sample depend on its neighbours.

    Args:
        score, sigmas, denoise: as in :func:`annealed_langevin`.
        init: noise of the first sigma, ``sigmas[0] * z``.
        n_steps_each: corrector steps at each level.
        snr: the ratio :math:`r`.
        predictor: ``"reverse_diffusion"`` or ``"ancestral"``.
        run: as in :func:`consistent_annealed`.

    Returns:
        As :func:`annealed_langevin`.

    Raises:
        ValueError: an unknown predictor, ``snr`` not positive; else those of
            :func:`annealed_langevin`.

    Reference: `arXiv:2011.13456 <https://arxiv.org/abs/2011.13456>`_, appendices F and G.
    """
    n_steps_each = positive_int("n_steps_each", n_steps_each)
    snr = positive_number("snr", snr)
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor must be one of {PREDICTORS}, got {predictor!r}")
    chain = Chain(score, init, sigmas, **run)
    epsilon = chain.table(2 * (snr * sigma) ** 2 for sigma in chain.sigmas)
    falls = [high**2 - low**2 for high, low in pairwise(chain.sigmas)]
    shrink = [
        low / high if predictor == "ancestral" else 1.0 for high, low in pairwise(chain.sigmas)
    ]
    drift = chain.table([*falls, 0.0])
    spread = chain.table([*(c * math.sqrt(d) for c, d in zip(shrink, falls, strict=True)), 0.0])

    def correct(x: Tensor, position: Position) -> None:
        ops.langevin_step_(
            x, chain.score(x, position), position.of(epsilon), step=position.step, **chain.noise
        )

    def predict(x: Tensor, position: Position) -> None:
        s, z = chain.score(x, position), chain.normal(position.step)
        x.addcmul_(s, position.of(drift)).addcmul_(z, position.of(spread))

    corrections = [correct] * n_steps_each
    levels = [[*corrections, predict]] * (len(sigmas) - 1) + [corrections]
    return chain.run(levels, end=chain.denoise if denoise else None)
