"""A convolution, and the mean of every 2x2 pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv3x3_mean_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A same-size convolution of 3x3 or 1x1, then the mean of every 2x2 pixels."""
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=weight.shape[2] // 2), 2)
