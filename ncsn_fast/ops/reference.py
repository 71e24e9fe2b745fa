"""Plain-PyTorch references: what each operator computes, written as the formula.

These are the specification. Each is differentiable to any order (the in-place noise operators excepted, which
have no gradient), traceable by ``torch.compile`` and valid on every device. No argument checking, no backend choice:
that is ``ops/__init__.py`` and ``ops/dispatch.py``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..streams import STREAM_LANGEVIN

# InstanceNorm++ normalises the channel means with this epsilon, whatever the epsilon of the planes.
CHANNEL_MEAN_EPS = 1e-5


# --- conditional instance norm + ELU --------------------------------------------------------------


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


# --- 5x5 max pool ---------------------------------------------------------------------------------


def max_pool5(x: Tensor, padding: str = "neg_inf") -> Tensor:
    """5x5 max pool, stride 1, same size; the border counts as minus infinity or as zero.

    Rows, then columns: a tenth of the work of 5x5 windows, and the same first maximum in row-major order.
    """
    border = 2
    if padding == "zero":
        x, border = F.pad(x, (2, 2, 2, 2)), 0
    rows = F.max_pool2d(x, (1, 5), stride=1, padding=(0, border))
    return F.max_pool2d(rows, (5, 1), stride=1, padding=(border, 0))


def max_pool5_backward(grad_y: Tensor, x: Tensor, padding: str = "neg_inf") -> Tensor:
    """Each output's gradient goes to the first maximum of its window, in row-major order."""
    border = 2 if padding == "zero" else 0
    padded = F.pad(x, (border,) * 4)
    window = ([5, 5], [1, 1], [2 - border] * 2, [1, 1], False)  # kernel, stride, padding, dilation
    _, indices = torch.ops.aten.max_pool2d_with_indices(padded, *window)
    grad = torch.ops.aten.max_pool2d_with_indices_backward(grad_y, padded, *window, indices)
    return grad if border == 0 else grad[..., border:-border, border:-border].clone()


# --- 5x5 average pool -----------------------------------------------------------------------------


def avg_pool5(x: Tensor) -> Tensor:
    """5x5 average pool, stride 1, same size; the border counts as zeros: every sum is divided by 25."""
    return F.avg_pool2d(x, 5, stride=1, padding=2)


# --- norm + ELU (+ pool) + 3x3 convolution --------------------------------------------------------


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


def elu_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dilation: int = 1,
    pool: str | None = None,
    elu: bool = True,
) -> Tensor:
    """The unit without a norm: ELU, pool if asked for, 3x3 convolution, bias, residual."""
    h = F.elu(x) if elu else x
    if pool is not None:
        h = max_pool5(h, pool)
    h = F.conv2d(h, weight, bias, padding=dilation, dilation=dilation)
    return h if residual is None else h + residual


def conv3x3_mean_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A same-size convolution of 3x3 or 1x1, then the mean of every 2x2 pixels."""
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=weight.shape[2] // 2), 2)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The unit without a pool, channels_last, and the norm's statistics, which its gradient needs."""
    h, mean, rstd = cond_instance_norm_elu_with_statistics(x, labels, norm_weight, eps, elu)
    return conv3x3(h, weight, bias, residual, dilation), mean, rstd


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


# --- the noise stream -----------------------------------------------------------------------------

# Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


def philox4x32(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Ten rounds of Philox4x32. Words are int64 tensors holding 0 .. 2**32 - 1, and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # The 64-bit product wraps to a negative int64 at most; its bits, and so both halves, are right.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW32) ^ c1 ^ k0,
            p1 & _LOW32,
            ((p0 >> 32) & _LOW32) ^ c3 ^ k1,
            p0 & _LOW32,
        )
        k0, k1 = (k0 + PHILOX_KEY_INCREMENTS[0]) & _LOW32, (k1 + PHILOX_KEY_INCREMENTS[1]) & _LOW32
    return [c0, c1, c2, c3]


