"""Noise ladders: how the noise levels sigma_1 > ... > sigma_K are made, and what a valid ladder is.

Belongs here: functions from numbers to ladders, and the check every ladder passes. Does not belong
here: what is done at a level (``sampling.py``, ``losses.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import positive_int, positive_number


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
