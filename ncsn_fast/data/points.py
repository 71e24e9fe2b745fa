"""Distributions of points in the plane, small enough to see a sampler fail, with exact scores where there are any.

Belongs here: drawing such points, and the score of their density at a noise level. Does not belong here: images
(``images.py``, ``folders.py``), pictures of points (``plots/figures.py``).

Points come from the noise stream: point ``i`` of a seed is the same whatever the number of points.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..checks import positive_int, positive_number
from ..streams import STREAM_POINTS, STREAM_POINTS_NOISE


@dataclasses.dataclass(frozen=True)
class GaussianMixture:
    r"""Equal parts of M Gaussians of one spherical covariance.

    Args:
        means: the M centres, each D coordinates.
        variance: of each Gaussian, in every direction.

    Raises:
        ValueError: no means, means of different lengths, or a variance that is not positive and finite.
    """

    means: tuple[tuple[float, ...], ...]
    variance: float

    def __post_init__(self) -> None:
        if not self.means or len({len(mean) for mean in self.means}) != 1:
            raise ValueError(
                f"means must be at least one point, all of one length, got {self.means}"
            )
        positive_number("variance", self.variance)

    def sample(self, n: int, *, seed: int = 0) -> Tensor:
        """``n`` points, float32 ``(n, D)``."""
        centres = torch.tensor(self.means, dtype=torch.float32, device="cpu")
        which = (_uniform((n, 1), seed)[:, 0] * len(centres)).long()
        return centres[which] + math.sqrt(self.variance) * _normal((n, centres.shape[1]), seed)

    def score(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        r"""The exact score of the points perturbed by :math:`\sigma z`, at ``x``.

        Perturbed, each Gaussian has the variance :math:`v + \sigma^2`; with the posterior :math:`r_m(x)` of its
        being the one, :math:`\nabla \log q_\sigma(x) = \sum_m r_m(x) (\mu_m - x) / (v + \sigma^2)`.

        Args:
            x: ``(N, D)``, floating point.
            sigma: the noise level, one number or ``(N,)``.

        Returns:
            ``(N, D)``, dtype and device of ``x``.
        """
        towards, variance = self._towards(x, sigma)
        posterior = (towards.square().sum(2) / (-2 * variance)).softmax(1)
        return (posterior.unsqueeze(2) * towards).sum(1) / variance

    def log_density(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """The logarithm of the density of the perturbed points, ``(N,)``; arguments as of :meth:`score`."""
        towards, variance = self._towards(x, sigma)
        exponents = (towards.square().sum(2) / (-2 * variance)).logsumexp(1)
        normal = (2 * math.pi * variance[:, 0]).log() * (x.shape[1] / 2)
        return exponents - normal - math.log(len(self.means))

    def mode_weights(self, x: Tensor) -> list[float]:
        """The share of the points that are nearest to each of the means."""
        nearest = self._towards(x, 0.0)[0].square().sum(2).argmin(1)
        return (nearest.bincount(minlength=len(self.means)) / len(x)).tolist()

    def _towards(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """From each point to each mean, ``(N, M, D)``, and the perturbed variance, ``(N, 1)`` or ``(1, 1)``."""
        means = torch.tensor(self.means, dtype=x.dtype, device=x.device)
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1)
        return means - x.unsqueeze(1), self.variance + sigma**2


@dataclasses.dataclass(frozen=True)
class Checkerboard:
    r"""Points spread evenly over the dark squares of a board that is centred on the origin.

    The square of ``(x, y)`` is dark where :math:`\lfloor x / w \rfloor + \lfloor y / w \rfloor` is even. It must be
    the floor: truncation towards zero gives the four squares around the origin one number, and so spoils the pattern.

    Args:
        squares: along each side, an even number.
        width: :math:`w`, of a square.

    Raises:
        ValueError: ``squares`` not an even number of at least 2; a width that is not positive and finite.
    """

    squares: int = 4
    width: float = 1.0

    def __post_init__(self) -> None:
        if positive_int("squares", self.squares) % 2:
            raise ValueError(f"squares must be an even number, got {self.squares}")
        positive_number("width", self.width)

    def sample(self, n: int, *, seed: int = 0) -> Tensor:
        """``n`` points, float32 ``(n, 2)``."""
        u = _uniform((n, 4), seed)
        column = (u[:, 0] * self.squares).long()
        # Every column holds the same number of dark squares: every other one, from a row of the column's parity.
        row = 2 * (u[:, 1] * (self.squares // 2)).long() + column % 2
        corner = torch.stack([column, row], 1) - self.squares // 2
        return self.width * (corner + u[:, 2:])

    def is_dark(self, x: Tensor) -> Tensor:
        """Which of the points ``(N, 2)`` lie in a dark square of the board, bool ``(N,)``."""
        square = (x / self.width).floor().long()
        half = self.squares // 2
        on_board = ((square >= -half) & (square < half)).all(1)
        return on_board & (square.sum(1) % 2 == 0)

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        r"""The exact score of the points perturbed by :math:`\sigma z`, :math:`\sigma > 0`.

        The perturbed density is a sum over the dark squares of products of two one-dimensional factors, each an evenly
        spread coordinate convolved with a Gaussian, :math:`\Phi((b - x) / \sigma) - \Phi((a - x) / \sigma)`. In
        float64, but far outside the board (tens of :math:`\sigma`) the factors underflow, and the score is NaN.

        Args:
            x: ``(N, 2)``, floating point.
            sigma: the noise level, one number or ``(N,)``.

        Returns:
            ``(N, 2)``, dtype and device of ``x``.
        """
        half = self.squares // 2
        edges = torch.arange(-half, half + 1, device=x.device, dtype=torch.float64) * self.width
        sigma = torch.as_tensor(sigma, device=x.device, dtype=torch.float64).reshape(-1, 1, 1)
        # Both coordinates at once: (N, 2, squares + 1) distances to the edges, in units of sigma.
        distance = (edges - x.double().unsqueeze(2)) / sigma
        # erfc of the side where it is small, so that the difference keeps its digits in the tails.
        low, high = distance[..., :-1], distance[..., 1:]
        flip = low > 0
        below, above = torch.where(flip, -high, low), torch.where(flip, -low, high)
        mass = (torch.erfc(-above / math.sqrt(2)) - torch.erfc(-below / math.sqrt(2))) / 2
        bell = torch.exp(-(distance**2) / 2) / math.sqrt(2 * math.pi)
        slope = (bell[..., :-1] - bell[..., 1:]) / sigma
        index = torch.arange(self.squares, dtype=torch.int64, device=x.device)
        dark = ((index[:, None] + index[None, :]) % 2 == 0).double()
        (mx, my), (sx, sy) = mass.unbind(1), slope.unbind(1)
        density = torch.einsum("nc,cr,nr->n", mx, dark, my)
        along_x = torch.einsum("nc,cr,nr->n", sx, dark, my)
        along_y = torch.einsum("nc,cr,nr->n", mx, dark, sy)
        return (torch.stack([along_x, along_y], 1) / density.unsqueeze(1)).to(x.dtype)


def two_gaussians() -> GaussianMixture:
    """Two round heaps, N((-3, 0), 0.25 I) and N((3, 0), 0.25 I)."""
    return GaussianMixture(means=((-3.0, 0.0), (3.0, 0.0)), variance=0.25)


def eight_gaussians(radius: float = 4.0, variance: float = 0.04) -> GaussianMixture:
    """Eight small heaps on a circle."""
    angles = [2 * math.pi * i / 8 for i in range(8)]
    means = tuple((radius * math.cos(angle), radius * math.sin(angle)) for angle in angles)
    return GaussianMixture(means, variance)


def two_moons(n: int, noise: float = 0.1, *, seed: int = 0) -> Tensor:
    """Two half circles of radius 2 that reach into one another, float32 ``(n, 2)``, with Gaussian noise."""

    def curve(t: Tensor, branch: Tensor) -> Tensor:
        x, y = torch.cos(math.pi * t), torch.sin(math.pi * t)
        return 2 * torch.stack([x + branch - 0.5, (1 - 2 * branch) * y + 0.5 * branch - 0.25], 1)

    return _along(curve, n, noise, seed)


def spirals(n: int, noise: float = 0.1, *, seed: int = 0) -> Tensor:
    """Two arms of one and a half turns, out to a radius of 4, float32 ``(n, 2)``, with Gaussian noise."""

    def curve(t: Tensor, branch: Tensor) -> Tensor:
        root = t.sqrt()  # so that the points are about evenly dense along an arm
        angle = math.pi * (3 * root + branch)
        return 4 * root.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1)

    return _along(curve, n, noise, seed)


def swiss_roll(n: int, noise: float = 0.1, *, seed: int = 0) -> Tensor:
    """The Swiss roll seen from its end: one arm of a turn and a half, float32 ``(n, 2)``, with Gaussian noise."""

    def curve(t: Tensor, branch: Tensor) -> Tensor:
        angle = 1.5 * math.pi * (1 + 2 * t)
        return (
            4 * (angle / (4.5 * math.pi)).unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1)
        )

    return _along(curve, n, noise, seed)


def _along(curve: Callable[[Tensor, Tensor], Tensor], n: int, noise: float, seed: int) -> Tensor:
    """Noisy points of ``curve(t, branch)``, t even in [0, 1) and the branch 0 or 1, both ``(n,)``."""
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise must be >= 0 and finite, got {noise}")
    u = _uniform((n, 2), seed)
    return curve(u[:, 0], (u[:, 1] >= 0.5).float()) + noise * _normal((n, 2), seed)


def _uniform(shape: tuple[int, int], seed: int) -> Tensor:
    shape = (positive_int("n", shape[0]), shape[1])
    return ops.philox_uniform(shape, seed=seed, stream=STREAM_POINTS)


def _normal(shape: tuple[int, int], seed: int) -> Tensor:
    return ops.philox_normal(shape, seed=seed, stream=STREAM_POINTS_NOISE)
