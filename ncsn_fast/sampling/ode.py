"""The probability-flow ODE: deterministic samples and likelihoods from a score over a continuous sigma.

Belongs here: what integrates the ODE, as short functions over ``score(x, sigma)``. Does not belong here: samplers on a
ladder of levels (``langevin.py``), the loop (``engine.py``), networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import positive_int
from ..schedules import check_sigmas
from ..streams import STREAM_PROBES
from .engine import Chain, Ladder
from .start import draw_seed
from .steps import Position

Score = Callable[[Tensor, float], Tensor]


@torch.no_grad()
def probability_flow(
    score: Score, init: Tensor, sigmas: Sequence[float], *, denoise: bool = False, **run: Any
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Integrate the probability-flow ODE from the first sigma down to the last, by Heun's method.

    .. math:: \frac{dx}{d\sigma} = -\sigma\, s(x, \sigma)

    Its solutions have, at every sigma, the distribution of the data with that much noise; nothing is random but the
    start. Two evaluations of the score a step; the error falls with the square of the step.

    Args:
        score: ``score(x, sigma)`` gives the score of the data with noise ``sigma``, a float, in the shape of ``x``.
        init: where the solutions start, ``(N, ...)``, float32 or float64: noise of the first sigma,
            ``sigmas[0] * initial_state(shape, "normal", seed=...)``; not modified.
        sigmas: the grid, strictly descending; such as ``make_sigmas(50.0, 0.01, 100)``.
        denoise: end with :math:`x + \sigma_K^2\, s(x, \sigma_K)`, which is one Euler step to 0.
        run: ``seed``, ``sample_offset``, ``verbose``, ``callback``, ``known``, ``mask``, ``return_intermediates``,
            ``clip_end`` and ``cuda_graph``, as in :func:`~ncsn_fast.sampling.annealed_langevin`, with the grid for its
            levels. The seed is only that of the known region's noise. With ``cuda_graph`` the score gets sigma as a
            tensor ``(1,)`` on the device, in the dtype of the state.

    Returns:
        Samples, shape, dtype and device of ``init``. With ``return_intermediates``, that and a tensor ``(M, N, ...)``
        of the states.

    Raises:
        ValueError: a grid that does not descend.
        ScoreError: the score was NaN or infinite; the message says from which step on.

    Reference: Song et al., 2021, `arXiv:2011.13456 <https://arxiv.org/abs/2011.13456>`_, equation 13, for variance
    exploding noise with sigma as time; Heun as in Karras et al., 2022, `arXiv:2206.00364
    <https://arxiv.org/abs/2206.00364>`_, algorithm 1.
    """
    sigmas = [float(sigma) for sigma in sigmas]
    chain = Chain(score, init, sigmas, conditions=sigmas, like_init=True, **run)
    heun = heun_update(chain, chain.sigmas)
    square = chain.table(sigma**2 for sigma in sigmas)

    def to_zero(x: Tensor, position: Position) -> None:
        x.add_(position.of(square) * chain.score(x, position).to(x.dtype))

    levels = [[heun]] * (len(sigmas) - 1) + [[]]  # the last level is where the solution ends
    drawn = chain.run(levels, end=to_zero if denoise else None)
    if isinstance(drawn, tuple):
        return drawn[0].to(init.dtype), drawn[1].to(init.dtype)
    return drawn.to(init.dtype)


def heun_update(
    chain: Chain, begin: Sequence[float], ladder: Ladder | None = None
) -> Callable[[Tensor, Position], None]:
    """An update by Heun's method along the ODE, from the state's noise to the next level of the chain.

    Args:
        chain: whose state it is.
        begin: the noise of the state at each level, before the step.
        ladder: where the score of that state is asked; ``None``: at the chain's level, whose noise it has.
    """
    falls = [target - sigma for sigma, target in zip(begin, chain.sigmas[1:], strict=False)]
    whole, half = chain.table([*falls, 0.0]), chain.table([*(fall / 2 for fall in falls), 0.0])
    negative = chain.table(-sigma for sigma in begin)
    negative_target = chain.table(-sigma for sigma in chain.sigmas)

    def heun(x: Tensor, position: Position) -> None:
        slope = position.of(negative) * chain.score(x, position, ladder).to(x.dtype)
        euler, target = x + position.of(whole) * slope, position.next_level()
        target_slope = target.of(negative_target) * chain.score(euler, target).to(x.dtype)
        x.add_(position.of(half) * (slope + target_slope))

    return heun


