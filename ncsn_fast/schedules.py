"""Noise ladders: how the noise levels sigma_1 > ... > sigma_K are made and chosen, and what a valid ladder is.

Belongs here: functions from numbers (or data) to ladders and step sizes, and the check every ladder passes. Does not
belong here: what is done at a level (``sampling/langevin.py``, ``losses.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from .checks import positive_int, positive_number
from .data import ImageDataset
from .data.ranges import byte_hint

MOST_COMPARED = 10_000  # samples, each with each, for the largest distance


def make_sigmas(sigma_begin: float, sigma_end: float, num_scales: int) -> Tensor:
    r"""The geometric ladder from ``sigma_begin`` down to ``sigma_end``.

    .. math:: \sigma_i = \exp\big(\mathrm{linspace}(\log \sigma_1, \log \sigma_K, K)_i\big)

    Args:
        sigma_begin: the largest standard deviation, in the units of the data.
        sigma_end: the smallest one, positive and below ``sigma_begin``.
        num_scales: how many levels, at least 2.

    Returns:
        float32 tensor of shape ``(num_scales,)`` on the CPU, strictly descending.

    Raises:
        ValueError: a sigma that is not positive and finite, ``sigma_begin <= sigma_end``, or
            ``num_scales < 2``.
        TypeError: an argument that is not a number (for ``num_scales``, not an integer).

    Reference: Song & Ermon, 2019, "Generative Modeling by Estimating Gradients of the Data
    Distribution", `arXiv:1907.05600 <https://arxiv.org/abs/1907.05600>`_, section 4.1.
    """
    sigma_begin = positive_number("sigma_begin", sigma_begin)
    sigma_end = positive_number("sigma_end", sigma_end)
    if sigma_begin <= sigma_end:
        raise ValueError(
            "sigma_begin must be greater than sigma_end, "
            f"got sigma_begin={sigma_begin:g} and sigma_end={sigma_end:g}"
        )
    num_scales = positive_int("num_scales", num_scales)
    if num_scales < 2:
        raise ValueError(f"num_scales must be at least 2, got {num_scales}")
    # float64 until the end: float32 logarithms would move the ends by some units in the last place.
    log_sigmas = torch.linspace(
        math.log(sigma_begin), math.log(sigma_end), num_scales, dtype=torch.float64, device="cpu"
    )
    return log_sigmas.exp().to(torch.float32)


def estimate_sigma_begin(data: Tensor, *, block: int = 1024) -> float:
    """The largest Euclidean distance between two samples: a good largest noise level (technique 1).

    With that much noise every sample can turn into every other one.

    Args:
        data: ``(N, ...)``, N >= 2, floating point, on any device.
        block: so many samples are compared with so many at a time; memory for ``block**2`` distances.

    Raises:
        ValueError: fewer than two samples, all of them equal, or a value that is not finite.
        TypeError: not floating point: the distance is in the units of the data, which must be the network's.

    Reference: Song & Ermon, 2020, "Improved Techniques for Training Score-Based Generative Models",
    `arXiv:2006.09011 <https://arxiv.org/abs/2006.09011>`_, section 3.1.
    """
    block = positive_int("block", block)
    if not data.is_floating_point():
        raise TypeError(f"data must be floating point, got {data.dtype}{byte_hint(data.dtype)}")
    rows = data.detach().flatten(1).float().split(block) if len(data) > 1 else ()
    largest = torch.zeros((), dtype=torch.float32, device=data.device)
    for i, some in enumerate(rows):
        for others in rows[i:]:
            largest = torch.maximum(largest, torch.cdist(some, others).max())
    distance = float(largest)
    if not math.isfinite(distance):
        raise ValueError("the data hold a value that is not finite")
    if distance == 0:
        raise ValueError(
            "a largest noise level comes from at least two different images or vectors"
        )
    return distance


def suggest_sigma_begin(
    data: Tensor | ImageDataset, device: torch.device | str | None = None
) -> float:
    """The largest noise level that the commands ``train`` and ``schedule`` take for data: technique 1, to three digits.

    :func:`estimate_sigma_begin` of all the samples, or of 10,000 evenly spaced ones if there are more: with all pairs
    of a million images it would take longer than a training.

    Args:
        data: a data set, or ``(N, ...)``, N >= 2, floating point, on any device.
        device: where distances are taken; ``None``: where the data are.

    Raises:
        ValueError: as of :func:`estimate_sigma_begin`.
    """
    some = data[:: max(1, math.ceil(len(data) / MOST_COMPARED))]
    return float(f"{estimate_sigma_begin(some.to(device or some.device)):.3g}")


def suggest_num_scales(dim: int, sigma_begin: float, sigma_end: float, c: float = 0.5) -> int:
    r"""How many levels a geometric ladder needs so that neighbours overlap (technique 2).

    In ``dim`` dimensions the noise of a level has a radius near :math:`\sqrt{D}\,\sigma`, give or take
    :math:`\sigma / \sqrt{2}`. The ratio :math:`\gamma` of neighbours is such that a level's noise falls into three
    standard deviations around the next one's radius with probability c:

    .. math:: \Phi\big(\sqrt{2D}(\gamma - 1) + 3\gamma\big) - \Phi\big(\sqrt{2D}(\gamma - 1) - 3\gamma\big) = c

    Args:
        dim: dimensions D of the data; 3 * 32 * 32 for CIFAR-10.
        sigma_begin, sigma_end: the ends of the ladder.
        c: the overlap. The paper says about 0.5; its own ladders (232 levels for CIFAR-10) have 0.567.

    Returns:
        The number of levels, at least 2.

    Raises:
        ValueError: sigmas as in :func:`make_sigmas`; ``dim < 1``; ``c`` not between 0 and 0.997, the overlap of a level
            with itself.

    Reference: `arXiv:2006.09011 <https://arxiv.org/abs/2006.09011>`_, section 3.2.
    """
    dim = positive_int("dim", dim)
    make_sigmas(sigma_begin, sigma_end, 2)
    c = positive_number("c", c)
    normal = NormalDist()

    def overlap(ratio: float) -> float:
        middle = math.sqrt(2 * dim) * (ratio - 1)
        return normal.cdf(middle + 3 * ratio) - normal.cdf(middle - 3 * ratio)

    if c >= overlap(1.0):
        raise ValueError(f"c must be less than {overlap(1.0):.4f}, got {c:g}")
    # In few dimensions a wide ratio overlaps again, as three standard deviations grow with it: the first one counts.
    step = 0.1 / math.sqrt(2 * dim)
    low = high = 1.0
    while overlap(high) > c:
        if high > sigma_begin / sigma_end:
            return 2
        low, high = high, high + step
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if overlap(middle) > c else (low, middle)
    return max(2, 1 + round(math.log(sigma_begin / sigma_end) / math.log(high)))


def suggest_step_lr(sigmas: Sequence[float] | Tensor, n_steps_each: int) -> float:
    r"""The step size with which a level's steps bring the noise nearest to the level's own (technique 4).

    For data at one point, ``n_steps_each`` (T) steps at :math:`\sigma_i` that begin with the noise
    :math:`\sigma_{i-1} = \gamma \sigma_i` end with a variance of :math:`\sigma_i^2` times

    .. math:: (1 - a)^{2T} (\gamma^2 - v) + v, \qquad v = \frac{2}{2 - a}, \quad a = \text{step\_lr} / \sigma_K^2,

    which is never below 1; the step size is where it is least.

    Args:
        sigmas: a geometric ladder, strictly descending, at least 2 levels; of another ladder the mean ratio is taken.
        n_steps_each: steps at each level.

    Returns:
        ``step_lr`` for :func:`~ncsn_fast.sampling.annealed_langevin`.

    Raises:
        ValueError: a ladder that does not descend or has one level, ``n_steps_each < 1``.

    Reference: `arXiv:2006.09011 <https://arxiv.org/abs/2006.09011>`_, section 3.4 and proposition 3; its
    :math:`\epsilon` is this step size.
    """
    ladder = check_sigmas(sigmas, len(sigmas)).tolist()
    if len(ladder) < 2:
        raise ValueError(f"sigmas must hold at least 2 levels, got {len(ladder)}")
    n_steps_each = positive_int("n_steps_each", n_steps_each)
    ratio_squared = (ladder[0] / ladder[-1]) ** (2 / (len(ladder) - 1))

    def variance(a: float) -> float:
        stationary = 2 / (2 - a)
        return (1 - a) ** (2 * n_steps_each) * (ratio_squared - stationary) + stationary

    low, high = 0.0, 1.0  # beyond 1 a step overshoots the point
    while high - low > 1e-9:
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if variance(left) < variance(right) else (left, high)
    return (low + high) / 2 * ladder[-1] ** 2


def check_sigmas(sigmas: Sequence[float] | Tensor, num_classes: int) -> Tensor:
    """Return ``sigmas`` as a model holds them: float32 ``(num_classes,)``, here on the CPU.

    Accepts a tensor, an array or a sequence of numbers. The values are checked after rounding to
    float32, which is what the model computes with.

    Raises:
        ValueError: not one-dimensional, not ``num_classes`` long, a value not positive and finite,
            or an order that is not strictly descending.
        TypeError: something that is not made of real numbers.
    """
    try:
        values = torch.as_tensor(sigmas, device="cpu").detach()
        if values.is_floating_point() and not hasattr(sigmas, "dtype"):
            # Python numbers: they would be rounded to torch's default dtype.
            values = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"sigmas must be a tensor or a sequence of numbers, got {sigmas!r}: {error}"
        ) from error
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"sigmas must be real numbers, got dtype {values.dtype}")
    values = values.to(torch.float32)
    if values.ndim != 1:
        raise ValueError(f"sigmas must be one-dimensional, got shape {tuple(values.shape)}")
    if len(values) != num_classes:
        raise ValueError(
            f"sigmas must hold one value for each of the {num_classes} noise levels, "
            f"got {len(values)}"
        )
    ladder = values.tolist()
    for i, sigma in enumerate(ladder):
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(
                f"sigmas must be positive and finite in float32, got sigmas[{i}] = {sigma:g}"
            )
    for i in range(1, len(ladder)):
        if ladder[i] >= ladder[i - 1]:
            raise ValueError(
                "sigmas must be strictly descending in float32, "
                f"got sigmas[{i - 1}] = {ladder[i - 1]:.9g}, then sigmas[{i}] = {ladder[i]:.9g}"
            )
    return values
