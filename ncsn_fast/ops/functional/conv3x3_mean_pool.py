"""A convolution and the mean of every 2x2 pixels, the way the official networks halve their images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algorithms import COMPOSED
from ..checks import FLOATING, check_shape, check_tensor
from ..dispatch import layout_of, select_convolution
from ._convolution import convolve


def conv3x3_mean_pool(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """A same-size convolution of 3x3 or 1x1, then the mean of every 2x2 pixels, at once.

    Both are linear. For 3x3 they are one convolution of 4x4 with stride 2, whose weight is the mean of the four shifts
    of ``weight``: 4 multiplications a pixel, channel and output in place of 9, by PyTorch. On a CPU in float32 the
    engine of :func:`ncsn_fast.ops.conv3x3` needs 2.25, and then the mean of its result; wherever it pays, it takes
    half the time. Where it does not, a direct convolution of our own comes before the mean, so that a sample has the
    same bits in any batch. For 1x1 the mean comes first: a quarter of the work. All are equal in exact arithmetic.

    Args:
        x: ``(N, C, H, W)``, floating, H and W even; contiguous or channels_last, which the output keeps.
        weight: ``(O, C, 3, 3)`` or ``(O, C, 1, 1)``.
        bias: ``(O,)`` or None.
        backend: of the convolution: ``"native"``, ``"reference"``, ``"auto"``; None for the policy.

    Returns:
        ``(N, O, H/2, W/2)``. Differentiable to any order.

    Raises:
        TypeError, ValueError: arguments of a wrong dtype or shape; an odd height or width.
        RuntimeError: tensors on different devices; a backend asked for that cannot serve the call.

    Source: the mean-pool convolution of Gulrajani et al. 2017 (arXiv:1704.00028), as in Song & Ermon 2019.
    """
    check_tensor("x", x, FLOATING)
    if x.dim() != 4 or 0 in x.shape[1:] or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(
            f"x must have shape (N, C, H, W) with C >= 1, H and W even and >= 2, got {tuple(x.shape)}"
        )
    check_tensor("weight", weight, FLOATING, like=x)
    channels = x.shape[1]
    if weight.dim() != 4 or tuple(weight.shape[1:]) not in ((channels, 3, 3), (channels, 1, 1)):
        raise ValueError(
            f"weight must have shape (O, {channels}, 3, 3) or (O, {channels}, 1, 1), "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor("bias", bias, FLOATING, like=x)
        check_shape("bias", bias, weight.shape[:1])
    if weight.shape[2] == 1:
        small = F.avg_pool2d(x, 2)
        direct = select_convolution("conv3x3", backend, "direct", 1, small, weight, bias)
        return convolve(small, weight, bias, None, 1, False, direct)
    chosen = select_convolution("conv3x3", backend, "auto", 1, x, weight, bias)
    if chosen.backend == COMPOSED:
        # The mean of the four shifts: what a 2x2 pool makes of the weight with zeros around it.
        mean = F.avg_pool2d(weight, 2, stride=1, padding=1)
        return F.conv2d(x, mean, bias, stride=2, padding=1)
    # In channels_last the pool is several times as fast, and its result is what is converted back.
    rows = x.contiguous(memory_format=torch.channels_last)
    y = F.avg_pool2d(convolve(rows, weight, bias, None, 1, False, chosen), 2)
    return y.contiguous() if layout_of(x) != "channels_last" else y
