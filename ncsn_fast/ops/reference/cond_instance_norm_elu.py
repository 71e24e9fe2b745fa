"""Conditional instance normalisation and ELU, with statistics and gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# InstanceNorm++ normalises the channel means with this epsilon, whatever the epsilon of the planes.
CHANNEL_MEAN_EPS = 1e-5


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of means and variances: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of every plane, ``(N, C)``, and the planes less their means."""
    x = x.to(statistics_dtype(x.dtype))
    mean = x.flatten(2).mean(2)
    return mean, x - per_plane(mean, x)


def per_plane(values: Tensor, x: Tensor) -> Tensor:
    """``(N, C)`` or ``(1, C)`` as a tensor that broadcasts over the planes of ``x``."""
    return values.view(*values.shape, *([1] * (x.dim() - 2)))


def reciprocal_std(centred: Tensor, eps: float) -> Tensor:
    """``1/sqrt(var + eps)`` of every plane, biased variance, from the centred values."""
    return torch.rsqrt(centred.flatten(2).square().mean(2) + eps)


def scale_and_shift(
    mean: Tensor, rstd: Tensor, labels: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The norm as ``scale`` and ``shift`` of the centred plane: ``u = (x - mean) * scale + shift``.

    Plain weights are ``(K, 2C)``, gamma | beta; InstanceNorm++ weights ``(K, 3C)``, gamma | alpha | beta.
    """
    channels = mean.shape[1]
    rows = F.embedding(labels, weight).to(mean.dtype)
    if weight.shape[1] == 2 * channels:
        gamma, beta = rows.split(channels, dim=1)
        return gamma * rstd, beta
    gamma, alpha, beta = rows.split(channels, dim=1)
    var, middle = torch.var_mean(mean, dim=1, correction=1, keepdim=True)
    relative_mean = (mean - middle) * torch.rsqrt(var + CHANNEL_MEAN_EPS)
    return gamma * rstd, gamma * alpha * relative_mean + beta


def normalise(
    centred: Tensor, mean: Tensor, rstd: Tensor, labels: Tensor, weight: Tensor
) -> Tensor:
    """``u``, the argument of the activation, given the statistics."""
    scale, shift = scale_and_shift(mean, rstd, labels, weight)
    return torch.addcmul(per_plane(shift, centred), centred, per_plane(scale, centred))


def cond_instance_norm_elu(
    x: Tensor, labels: Tensor, weight: Tensor, eps: float = 1e-5, elu: bool = True
) -> Tensor:
    """Conditional instance norm, then ELU (Song & Ermon 2019, appendix A; Dumoulin et al. 2017)."""
    return cond_instance_norm_elu_with_statistics(x, labels, weight, eps, elu)[0]


def cond_instance_norm_elu_with_statistics(
    x: Tensor, labels: Tensor, weight: Tensor, eps: float, elu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the mean and ``1/sqrt(var + eps)`` of every plane, which the backward pass takes."""
    mean, centred = centre(x)
    rstd = reciprocal_std(centred, eps)
    u = normalise(centred, mean, rstd, labels, weight)
    return (F.elu(u) if elu else u).to(x.dtype), mean, rstd


def cond_instance_norm_elu_backward(
    grad_y: Tensor,
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    elu: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients for x and weight from the saved statistics: one reduction over a plane, then one pass."""
    n, channels = mean.shape
    space = tuple(range(2, x.dim()))
    labels = labels.expand(n)
    rows = F.embedding(labels, weight).to(mean.dtype)
    gamma = rows[:, :channels]
    centred = x.to(mean.dtype) - per_plane(mean, x)
    xhat = centred * per_plane(rstd, x)

    grad_u = grad_y.to(mean.dtype)
    if elu:
        u = normalise(centred, mean, rstd, labels, weight)
        grad_u = grad_u * torch.where(u > 0, 1.0, torch.exp(u))
    grad_beta, grad_gamma = grad_u.sum(space), (grad_u * xhat).sum(space)

    size = x.shape[2:].numel()
    # First what has the layout of x: a sum takes that of its first term, and grad_y may have another.
    grad_x = -xhat * per_plane(grad_gamma / size, x) + (grad_u - per_plane(grad_beta / size, x))
    grad_x = grad_x * per_plane(gamma * rstd, x)
    if weight.shape[1] == 2 * channels:
        grad_rows = torch.cat([grad_gamma, grad_beta], dim=1)
    else:  # InstanceNorm++: the channel means carry a gradient of their own
        alpha = rows[:, channels : 2 * channels]
        var, middle = torch.var_mean(mean, dim=1, correction=1, keepdim=True)
        channel_rstd = torch.rsqrt(var + CHANNEL_MEAN_EPS)
        m = (mean - middle) * channel_rstd
        grad_m = gamma * alpha * grad_beta
        spread = (grad_m * m).sum(1, keepdim=True) / (channels - 1)
        grad_mean = channel_rstd * (grad_m - grad_m.mean(1, keepdim=True) - m * spread)
        grad_x = grad_x + per_plane(grad_mean / size, x)
        grad_alpha = gamma * m * grad_beta
        grad_rows = torch.cat([grad_gamma + alpha * m * grad_beta, grad_alpha, grad_beta], dim=1)
    # The gradient of an embedding: sorted by label, no atomics, on every device.
    grad_weight = torch.ops.aten.embedding_dense_backward(
        grad_rows, labels, weight.shape[0], padding_idx=-1, scale_grad_by_freq=False
    )
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)
