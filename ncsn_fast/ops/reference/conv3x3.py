"""The 3x3 convolution of the same size, after an ELU if asked for, its gradients and its weights packed in advance."""

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
    packed: Tensor | None = None,
) -> Tensor:
    """ELU if asked for, 3x3 convolution of the same size, bias, residual; channels_last.

    ``transposed`` is the convolution's gradient for its input: channels and outputs of ``weight`` change places, rows
    and columns run backwards. ``packed`` spares a kernel of Winograd's algorithm the transform of ``weight``.
    """
    if transposed:
        weight = weight.transpose(0, 1).flip(2, 3)
    x = F.elu(x) if elu else x
    y = F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)
    y = y if residual is None else y + residual
    return y.clone(memory_format=torch.channels_last)


def conv_direct(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dilation: int = 1,
    elu: bool = False,
) -> Tensor:
    """:func:`conv3x3`, of 1x1 weights too."""
    x = F.elu(x) if elu else x
    padding = dilation * (weight.shape[2] // 2)
    y = F.conv2d(x, weight, bias, padding=padding, dilation=dilation)
    y = y if residual is None else y + residual
    return y.clone(memory_format=torch.channels_last)


# The rows of G in U = G g G^T, at the points 0, a, -a, b, -b and infinity, b = sqrt(2) and a = 1/b, scaled as in
# csrc/cpu/conv3x3/level.h.
_B = 2**0.5
_WEIGHT_TRANSFORM = (
    (1, 0, 0),
    (-_B / 3, -1 / 3, -_B / 6),
    (-_B / 3, 1 / 3, -_B / 6),
    (_B / 6, 1 / 3, _B / 3),
    (_B / 6, -1 / 3, _B / 3),
    (0, 0, 1),
)
_POSITION_PADDING = 16  # elements


def conv3x3_pack(weight: Tensor, panel: int) -> Tensor:
    """The weights as the products of Winograd's algorithm read them, ``(panels, 36, C * panel + 16)``.

    ``panel`` outputs stand together: element ``c * panel + o`` of a row is of channel c and output o of the panel, zero
    where there is none.
    """
    outputs, channels = weight.shape[:2]
    panels = -(-outputs // panel)
    g = torch.tensor(_WEIGHT_TRANSFORM, dtype=weight.dtype, device=weight.device)
    u = torch.einsum("ia,ocab,jb->ijco", g, weight, g).reshape(36, channels, outputs)
    u = F.pad(u, (0, panels * panel - outputs)).unflatten(2, (panels, panel))
    u = u.permute(2, 0, 1, 3).flatten(2)
    return F.pad(u, (0, _POSITION_PADDING)).contiguous()


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
