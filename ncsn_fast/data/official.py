"""Images as the authors' programs feed them to their networks, and back.

Belongs here: the options of their configurations that change the values of the data. Does not belong here: reading
images, mirroring and dequantising them (``dataset.py``), the rescaling inside the networks.

Images are in [0, 1]; all published settings feed them as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOGIT_MARGIN = 1e-6  # keeps 0 and 1 finite


def to_network(images: Tensor, *, rescaled: bool = False, logit_transform: bool = False) -> Tensor:
    r"""What a network is trained on: images as they are, in [-1, 1], or as logits.

    Args:
        images: in [0, 1], floating point.
        rescaled: to [-1, 1]; of a network with ``rescaled``.
        logit_transform: to :math:`\log \frac{u}{1 - u}` with :math:`u = \lambda + (1 - 2 \lambda) x`, a small
            :math:`\lambda`; of a network with ``logit_transform``.

    Returns:
        Shape and dtype of ``images``.

    Raises:
        ValueError: both ``rescaled`` and ``logit_transform``.
    """
    _check(rescaled, logit_transform)
    if logit_transform:
        return torch.logit(LOGIT_MARGIN + (1 - 2 * LOGIT_MARGIN) * images)
    return 2 * images - 1 if rescaled else images


def to_images(x: Tensor, *, rescaled: bool = False, logit_transform: bool = False) -> Tensor:
    """What a network has drawn as images, clamped to [0, 1]; the inverse of :func:`to_network`.

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
