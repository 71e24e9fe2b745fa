"""How far samples are from data, and a learned score from an exact one.

Belongs here: numbers computed from two sets of samples, in float64 on the CPU; the error of a score. Does not belong
here: pictures (``plots``), learned feature networks (``features.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..data import ImageDataset
from ..models.base import ScoreModel

PART = 1024  # references at a time


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
        self.name = f"{dims} principal components of the training images' pixels"

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
    return _distances(_flat(queries), _flat(references)).amin(1)


def nearest_images(
    queries: Tensor, references: Tensor | ImageDataset, k: int
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest of many images to each query, by the Euclidean distance of pixels; a part of them at a time.

    Args:
        queries: ``(N, ...)``; references: ``(M, ...)``, M >= k.

    Returns:
        distances, float64 ``(N, k)``, ascending, and the numbers of the references, int64 ``(N, k)``.

    Raises:
        ValueError: images of different shapes, or fewer than ``k`` references.
    """
    if queries.shape[1:] != references.shape[1:] or not 1 <= k <= len(references):
        raise ValueError(
            f"queries and references must be images of one shape, {k} references at least, got "
            f"{tuple(queries.shape)} and {tuple(references.shape)}"
        )
    flat = _flat(queries)
    best = torch.full((len(flat), 0), 0.0, dtype=torch.float64, device="cpu")
    where = torch.empty((len(flat), 0), dtype=torch.int64, device="cpu")
    for begin in range(0, len(references), PART):
        some = _flat(references[begin : begin + PART])
        numbers = torch.arange(begin, begin + len(some), dtype=torch.int64, device="cpu")
        best = torch.cat([best, _distances(flat, some)], 1)
        where = torch.cat([where, numbers.expand(len(flat), -1)], 1)
        best, order = best.topk(min(k, best.shape[1]), largest=False)
        where = where.gather(1, order)
    return best, where


def precision_recall(real: Tensor, drawn: Tensor, k: int = 3) -> tuple[float, float]:
    """How many samples look real, and how many real images the samples reach.

    A set of features covers the balls around its points that reach to their k-th nearest neighbour in the set.
    Precision is the part of the samples that the real images cover; recall that of the real images that the samples
    cover.

    Args:
        real, drawn: features ``(N, D)`` and ``(M, D)``, N, M > k; of about the same sizes, with which both rise.
        k: of the neighbour.

    Raises:
        ValueError: other shapes, or too few.

    Reference: Kynkaanniemi et al., 2019, `arXiv:1904.06991 <https://arxiv.org/abs/1904.06991>`_, equations (1), (2).
    """
    real, drawn = real.to("cpu", torch.float64), drawn.to("cpu", torch.float64)
    if real.ndim != 2 or drawn.ndim != 2 or real.shape[1] != drawn.shape[1]:
        raise ValueError(
            f"features must be (N, D) and (M, D), got {tuple(real.shape)} and {tuple(drawn.shape)}"
        )
    if min(len(real), len(drawn)) <= k:
        raise ValueError(f"both sets must have more than {k} features")

    def radii(x: Tensor) -> Tensor:
        # The nearest of all is the point itself.
        return _distances(x, x).kthvalue(k + 1, dim=1).values

    across = _distances(drawn, real)
    precision = (across <= radii(real)).any(1).double().mean()
    recall = (across.T <= radii(drawn)).any(1).double().mean()
    return float(precision), float(recall)


def kernel_distance(a: Tensor, b: Tensor, *, seed: int = 0) -> tuple[float, float] | None:
    """The kernel distance (KID) of two sets of features, by torchmetrics: the mean and spread over random subsets.

    100 subsets of 1000, or of all features if there are fewer. Unlike the Frechet distance it is not biased by the
    sizes of the sets.

    Returns:
        mean and standard deviation; ``None`` if torchmetrics is not installed.

    Reference: Binkowski et al., 2018, `arXiv:1801.01401 <https://arxiv.org/abs/1801.01401>`_.
    """
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError:
        return None
    size = min(1000, len(a), len(b))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        metric = KernelInceptionDistance(torch.nn.Identity(), subset_size=size)
    for features, real in ((a, True), (b, False)):
        metric.update(features.to("cpu", torch.float64), real=real)
    with torch.random.fork_rng(devices=[]):  # which chooses the subsets
        torch.manual_seed(seed)
        mean, spread = metric.compute()
    return float(mean), float(spread)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # The matrix-product form loses the digits of small distances, which are the ones looked for here.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


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