def philox_words(
    n: int,
    elements: int,
    *,
    seed: int,
    step: int | Tensor,
    sample_offset: int,
    stream: int,
    device: torch.device,
) -> list[Tensor]:
    """The four words of every counter of ``n`` samples of ``elements`` elements, each ``(n, ceil(elements / 4))``."""

    def word(value: int | Tensor, shift: int = 0) -> Tensor:
        # Through a tensor, so that a traced (symbolic) seed or step is no constant of the graph.
        if not isinstance(value, Tensor):
            value = torch.full((), value, dtype=torch.int64, device=device)
        return (value.reshape(()) >> shift) & _LOW32

    groups = torch.arange((elements + 3) // 4, device=device) & _LOW32
    samples = (torch.arange(n, device=device) + sample_offset) & _LOW32
    counter = [groups[None, :], samples[:, None], word(step), word(stream)]
    return philox4x32(counter, [word(seed), word(seed, 32)])


def uniform_from_words(word: Tensor, dtype: torch.dtype) -> Tensor:
    """``((w >> 9) + 0.5) * 2**-23``: exact in float32, never 0, never 1."""
    return ((word >> 9).to(dtype) + 0.5) * 2.0**-23


def box_muller(u0: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    """``r cos t`` and ``r sin t`` with ``r = sqrt(-2 ln u0)`` and ``t = 2 pi u1`` (Box & Muller 1958).

    The angle is split into a quadrant and a rest within pi/4: both are exact, so that float32 loses nothing to a
    large argument.
    """
    r = torch.sqrt(-2.0 * torch.log(u0))
    quadrant = torch.round(4.0 * u1)
    angle = (4.0 * u1 - quadrant) * (math.pi / 2)
    c, s = torch.cos(angle), torch.sin(angle)
    q = quadrant.to(torch.int64) & 3
    cos = torch.where(q % 2 == 0, c, s)
    sin = torch.where(q % 2 == 0, s, c)
    return (
        r * torch.where((q == 1) | (q == 2), -cos, cos),
        r * torch.where(q >= 2, -sin, sin),
    )


def _interleave(four: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    elements = math.prod(shape[1:])
    return torch.stack(four, dim=-1).flatten(1)[:, :elements].reshape(shape)


def philox_bits(shape: tuple[int, ...], **counter) -> Tensor:
    """The words as int32 bit patterns, in the order of the elements."""
    words = philox_words(shape[0], math.prod(shape[1:]), **counter)
    return _interleave(words, shape).to(torch.int32)


def philox_uniform(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **counter) -> Tensor:
    """Uniform numbers in (0, 1)."""
    words = philox_words(shape[0], math.prod(shape[1:]), **counter)
    return _interleave([uniform_from_words(w, dtype) for w in words], shape)


def philox_normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **counter) -> Tensor:
    """Standard normal numbers, float32 or float64."""
    words = philox_words(shape[0], math.prod(shape[1:]), **counter)
    u0, u1, u2, u3 = (uniform_from_words(w, dtype) for w in words)
    return _interleave([*box_muller(u0, u1), *box_muller(u2, u3)], shape)


# --- the Langevin update --------------------------------------------------------------------------


def noise_scale(step_size: Tensor) -> Tensor:
    """``sqrt(2 step_size)`` of a float32 number, correctly rounded, so that every backend has the same bits.

    A library's float32 root may be off by a unit in the last place on one processor and not on another. One in float64
    may be too, but its rounding to float32 is right: no root of a float32 number is so near to the middle of two.
    """
    if step_size.device.type == "mps":  # has no float64
        return torch.sqrt(2.0 * step_size)
    return torch.sqrt(2.0 * step_size.double()).float()


def langevin_step_(
    x: Tensor,
    score: Tensor,
    noise: Tensor | None,
    step_size: float | Tensor,
    *,
    seed: int = 0,
    step: int | Tensor = 0,
    sample_offset: int = 0,
    clip: float | None = None,
) -> Tensor:
    """``x += step_size * score + sqrt(2 step_size) z``, then a clamp (Song & Ermon 2019, algorithm 1).

    The paper writes the same update with ``step_size = alpha / 2``.
    """
    if noise is None:
        noise = philox_normal(
            tuple(x.shape),
            seed=seed,
            step=step,
            sample_offset=sample_offset,
            stream=STREAM_LANGEVIN,
            device=x.device,
        )
    if not isinstance(step_size, Tensor):
        step_size = torch.full((), step_size, dtype=torch.float32, device=x.device)
    step_size = step_size.reshape(())
    x.add_(step_size * score.float()).add_(noise_scale(step_size) * noise.float())
    return x if clip is None else x.clamp_(-clip, clip)
