"""ELU and a 3x3 convolution, without a norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .max_pool5 import max_pool5


def elu_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dilation: int = 1,
    pool: str | None = None,
    elu: bool = True,
) -> Tensor:
    """The unit without a norm: ELU, pool if asked for, 3x3 convolution, bias, residual."""
    h = F.elu(x) if elu else x
    if pool is not None:
        h = max_pool5(h, pool)
    h = F.conv2d(h, weight, bias, padding=dilation, dilation=dilation)
    return h if residual is None else h + residual
