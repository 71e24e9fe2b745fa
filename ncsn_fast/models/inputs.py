"""Checks of what a network is called with, the same for all of them.

Belongs here: data, labels and sigmas as arguments of ``forward`` and ``get_loss``. Does not belong here: checks of
configurations (``config.py``), the look at the values of data (``data/ranges.py``).

No check waits for a GPU: what cannot be seen without waiting, the operators refuse, or it gives NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.ranges import byte_hint
from ..ops.transforms import values_are_at_hand
from ..sampling.run import sampled_here

if TYPE_CHECKING:
    from .base import ScoreModel


def check_data(model: ScoreModel, x: Tensor) -> None:
    """A batch in the shape of the network's samples (images: of any height and width) and the dtype of its parameters.

    Raises:
        TypeError: no tensor, not floating point, or of another dtype outside ``torch.autocast``.
        ValueError: of another shape.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        hint = byte_hint(x.dtype, model.data_range)
        raise TypeError(f"x must be floating point, got {x.dtype}{hint}")
    shape = model.sample_shape
    if len(shape) == 3:
        if x.ndim != 4 or x.shape[1] != shape[0] or 0 in x.shape[2:]:
            raise ValueError(
                f"x must have shape (N, {shape[0]}, H, W) with H and W at least 1, got {tuple(x.shape)}"
            )
    elif tuple(x.shape[1:]) != shape or x.ndim == 0:
        wanted = ", ".join(str(side) for side in ("N", *shape))
        raise ValueError(f"x must have shape ({wanted}), got {tuple(x.shape)}")
    dtype = weight_of(model).dtype
    if x.dtype != dtype and (
        x.dtype == torch.float64  # which autocast leaves alone
        or not torch.is_autocast_enabled(x.device.type)
    ):
        raise TypeError(
            f"x must have the dtype of the model's parameters, {dtype}, got {x.dtype}; "
            "convert one of them, or use torch.autocast"
        )


def check_labels(model: ScoreModel, labels: Tensor, n: int) -> Tensor:
    """``labels`` for ``n`` samples as int64, ``(n,)`` or ``(1,)``.

    Raises:
        TypeError: no tensor, or not integers.
        ValueError: of another shape.
        IndexError: out of the ladder's range, where the values can be seen.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.ndim != 1 or labels.shape[0] not in (1, n):
        raise ValueError(f"labels must have shape ({n},) or (1,), got {tuple(labels.shape)}")
    labels = labels.long()
    # Where the values cannot be seen, the range is the operators' business, as it is on the GPU.
    # While sampling the labels are right by construction, and are not looked at in each step.
    if values_are_at_hand(labels) and labels.numel() and not sampled_here(model):
        low, high = (bound.item() for bound in labels.aminmax())
        if low < 0 or high >= len(model.sigmas):
            raise IndexError(f"labels must be in 0..{len(model.sigmas) - 1}, got {low}..{high}")
    return labels


def check_sigma(x: Tensor, sigma: Tensor | float) -> Tensor:
    """``sigma`` for the batch ``x`` as ``(N,)`` or ``(1,)``, in the dtype and on the device of ``x``.

    Raises:
        ValueError: of another shape; not positive, where the values can be seen.
    """
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if sigma.dim() > 1 or (sigma.dim() == 1 and sigma.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"sigma must be a number or have shape ({len(x)},) or (1,), got {tuple(sigma.shape)}"
        )
    # On a GPU looking would mean waiting; there a sigma that is not positive gives NaN.
    if values_are_at_hand(sigma) and not bool((sigma > 0).all()):
        raise ValueError("sigma must be positive")
    return sigma.reshape(-1)


def weight_of(model: ScoreModel) -> Tensor:
    """A parameter, for the dtype, device and layout of all: of images, a convolution's; a layer may be replaced."""
    images = len(model.sample_shape) == 3
    floats = (p for p in model.parameters() if p.is_floating_point())
    return next((p for p in floats if p.ndim == 4 or not images), next(model.parameters()))
