"""How many bits a network would need for an image: its log-likelihood, where it has one.

Belongs here: from images of 8 bits to bits a dimension. Does not belong here: integrating the ODE
(``sampling/ode.py``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..data import ImageDataset
from ..data.ranges import IMAGE_RANGE, from_image_range
from ..models.base import SIGMA, ScoreModel
from ..sampling.ode import log_likelihood
from ..sampling.run import evaluating
from ..schedules import make_sigmas

GREYS = 255  # steps between the 256 greys
POINTS = 64  # of the grid from the first sigma of the ladder to the last, evenly in log sigma
BATCH = 32
TOLERANCE = 1e-3  # of a grey: how far a value may lie beside one


def has_likelihood(model: ScoreModel) -> bool:
    """Whether the network can be asked at any sigma, so that it has a likelihood."""
    return model.conditioned_on == SIGMA


def bits_per_dimension(
    model: ScoreModel, images: Tensor | ImageDataset, *, seed: int = 0, points: int = POINTS
) -> tuple[float, float]:
    r"""Bits a value of an image, by the probability-flow ODE; 8 for a network that takes all images for equally likely.

    .. math:: -\frac{1}{D} \log_2 p(x + u) - \log_2 w, \qquad u \sim U(-w / 2, w / 2)^D

    where w is the step from one grey to the next. That is an upper bound, in the mean over u, of what the density
    needs for the greys themselves (Theis et al., 2016, `arXiv:1511.01844 <https://arxiv.org/abs/1511.01844>`_).
    The density is that of the ODE's solutions which begin as :math:`N(0, \sigma_1^2 I)` and end at the last sigma.

    Args:
        model: one that takes any sigma (:func:`has_likelihood`), with its ladder set, whose ends are those of the ODE.
        images: ``(N, C, H, W)`` of 8 bits in [-1, 1], whatever the network's range; N >= 2.
        seed: of u and of the signs of Hutchinson's estimate.
        points: of the ODE's grid; the error falls with the square of their number.

    Returns:
        The mean and its standard error, which is of the choice of images, of u and of the signs.

    Raises:
        ValueError: a network of levels alone; fewer than 2 images, or images of other values than 256 greys.
    """
    if not has_likelihood(model):
        raise ValueError(
            f"a likelihood takes a network of any sigma, {type(model).__name__} knows the levels of its ladder only"
        )
    some = images[:].to("cpu", torch.float32)
    if len(some) < 2:
        raise ValueError(f"a standard error takes at least 2 images, got {len(some)}")
    greys = (some + 1) * (GREYS / 2)
    if float((greys - greys.round()).abs().max()) > TOLERANCE:
        raise ValueError("a likelihood takes images of 8 bits, got values between the 256 greys")
    generator = torch.Generator("cpu").manual_seed(seed)
    u = torch.rand(some.shape, generator=generator, dtype=torch.float32, device="cpu") - 0.5
    low, high = model.data_range or IMAGE_RANGE
    x = from_image_range((greys.round() + u) * (2 / GREYS) - 1, (low, high))
    sigmas = make_sigmas(float(model.sigmas[0]), float(model.sigmas[-1]), points).tolist()
    found = []
    with evaluating(model):
        for begin in range(0, len(x), BATCH):
            batch = x[begin : begin + BATCH].to(model.sigmas.device)
            found.append(log_likelihood(model, batch, sigmas, seed=seed, sample_offset=begin).cpu())
    dim = some[0].numel()
    bits = -torch.cat(found) / (dim * math.log(2)) - math.log2((high - low) / GREYS)
    return float(bits.mean()), float(bits.std() / math.sqrt(len(bits)))
