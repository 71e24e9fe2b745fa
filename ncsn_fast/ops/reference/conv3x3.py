"""The 3x3 convolution of the same size, after an ELU if asked for, and its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cond_instance_norm_elu import normalise, per_plane


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dilation: int = 1,
    transposed: bool = False,
    elu: bool = False,
) -> Tensor:
    """ELU if asked for, 3x3 convolution of the same size, bias, residual; channels_last.

    ``transposed`` is the convolution's gradient for its input: channels and outputs of ``weight`` change places, rows
    and columns run backwards.
    """
    if transposed:
        weight = weight.transpose(0, 1).flip(2, 3)
    x = F.elu(x) if elu else x
    y = F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)
    y = y if residual is None else y + residual
    return y.clone(memory_format=torch.channels_last)


def conv3x3_weight_gradient(
    grad_y: Tensor,
    x: Tensor,
    labels: Tensor | None,
    norm_weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    dilation: int = 1,
    elu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`conv3x3` for its weight and bias; with labels, of the convolution of ``norm(x)``.

    With ``elu``, of the ELU of either. ``mean`` and ``rstd``: of :func:`norm_elu_conv3x3_with_statistics`.
    """
    h = x
    if labels is not None:
        h = normalise(x - per_plane(mean, x), mean, rstd, labels, norm_weight)
    h = (F.elu(h) if elu else h).to(x.dtype)
    size = (grad_y.shape[1], x.shape[1], 3, 3)
    grad_weight = torch.nn.grad.conv2d_weight(h, size, grad_y, padding=dilation, dilation=dilation)
    return grad_weight.contiguous(), grad_y.sum((0, 2, 3))
