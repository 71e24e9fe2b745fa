"""A 3x3 convolution with its sum, and the norm and ELU that follow."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...checks import integer
from .. import algorithms
from ..autograd import needs_gradient
from ..checks import check_number
from ..dispatch import select
from ..sums import Unused
from ..transforms import transform
from ._convolution import choose, convolve
from .add_norm_elu import add_norm_elu
from .cond_instance_norm_elu import cond_instance_norm_elu


def joins_sums(x: Tensor) -> bool:
    """Whether a kernel serves :func:`add_norm_elu` for what has the device and layout of ``x``.

    A network does well then to hand sums to the norms that follow (:func:`conv3x3_norm_elu`); else to begin its units
    with the norm (:func:`norm_elu_conv3x3`), as the CPU's kernels do.
    """
    return select("add_norm_elu", None, x) != algorithms.COMPOSED


def conv3x3_norm_elu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    norm_weight: Tensor,
    *,
    dilation: int = 1,
    residual: Tensor | None = None,
    keep: bool = True,
    eps: float = 1e-5,
    elu: bool = True,
    conv_algo: str = "auto",
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor]:
    """``z = conv3x3(x) + bias + residual`` and ``y = elu(norm(z))``.

    Where PyTorch convolves, it does so without bias, and bias, residual, norm and ELU are one pass
    (:func:`add_norm_elu`). A bias that only a plain norm reads cancels: it is not added.

    Args:
        x: ``(N, C, H, W)``, floating, contiguous or channels_last.
        weight: the convolution's ``(O, C, 3, 3)``.
        bias: ``(O,)`` or None.
        labels: ``(N,)`` integers in 0 .. K-1, or of length 1 for the whole batch.
        norm_weight: the norm's table, ``(K, 2O)`` or ``(K, 3O)``.
        dilation: of the convolution, and its zero padding.
        residual: ``(N, O, H, W)`` or None.
        keep: False: nothing but the norm reads ``z``, and None is returned for it.
        eps: added to the variance.
        elu: False leaves out the activation.
        conv_algo: as in :func:`conv3x3`.
        backend: as in :func:`norm_elu_conv3x3`.

    Returns:
        ``z``, or None, and ``y``, both ``(N, O, H, W)``. Differentiable to any order; a bias that cancels has the
        gradient zero.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as the parts do.
    """
    dilation = integer("dilation", dilation, 1)
    chosen = choose(x, weight, bias, residual, dilation, conv_algo, backend)
    eps = check_number("eps", eps, 0.0)
    norm = (labels, norm_weight)
    cancels = not keep and residual is None and norm_weight.shape[-1] == 2 * weight.shape[0]
    if chosen.backend != algorithms.COMPOSED or transform() is not None:
        z = convolve(x, weight, bias, residual, dilation, False, chosen)
        y = cond_instance_norm_elu(z, *norm, eps, elu, backend=backend)
        return z if keep else None, y
    c = F.conv2d(x, weight, None, padding=dilation, dilation=dilation)
    if cancels:
        if bias is not None and needs_gradient(bias):
            c = Unused.apply(c, bias)
        return None, cond_instance_norm_elu(c, *norm, eps, elu, backend=backend)
    sums = {"bias": bias, "residual": residual}
    z, y = add_norm_elu(c, *norm, **sums, eps=eps, elu=elu, backend=backend)
    return z if keep else None, y
