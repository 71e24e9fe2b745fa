"""The 3x3 convolution of the same size, and the layout that it wants."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import integer
from ..dispatch import select
from ..transforms import transform
from ._convolution import choose, convolve


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dilation: int = 1,
    residual: Tensor | None = None,
    conv_algo: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """The convolution of :func:`norm_elu_conv3x3` alone; arguments, result and errors as there."""
    dilation = integer("dilation", dilation, 1)
    chosen = choose(x, weight, bias, residual, dilation, conv_algo, backend)
    return convolve(x, weight, bias, residual, dilation, False, chosen)


def wants_channels_last(x: Tensor) -> bool:
    """Whether the convolutions of a network would convert ``x`` to channels_last, each of them, and its result back.

    A network asks once, and converts its input and its output instead. On a CPU our convolution engine wants it; on a
    GPU the tensor cores do, in half precision. float32 stays as it is there: cuDNN computes it in either layout.
    """
    if transform() is not None:
        return False
    if x.is_contiguous(memory_format=torch.channels_last):
        return False
    if x.device.type == "cuda":
        # Autocast leaves float64 alone.
        cast = torch.is_autocast_enabled("cuda") and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype("cuda") if cast else x.dtype
        return dtype in (torch.float16, torch.bfloat16)
    return x.device.type == "cpu" and select("norm_elu_conv3x3", None, x) == "native"
