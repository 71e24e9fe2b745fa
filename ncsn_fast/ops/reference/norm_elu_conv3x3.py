"""Norm, ELU and a 3x3 convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .cond_instance_norm_elu import cond_instance_norm_elu, cond_instance_norm_elu_with_statistics
from .conv3x3 import conv3x3
from .max_pool5 import max_pool5


def norm_elu_conv3x3(
    x: Tensor,
    labels: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    dilation: int = 1,
    pool: str | None = None,
    eps: float = 1e-5,
    elu: bool = True,
) -> Tensor:
    """The network's repeating unit: norm, ELU, pool if asked for, 3x3 convolution, bias, residual."""
    h = cond_instance_norm_elu(x, labels, norm_weight, eps, elu)
    if pool is not None:
        h = max_pool5(h, pool)
    h = F.conv2d(h, weight, bias, padding=dilation, dilation=dilation)
    return h if residual is None else h + residual


def norm_elu_conv3x3_with_statistics(
    x: Tensor,
    labels: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    dilation: int = 1,
    eps: float = 1e-5,
    elu: bool = True,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The unit without a pool, channels_last, and the norm's statistics, which its gradient needs."""
    h, mean, rstd = cond_instance_norm_elu_with_statistics(x, labels, norm_weight, eps, elu)
    return conv3x3(h, weight, bias, residual, dilation), mean, rstd
