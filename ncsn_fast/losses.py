"""Denoising score matching: the perturbation of data, the error of a score, and how noise levels are weighted.

Belongs here: objectives, as functions of tensors. Does not belong here: networks, optimisers, the
choice of levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import ops
from .checks import one_of
from .embeddings import SigmaEmbedding
from .streams import STREAM_TRAINING

WEIGHTINGS = ("sigma2", "one")
REDUCTIONS = ("mean", "none")


class LearnedWeighting(nn.Module):
    r"""A weighting of the noise levels that is learned with the network: the harder a level, the less it counts.

    .. math:: \lambda(\sigma) = \frac{\sigma^2}{D\, e^{u(\sigma)}}, \qquad
              \text{loss} = \lambda(\sigma) \| s - \nabla \log q_\sigma \|^2 + u(\sigma)

    At its best :math:`e^u` is the mean error of the level, in units of the noise and per dimension D, so that every
    level contributes the same. Give its parameters to the optimiser too; :func:`~ncsn_fast.training.train` does so.
    :math:`u` is a linear function of sines and cosines of :math:`\log \sigma`, zero at first.

    Args:
        width: of that embedding.
        device, dtype: as of PyTorch's layers.

    Shape:
        sigma ``(N,)`` -> u ``(N,)``.

    Reference: Kendall, Gal & Cipolla, 2018, `arXiv:1705.07115 <https://arxiv.org/abs/1705.07115>`_; for noise levels
    Karras et al., 2024, `arXiv:2312.02696 <https://arxiv.org/abs/2312.02696>`_, section 3.1.
    """

    def __init__(
        self,
        width: int = 16,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embedding = SigmaEmbedding(width, device=device, dtype=dtype)
        self.linear = nn.Linear(width, 1, device=device, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, sigma: Tensor) -> Tensor:
        with torch.autocast(sigma.device.type, enabled=False):  # a loss is no place for rounding
            return self.linear(self.embedding(sigma.to(self.linear.weight.dtype)))[:, 0]


Weighting = str | LearnedWeighting


def perturb(x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    r"""Data at a noise level: :math:`\tilde x = x + \sigma z`.

    The score of :math:`q_\sigma(\tilde x \mid x) = N(x, \sigma^2 I)`, which a network learns to
    predict, is :math:`-(\tilde x - x) / \sigma^2 = -z / \sigma`; :func:`target_score` computes it.

    Args:
        x: data, ``(N, ...)``, floating point.
        sigma: standard deviations, ``(N,)``, or ``(1,)`` for the whole batch.
        noise: :math:`z \sim N(0, I)`, the shape of ``x``.

    Returns:
        :math:`\tilde x`, shape and dtype of ``x``; computed in the widest of the three dtypes.
    """
    return (x + _per_sample(sigma, x) * noise).to(x.dtype)


def target_score(sigma: Tensor, noise: Tensor) -> Tensor:
    r"""The score of the perturbation, :math:`-z / \sigma`, which a network learns to predict on average.

    Args:
        sigma: standard deviations, ``(N,)`` or ``(1,)``.
        noise: the :math:`z` of :func:`perturb`, ``(N, ...)``.
    """
    return -noise / _per_sample(sigma, noise)


def denoising_score_matching_loss(
    score: Tensor, sigma: Tensor, noise: Tensor, weighting: Weighting = "sigma2"
) -> Tensor:
    r"""The weighted denoising score matching objective, averaged over the batch.

    .. math:: \frac{1}{N} \sum_n \lambda(\sigma_n)
              \Big\| s(\tilde x_n, \sigma_n) + \frac{z_n}{\sigma_n} \Big\|^2
              \quad\overset{\lambda = \sigma^2}{=}\quad
              \frac{1}{N} \sum_n \big\| \sigma_n\, s(\tilde x_n, \sigma_n) + z_n \big\|^2

    There is no factor 1/2; the paper's equation (5) has one, so its losses are half of these.

    Args:
        score: the prediction at ``perturb(x, sigma, noise)``, ``(N, ...)``, floating point.
        sigma: standard deviations, ``(N,)`` or ``(1,)``.
        noise: the :math:`z` of the perturbation, the shape of ``score``.
        weighting: :math:`\lambda`: ``"sigma2"``, with which the noise levels count about the same; ``"one"``, with
            which the smallest ones outweigh all others by the ratio of their squares; or a :class:`LearnedWeighting`.

    Returns:
        0-d tensor, float32 (float64 if ``score`` is): half-precision scores are summed in float32.

    Raises:
        ValueError: an unknown weighting.

    Reference: Song & Ermon, 2019, `arXiv:1907.05600 <https://arxiv.org/abs/1907.05600>`_,
    equations (5) and (6).
    """
    learned = isinstance(weighting, LearnedWeighting)
    if not learned and weighting not in WEIGHTINGS:
        raise ValueError(
            f"weighting must be one of {WEIGHTINGS} or a LearnedWeighting, got {weighting!r}"
        )
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    error = (_per_sample(sigma, score) * score + noise).square().flatten(1)
    if learned:
        u = weighting(sigma)
        return (error.mean(1) * torch.exp(-u) + u).mean()
    total = error.sum(1)
    return (total if weighting == "sigma2" else total / sigma.square()).mean()


def annealed_score_matching_loss(
    score: Tensor,
    sigma: Tensor,
    noise: Tensor,
    anneal_power: float = 2.0,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""The denoising objective as the authors' programs compute it: with a factor 1/2 and any power of sigma.

    .. math:: \frac{1}{2} \sigma_n^{a} \Big\| s(\tilde x_n, \sigma_n) + \frac{z_n}{\sigma_n} \Big\|^2

    With ``anneal_power`` 2 and 0 it is half of :func:`denoising_score_matching_loss` with ``"sigma2"`` and ``"one"``;
    0 is also their objective for a single noise level.

    Args:
        score: the prediction at ``perturb(x, sigma, noise)``, ``(N, ...)``, floating point.
        sigma: standard deviations, ``(N,)`` or ``(1,)``.
        noise: the :math:`z` of the perturbation, the shape of ``score``.
        anneal_power: a; 2 in all published settings.
        reduction: ``"mean"`` over the batch, or ``"none"``.

    Returns:
        0-d, or ``(N,)``; float32 (float64 if ``score`` is).

    Raises:
        ValueError: an unknown reduction.
    """
    one_of("reduction", reduction, REDUCTIONS)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    error = (_per_sample(sigma, score) * score + noise).square().flatten(1).sum(1)
    each = 0.5 * error * sigma ** (anneal_power - 2)
    return each.mean() if reduction == "mean" else each


