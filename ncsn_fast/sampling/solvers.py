r"""Solvers for few passes: from noise to samples in one or two evaluations of the network at each of some levels.

Belongs here: solvers of the reverse process as short functions over a score and any part of a ladder. Does not belong
here: which levels are taken (``levels.py``), the loop (``engine.py``), Langevin dynamics (``langevin.py``).

All of them go from each sigma to the next, and from the last sigma to 0, where they end at the expected clean sample.
:math:`D_i = x_i + \sigma_i^2\, s(x_i, \sigma_i)` is the expected clean sample at level i (Tweedie's formula).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import integer, number, positive_number
from .defaults import SNR
from .engine import Chain
from .ode import heun_update
from .steps import Position, Update

Score = Callable[[Tensor, Any], Tensor]
Drawn = Tensor | tuple[Tensor, Tensor]


@torch.no_grad()
def euler(score: Score, init: Tensor, sigmas: Sequence[float], **run: Any) -> Drawn:
    r"""Euler's method on the probability-flow ODE; for variance exploding noise this is DDIM. Order 1.

    .. math:: x_{i+1} = x_i + \sigma_i (\sigma_i - \sigma_{i+1})\, s(x_i, \sigma_i)

    One evaluation of the score a level.

    Args:
        score: ``score(x, condition)`` gives the score at ``x``, in its shape and any floating dtype.
        init: where to start, ``(N, ...)``: noise of the first sigma; not modified.
        sigmas: the levels, positive, strictly descending. The last step goes from the last of them to 0.
        run: ``conditions``, what the score is asked with at each level: ``None`` for the level's number in ``sigmas``,
            or numbers of levels of a network's own ladder, or the sigmas themselves. And ``seed``, ``sample_offset``,
            ``verbose``, ``callback``, ``known``, ``mask``, ``return_intermediates``, ``clip_end`` and ``cuda_graph``,
            as in :func:`~ncsn_fast.sampling.annealed_langevin`.

    Returns:
        Samples in the shape of ``init``, contiguous, float64 if ``init`` is, else float32. With
        ``return_intermediates``, that and a tensor ``(M, N, ...)`` of the states.

    Raises:
        ValueError: levels that do not descend, or conditions of another number.
        ScoreError: the score was NaN or infinite; the message says from which step on.

    Reference: Song et al., 2020, "Denoising Diffusion Implicit Models", `arXiv:2010.02502
    <https://arxiv.org/abs/2010.02502>`_, equation 13 with section 4.3.
    """
    chain, steps = _start(score, init, sigmas, run)
    rows = [(1.0, sigma * (sigma - target), 0.0) for sigma, target in steps]
    step = linear_update(chain, rows, noisy=False)
    return chain.run([[step]] * len(steps))


@torch.no_grad()
def heun(
    score: Score,
    init: Tensor,
    sigmas: Sequence[float],
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float | None = None,
    churn_noise: float = 1.0,
    **run: Any,
) -> Drawn:
    r"""Heun's method, with the churn of EDM: noise that is added before each step. Order 2 without churn.

    With :math:`\gamma_i = \min(S_\text{churn} / K, \sqrt 2 - 1)` where :math:`S_\min \le \sigma_i \le S_\max`, else 0:

    .. math::
        \hat\sigma_i &= (1 + \gamma_i)\, \sigma_i, \qquad
        \hat x = x_i + S_\text{noise} \sqrt{\hat\sigma_i^2 - \sigma_i^2}\, z \\
        d &= -\hat\sigma_i\, s(\hat x, \hat\sigma_i), \qquad
        x' = \hat x + (\sigma_{i+1} - \hat\sigma_i)\, d \\
        x_{i+1} &= \hat x + \tfrac12 (\sigma_{i+1} - \hat\sigma_i)
          \big(d - \sigma_{i+1}\, s(x', \sigma_{i+1})\big)

    Two evaluations of the score a level, and one at the last, whose step to 0 is Euler's.

    Args:
        score, init, sigmas, run: as in :func:`euler`.
        churn: :math:`S_\text{churn}`. Above 0 the score is asked between the levels: ``conditions`` must be the sigmas.
        churn_min, churn_max: :math:`S_\min` and :math:`S_\max`, the sigmas between which noise is added; ``None``: no
            upper end.
        churn_noise: :math:`S_\text{noise}`.

    Returns:
        As :func:`euler`.

    Raises:
        ValueError: a churn below 0; a churn above 0 with a score that can be asked only at levels; a ``churn_noise``
            that is not positive; else as :func:`euler`.

    Reference: Karras et al., 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
    `arXiv:2206.00364 <https://arxiv.org/abs/2206.00364>`_, algorithm 2.
    """
    churn_noise = positive_number("churn_noise", churn_noise)
    churn, churn_min = number("churn", churn), number("churn_min", churn_min)
    churn_max = math.inf if churn_max is None else number("churn_max", churn_max)
    if churn < 0:
        raise ValueError(f"churn must be at least 0, got {churn:g}")
    if not churn_min <= churn_max:
        raise ValueError(f"churn_min must be at most churn_max, {churn_max:g}, got {churn_min:g}")
    chain, steps = _start(score, init, sigmas, run)
    conditions = run.get("conditions")
    if churn and (conditions is None or not all(isinstance(c, float) for c in conditions)):
        raise ValueError(
            f"churn asks for the score between the levels, which takes a network over a continuous sigma, got {churn:g}"
        )
    most = min(churn / len(steps), math.sqrt(2) - 1)
    raised = [s * (1 + most) if churn_min <= s <= churn_max else s for s in chain.sigmas]
    ladder = chain.ladder(raised, raised) if churn else None
    added = chain.table(
        churn_noise * math.sqrt(high**2 - low**2)
        for high, low in zip(raised, chain.sigmas, strict=True)
    )
    variance = chain.table(sigma**2 for sigma in raised)
    heun_step = heun_update(chain, raised, ladder)

    def raise_noise(x: Tensor, position: Position) -> None:
        if churn:
            x.addcmul_(chain.normal(position.step), position.of(added))

    def step(x: Tensor, position: Position) -> None:
        raise_noise(x, position)
        heun_step(x, position)

    def last(x: Tensor, position: Position) -> None:
        raise_noise(x, position)
        x.addcmul_(chain.score(x, position, ladder), position.of(variance))

    return chain.run([[step]] * (len(steps) - 1) + [[last]])


@torch.no_grad()
def dpmpp_2m(score: Score, init: Tensor, sigmas: Sequence[float], **run: Any) -> Drawn:
    r"""DPM-Solver++ (2M): two steps' estimates of the clean sample, one evaluation of the score a level. Order 2.

    With :math:`h_i = \log(\sigma_i / \sigma_{i+1})` and :math:`r_i = h_{i-1} / h_i`,

    .. math::
        \hat D_i = D_i + \frac{1}{2 r_i} (D_i - D_{i-1}), \qquad
        x_{i+1} = e^{-h_i} x_i + (1 - e^{-h_i})\, \hat D_i

    The first step and the last, to 0, take :math:`\hat D_i = D_i`.

    Args, returns and errors: as in :func:`euler`.

    Reference: Lu et al., 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    `arXiv:2211.01095 <https://arxiv.org/abs/2211.01095>`_, algorithm 2, with :math:`\alpha_t = 1`.
    """
    chain, steps = _start(score, init, sigmas, run)
    kept = [(target / sigma, 0.0) for sigma, target in steps]
    step = linear_update(chain, _multistep_rows(steps, kept), noisy=False, multistep=True)
    return chain.run([[step]] * len(steps))


@torch.no_grad()
def dpmpp_2m_sde(score: Score, init: Tensor, sigmas: Sequence[float], **run: Any) -> Drawn:
    r"""SDE-DPM-Solver++ (2M): the same idea for the reverse SDE, with fresh noise in each step.

    With the same :math:`h_i` and :math:`\hat D_i` as in :func:`dpmpp_2m`, and :math:`z \sim N(0, I)`,

    .. math::
        x_{i+1} = e^{-2 h_i} x_i + (1 - e^{-2 h_i})\, \hat D_i + \sigma_{i+1} \sqrt{1 - e^{-2 h_i}}\, z

    One evaluation of the score a level. With :math:`\hat D_i = D_i` everywhere it would be :func:`ancestral`.

    Args, returns and errors: as in :func:`euler`.

    Reference: `arXiv:2211.01095 <https://arxiv.org/abs/2211.01095>`_, section 5 (SDE-DPM-Solver++ 2M).
    """
    chain, steps = _start(score, init, sigmas, run)
    kept = [((target / sigma) ** 2, _ancestral_spread(sigma, target)) for sigma, target in steps]
    step = linear_update(chain, _multistep_rows(steps, kept), multistep=True)
    return chain.run([[step]] * len(steps))


@torch.no_grad()
def ancestral(
    score: Score,
    init: Tensor,
    sigmas: Sequence[float],
    *,
    corrector_steps: int = 0,
    snr: float = SNR,
    **run: Any,
) -> Drawn:
    r"""Ancestral sampling of the reverse process, with Langevin steps at each level if wanted. Order 1.

    .. math::
        \text{corrector:}\quad & x \leftarrow x + \epsilon_i\, s(x, \sigma_i) + \sqrt{2 \epsilon_i}\, z, \qquad
          \epsilon_i = 2 (r \sigma_i)^2 \\
        \text{step:}\quad & x_{i+1} = x_i + (\sigma_i^2 - \sigma_{i+1}^2)\, s(x_i, \sigma_i)
          + \sigma_{i+1} \sqrt{1 - \sigma_{i+1}^2 / \sigma_i^2}\, z

    As :func:`~ncsn_fast.sampling.predictor_corrector` with its ancestral predictor, but the corrector may be left out,
    and the last step goes to 0. ``1 + corrector_steps`` evaluations of the score a level.

    Args:
        score, init, sigmas, run: as in :func:`euler`.
        corrector_steps: Langevin steps at each level, before the step to the next.
        snr: the ratio :math:`r` of the Langevin steps.

    Returns:
        As :func:`euler`.

    Raises:
        ValueError: ``corrector_steps < 0``, ``snr`` not positive; else as :func:`euler`.

    Reference: Song et al., 2021, `arXiv:2011.13456 <https://arxiv.org/abs/2011.13456>`_, appendix F, and algorithm 4
    for the corrector.
    """
    corrector_steps = integer("corrector_steps", corrector_steps, 0)
    snr = positive_number("snr", snr)
    chain, steps = _start(score, init, sigmas, run)
    # A Langevin step of size epsilon has noise of root 2 epsilon.
    correct = linear_update(
        chain, [(1.0, 2 * (snr * sigma) ** 2, 2 * snr * sigma) for sigma in chain.sigmas]
    )
    falls = [(1.0, s**2 - target**2, _ancestral_spread(s, target)) for s, target in steps]
    step = linear_update(chain, falls)
    return chain.run([[correct] * corrector_steps + [step]] * len(steps))


def linear_update(
    chain: Chain,
    rows: Iterable[Sequence[float]],
    *,
    noisy: bool = True,
    multistep: bool = False,
) -> Update:
    """An update with numbers of the level: ``x <- a x + b score + e previous + c z``, by ``ops.solver_step_``.

    Args:
        chain: whose state it is.
        rows: for each level (a, b, c), or (a, b, c, d, e).
        noisy: there is noise z, that of ``chain.normal``.
        multistep: there is ``previous``, ``x + d score`` of the update before; at first zero.
    """
    rows = [(*row, 0.0, 0.0)[:5] for row in rows]
    table = chain.table(value for row in rows for value in row).view(-1, 5)
    previous = torch.zeros_like(chain.x) if multistep else None

    def update(x: Tensor, position: Position) -> None:
        score, level = chain.score(x, position), position.level
        if chain.dtype == torch.float32:
            noise = {**chain.noise, "step": position.step} if noisy else {}
            ops.solver_step_(x, score, table, level, previous=previous, **noise)
        else:
            z = chain.normal(position.step) if noisy else None
            given = {"previous": previous, "noise": z, "backend": "reference"}
            ops.solver_step_(x, score, table, level, **given)

    return update


def _start(
    score: Score, init: Tensor, sigmas: Sequence[float], run: dict[str, Any]
) -> tuple[Chain, list[tuple[float, float]]]:
    """The chain, and each step's sigma and target."""
    chain = Chain(score, init, sigmas, like_init=True, **run)
    return chain, list(pairwise([*chain.sigmas, 0.0]))


def _ancestral_spread(sigma: float, target: float) -> float:
    """The noise that a step adds so that the target's variance is left."""
    return target * math.sqrt(1 - (target / sigma) ** 2)


def _multistep_rows(
    steps: Sequence[tuple[float, float]], kept: Sequence[tuple[float, float]]
) -> list[tuple[float, ...]]:
    r"""Rows of the update :math:`x = k x + (1 - k) \hat D + c z` with D extrapolated from this step and the one before.

    :math:`\hat D = (1 + q) D - q D_{i-1}` with :math:`q = 1 / (2 r)`, and :math:`D = x + \sigma^2 s` is what a step
    leaves for the next.

    Args:
        steps: each step's sigma and target.
        kept: each step's k and c.
    """
    heights = [math.log(sigma / target) for sigma, target in steps[:-1]]
    # None at the first step, and none at the last, which is infinitely high.
    ahead = [0.0, *(0.5 * now / before for before, now in pairwise(heights)), 0.0][: len(steps)]
    rows = []
    for (sigma, _), (k, c), q in zip(steps, kept, ahead, strict=True):
        new, variance = (1 - k) * (1 + q), sigma**2
        rows.append((k + new, new * variance, c, variance, -(1 - k) * q))
    return rows