@torch.no_grad()
def log_likelihood(
    score: Score,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    n_probes: int = 1,
    seed: int | None = None,
    sample_offset: int = 0,
) -> Tensor:
    r"""The log-likelihood of data with noise of the last sigma, by the probability-flow ODE.

    .. math:: \log p_{\sigma_K}(x) = \log N(x_1; 0, \sigma_1^2 I)
              - \int_{\sigma_K}^{\sigma_1} \sigma\, \nabla \cdot s(x_\sigma, \sigma)\, d\sigma

    along the ODE's solution from ``x`` up to :math:`x_1`, by Heun's method. The divergence is
    Hutchinson's estimate :math:`\epsilon^T \nabla s\, \epsilon`, unbiased, with signs :math:`\epsilon_j = \pm 1` that
    are the same along the way (one vector-Jacobian product an evaluation and probe).

    Args:
        score: as in :func:`probability_flow`; differentiable in ``x``.
        x: data ``(N, ...)``, float32 or float64.
        sigmas: the grid, strictly descending. The first must be large beside the data: there the noisy data count as
            :math:`N(0, \sigma_1^2 I)`.
        n_probes: how many vectors of signs to average over.
        seed: of the signs, from the noise stream, a step for each probe; ``None``: drawn from torch's default CPU
            generator.
        sample_offset: number of the first sample in the noise stream.

    Returns:
        Natural logarithms of densities, float64 ``(N,)``. Divided by ``-D * log(2)`` they are bits a dimension.

    Raises:
        ValueError: a grid that does not descend, ``n_probes < 1``.

    Reference: Song et al., 2021, `arXiv:2011.13456 <https://arxiv.org/abs/2011.13456>`_, section 4.3 and appendix D.2;
    Hutchinson, 1990; Grathwohl et al., 2019, `arXiv:1810.01367 <https://arxiv.org/abs/1810.01367>`_.
    """
    check_sigmas(sigmas, len(sigmas))
    n_probes = positive_int("n_probes", n_probes)
    seed = draw_seed() if seed is None else seed
    place = {"seed": seed, "sample_offset": sample_offset, "device": x.device}
    uniform = (
        ops.philox_uniform(x.shape, stream=STREAM_PROBES, step=probe, **place)
        for probe in range(n_probes)
    )
    probes = [torch.where(u < 0.5, -1.0, 1.0).to(x.dtype) for u in uniform]

    def slopes(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The derivatives of x and of log p by sigma, along the solution."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            s = score(x, sigma)
            traces = [
                (probe * torch.autograd.grad(s, x, probe, retain_graph=True)[0]).flatten(1).sum(1)
                for probe in probes
            ]
        divergence = torch.stack(traces).double().mean(0)
        return -sigma * s.detach(), sigma * divergence

    gained = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    x = x.detach()
    for target, sigma in reversed(list(pairwise(sigmas))):  # from sigma up to target
        slope, gain = slopes(x, sigma)
        next_slope, next_gain = slopes(x + (target - sigma) * slope, target)
        x = x + (target - sigma) / 2 * (slope + next_slope)
        gained += (target - sigma) / 2 * (gain + next_gain)
    dim = x[0].numel()
    square = x.double().flatten(1).square().sum(1) / sigmas[0] ** 2
    prior = -0.5 * square - dim * math.log(sigmas[0] * math.sqrt(2 * math.pi))
    # log p grew by gained on the way up to the prior; so at x it is that much less.
    return prior - gained
