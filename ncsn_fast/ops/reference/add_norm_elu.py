"""A sum, and the conditional instance norm and ELU of it."""

from __future__ import annotations

from torch import Tensor

from .cond_instance_norm_elu import (
    cond_instance_norm_elu_with_statistics,
    per_plane,
    statistics_dtype,
)


def added(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """``x + bias + residual``, a bias for each channel; rounded once."""
    wide = statistics_dtype(x.dtype)
    z = x.to(wide)
    if bias is not None:
        z = z + per_plane(bias.to(wide)[None], x)
    if residual is not None:
        z = z + residual.to(wide)
    return z.to(x.dtype)


def add_norm_elu_with_statistics(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    labels: Tensor,
    weight: Tensor,
    eps: float,
    elu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum z, ``elu(norm(z))``, and the mean and ``1/sqrt(var + eps)`` of the planes of z."""
    z = added(x, bias, residual)
    z = z.clone() if z is x else z
    return z, *cond_instance_norm_elu_with_statistics(z, labels, weight, eps, elu)
