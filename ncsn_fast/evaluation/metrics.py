"""How far samples are from data, and a learned score from an exact one.

Belongs here: numbers computed from two sets of samples, in float64 on the CPU; the error of a score. Does not belong
here: pictures (``plots``), learned feature extractors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..models.base import ScoreModel


class PCAFeatures:
    """A fixed linear feature space: the leading principal components of a set of images.

    A small stand-in for the Inception network of the usual FID: fixed once the training set is, the same for every
    set compared, and it needs no download. Distances in it are in the units of the pixels.

    Args:
        images: ``(N, C, H, W)``, or anything whose first axis is the sample; N > ``dims``.
        dims: number of components, at most the number of values in an image.

    Raises:
        ValueError: too few images for the dimensions asked, or more dimensions than an image has values.
    """

    def __init__(self, images: Tensor, dims: int = 32) -> None:
        flat = _flat(images)
        if not 1 <= dims <= flat.shape[1]:
            raise ValueError(f"dims must be 1..{flat.shape[1]}, the values in an image, got {dims}")
        if len(flat) <= dims:
            raise ValueError(f"{dims} components need more than {dims} images, got {len(flat)}")
        self.mean = flat.mean(0)
        variances, axes = torch.linalg.eigh(
            torch.cov((flat - self.mean).T).reshape(flat.shape[1], -1)
        )
        self.axes = axes[:, -dims:].flip(1)
        self.explained = float(variances[-dims:].sum() / variances.sum())

    def __call__(self, images: Tensor) -> Tensor:
        """Features of ``images``, float64 ``(N, dims)``."""
        return (_flat(images) - self.mean) @ self.axes


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Frechet (2-Wasserstein, squared) distance between the Gaussians fitted to two sets of features.

    .. math:: \|\mu_a - \mu_b\|^2 + \mathrm{tr}\big(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}\big)

    The symmetric product has the eigenvalues of :math:`C_a C_b` and, unlike it, is diagonalised without complex
    numbers, so an eigen-decomposition gives the square root. Small sets are biased upwards: compare values that
    were computed from sets of the same sizes.

    Args:
        a, b: features ``(N, D)`` and ``(M, D)``, N, M >= 2.

    Returns:
        the distance, >= 0, in squared units of the features.

    Raises:
        ValueError: other shapes, or values that are not finite.

    Reference: Dowson & Landau, "The Frechet distance between multivariate normal distributions", 1982; as FID,
    Heusel et al., 2017, `arXiv:1706.08500 <https://arxiv.org/abs/1706.08500>`_.
    """
    a, b = a.to("cpu", torch.float64), b.to("cpu", torch.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or len(a) < 2 or len(b) < 2:
        raise ValueError(
            f"features must be (N, D) and (M, D) with N, M >= 2, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite, got NaN or infinity")
    cov_a, cov_b = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # A covariance has no negative eigenvalue; what rounding leaves below zero is zero.
    product = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0)
    squared = (
        (a.mean(0) - b.mean(0)).square().sum()
        + cov_a.trace()
        + cov_b.trace()
        - 2 * product.sqrt().sum()
    )
    return max(0.0, float(squared))


def nearest_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Euclidean distance of each query image to its nearest reference image.

    Args:
        queries: ``(N, ...)``; references: ``(M, ...)``, M >= 1, the same shape after the first axis.

    Returns:
        float64 tensor ``(N,)``, in the units of the pixels summed over an image.

    Raises:
        ValueError: images of different shapes, or no reference.
    """
    if queries.shape[1:] != references.shape[1:] or len(references) == 0:
        raise ValueError(
            f"queries and references must be images of one shape, got {tuple(queries.shape)} and "
            f"{tuple(references.shape)}"
        )
    # The matrix-product form of cdist loses the digits of small distances, which are the ones looked for here.
    distances = torch.cdist(
        _flat(queries), _flat(references), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distances.amin(1)


def _flat(images: Tensor) -> Tensor:
    return images.detach().to("cpu", torch.float64).flatten(1)


@torch.no_grad()
def score_errors(
    model: ScoreModel, x: Tensor, exact: Callable[[Tensor, float], Tensor], *, seed: int = 0
) -> list[float]:
    r"""The relative error of a learned score at each level of its ladder, where the perturbed data lie.

    .. math:: \sqrt{E \| s - s^* \|^2 / E \| s^* \|^2}, \qquad x + \sigma z

    Args:
        model: with its ladder set.
        x: data ``(N, D)``.
        exact: ``exact(x, sigma)``.
        seed: of the noise.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    plain = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    result = []
    for level, sigma in enumerate(model.sigmas.tolist()):
        noisy = x + sigma * torch.randn(x.shape, **plain)
        right = exact(noisy, sigma)
        result.append(float((model.score(noisy, level) - right).norm() / right.norm()))
    return [round(value, 4) for value in result]
