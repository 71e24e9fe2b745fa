"""Images as the authors' programs feed them to their networks, and back.

Belongs here: the options of their configurations that change the data. Does not belong here: reading images, the
rescaling inside the networks.

Images are in [0, 1] everywhere; most published settings feed them as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..streams import STREAM_DEQUANTIZATION

LOGIT_MARGIN = 1e-6  # keeps 0 and 1 finite
GAUSSIAN = 0.01  # standard deviation of the Gaussian dequantisation


def to_network(
    images: Tensor,
    *,
    rescaled: bool = False,
    logit_transform: bool = False,
    uniform_dequantization: bool = False,
    gaussian_dequantization: bool = False,
    seed: int = 0,
) -> Tensor:
    r"""What a network is trained on: dequantised if wanted, then as they are, in [-1, 1], or as logits.

    Args:
        images: ``(N, ...)``, in [0, 1], floating point.
        rescaled: to [-1, 1]; of a network with ``rescaled``.
        logit_transform: to :math:`\log \frac{u}{1 - u}` with :math:`u = \lambda + (1 - 2 \lambda) x`, a small
            :math:`\lambda`; of a network with ``logit_transform``.
        uniform_dequantization: spread each of 256 levels over its width, ``x * 255/256 + U(0, 1)/256``; always in the
            2019 program.
        gaussian_dequantization: add noise of standard deviation 0.01.
        seed: of that noise, from the noise stream; ``0 <= seed < 2**64``.

    Returns:
        Shape and dtype of ``images``.

    Raises:
        ValueError: both ``rescaled`` and ``logit_transform``.
    """
    _check(rescaled, logit_transform)
    x, device = images, images.device
    if uniform_dequantization:
        u = ops.philox_uniform(
            x.shape, seed=seed, stream=STREAM_DEQUANTIZATION, step=0, device=device
        )
        x = x * (255 / 256) + u.to(x.dtype) / 256
    if gaussian_dequantization:
        z = ops.philox_normal(
            x.shape, seed=seed, stream=STREAM_DEQUANTIZATION, step=1, device=device
        )
        x = x + GAUSSIAN * z.to(x.dtype)
    if logit_transform:
        return torch.logit(LOGIT_MARGIN + (1 - 2 * LOGIT_MARGIN) * x)
    return 2 * x - 1 if rescaled else x


def to_images(x: Tensor, *, rescaled: bool = False, logit_transform: bool = False) -> Tensor:
    """What a network has drawn as images, clamped to [0, 1]; the inverse of :func:`to_network`, but for its noise.

    As in the authors' program the logits' small margin stays, a millionth of the range.

    Args:
        x: in the units of the network's data.
        rescaled, logit_transform: as of the network.

    Raises:
        ValueError: both of them.
    """
    _check(rescaled, logit_transform)
    if logit_transform:
        x = x.sigmoid()
    elif rescaled:
        x = (x + 1) / 2
    return x.clamp(0, 1)


def _check(rescaled: bool, logit_transform: bool) -> None:
    if rescaled and logit_transform:
        raise ValueError(
            "data are either rescaled or logits, got rescaled and logit_transform both true"
        )
