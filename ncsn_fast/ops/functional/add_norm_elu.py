"""A sum, and the conditional instance normalisation and ELU of it, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..algorithms import COMPOSED
from ..autograd import needs_gradient
from ..checks import FLOATING, as_int64, check_norm, check_number, check_shape, check_tensor
from ..dispatch import select
from ..schema import operator
from ..sums import AddNormELU
from .cond_instance_norm_elu import cond_instance_norm_elu


def add_norm_elu(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    elu: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``z = x + bias + residual`` and ``y = elu(norm(z))``: a convolution's sum and the norm that follows.

    A kernel reads ``x`` and ``residual`` once and writes ``z`` and ``y`` once.

    Args:
        x: ``(N, C, *spatial)``, floating, contiguous or channels_last, which both results keep.
        labels: ``(N,)`` integers in 0 .. K-1, or of length 1 for the whole batch.
        weight: of the norm, ``(K, 2C)`` or ``(K, 3C)``, see :func:`cond_instance_norm_elu`.
        bias: ``(C,)`` or None.
        residual: the shape of ``x``, or None. Of another dtype, both are promoted as by ``x + residual``.
        eps: added to the variance.
        elu: False leaves out the activation.
        backend: as in :func:`cond_instance_norm_elu`.

    Returns:
        ``z`` and ``y``. Without bias and residual ``z`` is ``x`` itself. Differentiable to any order.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`cond_instance_norm_elu`.
    """
    check_norm(x, labels, weight)
    labels = as_int64(labels)
    eps = check_number("eps", eps, 0.0)
    if bias is not None:
        check_tensor("bias", bias, FLOATING, like=x)
        check_shape("bias", bias, (x.shape[1],))
    if residual is not None:
        check_tensor("residual", residual, FLOATING, like=x)
        check_shape("residual", residual, x.shape)
        if residual.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
    if bias is None and residual is None:
        return x, cond_instance_norm_elu(x, labels, weight, eps, elu, backend=backend)
    chosen = select("add_norm_elu", backend, x, labels, weight, residual)
    tensors = (x, bias, residual, labels, weight)
    if chosen == COMPOSED:
        z = reference.added(x, bias, residual)
        return z, cond_instance_norm_elu(z, labels, weight, eps, elu, backend=backend)
    if needs_gradient(x, bias, residual, weight):
        return AddNormELU.apply(*tensors, eps, elu, chosen)
    return operator("add_norm_elu", chosen)(*tensors, eps, elu)[:2]
