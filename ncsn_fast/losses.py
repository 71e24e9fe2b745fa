"""Denoising score matching: the perturbation of data and the error of a score.

Belongs here: objectives, as functions of tensors. Does not belong here: networks, optimisers, the
choice of levels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def perturb(x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    r"""Data at a noise level: :math:`\tilde x = x + \sigma z`.

    The score of :math:`q_\sigma(\tilde x \mid x) = N(x, \sigma^2 I)`, which a network learns to
    predict, is :math:`-(\tilde x - x) / \sigma^2 = -z / \sigma`.

    Args:
        x: data, ``(N, ...)``, floating point.
        sigma: standard deviations, ``(N,)``, or ``(1,)`` for the whole batch.
        noise: :math:`z \sim N(0, I)`, the shape of ``x``.

    Returns:
        :math:`\tilde x`, shape and dtype of ``x``; computed in the widest of the three dtypes.
    """
    return (x + _per_sample(sigma, x) * noise).to(x.dtype)


def denoising_score_matching_loss(score: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    r"""The sigma^2-weighted denoising score matching objective, averaged over the batch.

    .. math:: \frac{1}{N} \sum_n \sum_{CHW} \big(\sigma_n\, s(\tilde x_n, \sigma_n) + z_n\big)^2

    This is :math:`\lambda(\sigma) \| s - \nabla \log q_\sigma \|^2` with
    :math:`\lambda(\sigma) = \sigma^2`. There is no factor 1/2; the paper's equation (5) has one, so
    its losses are half of these.

    Args:
        score: the prediction at ``perturb(x, sigma, noise)``, ``(N, ...)``, floating point.
        sigma: standard deviations, ``(N,)`` or ``(1,)``.
        noise: the :math:`z` of the perturbation, the shape of ``score``.

    Returns:
        0-d tensor, float32 (float64 if ``score`` is): half-precision scores are summed in float32.

    Reference: Song & Ermon, 2019, `arXiv:1907.05600 <https://arxiv.org/abs/1907.05600>`_,
    equations (5) and (6).
    """
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    error = _per_sample(sigma, score) * score + noise
    return error.square().flatten(1).sum(1).mean()


def _per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    """One value a sample, shaped to broadcast against ``x``."""
    return sigma.reshape(-1, *(1,) * (x.ndim - 1))