def sliced_score_matching_loss(
    score: Callable[[Tensor], Tensor],
    noisy: Tensor,
    sigma: Tensor,
    vectors: Tensor,
    *,
    weighting: str = "sigma2",
    variance_reduced: bool = True,
) -> Tensor:
    r"""Sliced score matching of noisy data: the trace of the score's Jacobian along random directions.

    .. math:: \frac{1}{N} \sum_n \sigma_n^2 \, \frac{1}{P} \sum_p \Big(
              v_{pn}^T\, \nabla_x s(\tilde x_n)\, v_{pn} + \tfrac{1}{2} \| s(\tilde x_n) \|^2 \Big)

    As the 2019 program computes it, with :math:`v \sim N(0, I)`; the score is computed once for all directions. Needs
    second derivatives of the score. This is the form of less variance; the plain one has
    :math:`\tfrac{1}{2} (v_{pn}^T s)^2` in place of the norm, which has the same mean over directions. The factor 1/2 is
    that of score matching itself: but for a constant it is half of :func:`denoising_score_matching_loss`.

    Args:
        score: of a batch, in its shape; differentiable, without noise of its own.
        noisy: data at their noise levels, ``(N, ...)``, see :func:`perturb`.
        sigma: standard deviations, ``(N,)`` or ``(1,)``.
        vectors: directions, ``(P, N, ...)``.
        weighting: :math:`\lambda(\sigma)`, ``"sigma2"`` as above, or ``"one"``.
        variance_reduced: which form.

    Returns:
        0-d tensor, float32 (float64 if the score is), differentiable.

    Raises:
        ValueError: vectors of another shape; an unknown weighting.

    Reference: Song et al., 2019, `arXiv:1905.07088 <https://arxiv.org/abs/1905.07088>`_; Song & Ermon, 2019,
    `arXiv:1907.05600 <https://arxiv.org/abs/1907.05600>`_, equation (3).
    """
    one_of("weighting", weighting, WEIGHTINGS)
    if vectors.shape[1:] != noisy.shape or not len(vectors):
        raise ValueError(
            f"vectors must have shape (P, {', '.join(map(str, noisy.shape))}), got {tuple(vectors.shape)}"
        )
    with torch.enable_grad():
        noisy = noisy.detach().requires_grad_()
        s = score(noisy)
        s = s.to(torch.promote_types(s.dtype, torch.float32))
        each = 0.5 * s.square().flatten(1).sum(1) if variance_reduced else 0.0
        for v in vectors:
            (slope,) = torch.autograd.grad(s, noisy, v, create_graph=True)
            along = (slope * v).flatten(1).sum(1)
            if not variance_reduced:
                along = along + 0.5 * (s * v).flatten(1).sum(1).square()
            each = each + along / len(vectors)
        return (each * sigma.square() if weighting == "sigma2" else each).mean()


def loss_of_zero_score(dim: int, sigmas: Tensor, weighting: Weighting = "sigma2") -> float:
    """The expected loss of a network that knows nothing, the score 0, on a ladder: what training starts from or beats.

    Args:
        dim: numbers in a sample.
        sigmas: the ladder, ``(K,)``, whose levels are drawn evenly.
        weighting: see :func:`denoising_score_matching_loss`; a learned one counts as it is at first.
    """
    if isinstance(weighting, LearnedWeighting):
        return 1.0
    return (
        dim if weighting == "sigma2" else dim * float(sigmas.double().square().reciprocal().mean())
    )


def score_matching_loss(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    sigma: Tensor,
    *,
    seed: int,
    sample_offset: int = 0,
    weighting: Weighting = "sigma2",
) -> Tensor:
    """Perturb a batch with noise of the stream, ask for the score there, and compare.

    Args:
        score: of the perturbed batch, in its shape.
        x: data, ``(N, ...)``, floating point.
        sigma: standard deviations, ``(N,)``.
        seed: of the noise, ``0 <= seed < 2**64``.
        sample_offset: number of the first sample, for a part of a larger batch.
        weighting: see :func:`denoising_score_matching_loss`.

    Returns:
        0-d tensor, as of :func:`denoising_score_matching_loss`.
    """
    noise = perturbation_noise(x, seed, sample_offset)
    return denoising_score_matching_loss(score(perturb(x, sigma, noise)), sigma, noise, weighting)


def perturbation_noise(x: Tensor, seed: int, sample_offset: int = 0) -> Tensor:
    """The noise of :func:`score_matching_loss`, float32, in the shape of the data ``(N, ...)``."""
    place = {"seed": seed, "sample_offset": sample_offset, "device": x.device}
    return ops.philox_normal(x.shape, stream=STREAM_TRAINING, **place)


def _per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    """One value a sample, shaped to broadcast against ``x``."""
    return sigma.reshape(-1, *(1,) * (x.ndim - 1))
