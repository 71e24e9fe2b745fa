"""What the 3x3 convolutions share: the checks of their arguments, the direct algorithm, the call of a backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autograd
from ..autograd import needs_gradient
from ..checks import FLOATING, check_shape, check_tensor
from ..schema import operator


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor | None, ...]:
    check_tensor("x", x, FLOATING)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"x must have shape (N, C, H, W) with C, H and W >= 1, got {tuple(x.shape)}"
        )
    n, channels, *size = x.shape
    check_tensor("weight", weight, FLOATING, like=x)
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (channels, 3, 3):
        raise ValueError(f"weight must have shape (O, {channels}, 3, 3), got {tuple(weight.shape)}")
    out_channels = weight.shape[0]
    if bias is not None:
        check_tensor("bias", bias, FLOATING, like=x)
        check_shape("bias", bias, (out_channels,))
    if residual is not None:
        check_tensor("residual", residual, FLOATING, like=x)
        check_shape("residual", residual, (n, out_channels, *size))
    return x, weight, bias, residual


def direct(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dilation: int
) -> Tensor:
    """PyTorch's convolution: the part of a composed operator that no kernel of ours does."""
    y = F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)
    return y if residual is None else y + residual


def convolve(
    x: Tensor,
    labels: Tensor | None,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    eps: float,
    elu: bool,
    backend: str,
) -> Tensor:
    """The operators' call: they take and give channels_last; any other layout is converted, there and back."""
    convert = not x.is_contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if bias is not None:
        bias = bias.contiguous()
    tensors = (x, labels, norm_weight, weight, bias, residual)
    if needs_gradient(*tensors):
        y = autograd.NormELUConv3x3.apply(*tensors, dilation, eps, elu, backend)
    elif labels is None:
        y = operator("conv3x3", backend)(x, weight, bias, residual, dilation, False, elu)
    else:
        y = operator("norm_elu_conv3x3", backend)(*tensors, dilation, eps, elu)[0]
    return y.contiguous() if convert else y
