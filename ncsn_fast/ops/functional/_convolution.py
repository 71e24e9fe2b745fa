"""What the 3x3 convolutions share: the checks of their arguments, and the calls of the algorithms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autograd
from ..algorithms import COMPOSED, GEMM, WINOGRAD, Algorithm
from ..autograd import needs_gradient
from ..checks import FLOATING, check_images, check_shape, check_tensor
from ..dispatch import recall, select_convolution
from ..packing import packed_of
from ..schema import operator


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> None:
    check_images(x)
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


def choose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    conv_algo: str,
    backend: str | None,
) -> Algorithm:
    """Check the arguments of a convolution alone, and choose its algorithm."""
    tensors = (x, weight, bias, residual)
    memory, key = recall("conv3x3", backend, tensors, conv_algo, dilation)
    chosen = memory.get(key)
    if chosen is None:
        check_convolution(*tensors)
        chosen = select_convolution("conv3x3", backend, conv_algo, dilation, *tensors)
        memory[key] = chosen
    return chosen


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    elu: bool,
    algorithm: Algorithm,
) -> Tensor:
    """``conv(elu(x)) + residual``, or without the ELU, by any algorithm; 1x1 by all but Winograd's."""
    if algorithm is WINOGRAD:
        return by_engine(x, None, None, weight, bias, residual, dilation, 0.0, elu, WINOGRAD)
    if algorithm.backend == COMPOSED:
        padding = dilation * (weight.shape[2] // 2)
        h = F.elu(x) if elu else x
        y = F.conv2d(h, weight, bias, padding=padding, dilation=dilation)
        return y if residual is None else y + residual
    # A CPU converts 16 bits; the matrix product takes them, and the parameters as autocast would have them.
    dtype = x.dtype
    within = dtype if algorithm is GEMM else torch.float32
    x, weight, bias, residual = _in_dtype(within, x, weight, bias, residual)
    x, bias, residual, convert = _channels_last(x, bias, residual)
    if needs_gradient(x, weight, bias, residual):
        y = autograd.DirectConv.apply(x, weight, bias, residual, dilation, elu, algorithm.backend)
    else:
        y = operator("conv_direct", algorithm.backend)(x, weight, bias, residual, dilation, elu)
    return (y.contiguous() if convert else y).to(dtype)


def _in_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    # Not a call of PyTorch where there is nothing to do.
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors)


def _channels_last(
    x: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """As the operators take them, and whether their result must be converted to the layout of ``x``."""
    convert = not x.is_contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    return x, None if bias is None else bias.contiguous(), residual, convert


def by_engine(
    x: Tensor,
    labels: Tensor | None,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    eps: float,
    elu: bool,
    algorithm: Algorithm,
) -> Tensor:
    """Norm, unless labels are None, ELU and 3x3 convolution at once."""
    dtype = x.dtype
    x, weight, bias, residual = _in_dtype(torch.float32, x, weight, bias, residual)
    x, bias, residual, convert = _channels_last(x, bias, residual)
    backend = algorithm.backend
    tensors = (x, labels, norm_weight, weight, bias, residual)
    if needs_gradient(*tensors):
        y = autograd.NormELUConv3x3.apply(*tensors, dilation, eps, elu, backend)
    elif labels is None:
        conv = operator("conv3x3", backend)
        packed = packed_of(weight, x, dilation)
        y = conv(x, weight, bias, residual, dilation, False, elu, packed)
    else:
        fused = operator("norm_elu_conv3x3", backend)
        y = fused(*tensors, dilation, eps, elu, packed_of(weight, x, dilation))[0]
    return (y.contiguous() if convert else y).to(dtype)
