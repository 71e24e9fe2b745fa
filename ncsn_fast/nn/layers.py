"""Layers of the operators. Each takes and gives what its counterpart in plain PyTorch does, with the same state dict.

Belongs here: modules, their parameters, and which calls of them an operator serves. Does not belong here: arithmetic
(``ops``), what a changed layer is (``models/plain.py``), how layers are exchanged in a model (``replacing.py``).

Everywhere: images are ``(N, C, H, W)``, floating point, contiguous or channels_last, on any device. What no kernel
serves is computed by PyTorch, to the same result but rounding; ``ncsn_fast.info`` says what is served. The
convolutions are fastest in channels_last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..models.layers import CondInstanceNorm
from ..models.plain import tell_called, why_not_conv3x3, why_not_plain
from ..ops.algorithms import WINOGRAD
from ..ops.dispatch import select_convolution


class ConditionalInstanceNormELU(CondInstanceNorm):
    r"""Instance norm with a gain and an offset for each class, then ELU.

    .. math:: \mathrm{out} = \mathrm{elu}(\gamma_y (x - \mu) / \sqrt{\mathrm{var} + \mathrm{eps}} + \beta_y)

    The mean and the biased variance are each plane's own, in training and in evaluation; there are no running
    statistics.

    Args:
        num_features: channels C.
        num_classes: classes K: styles, noise levels, labels.
        eps: added to the variance.
        elu: False leaves out the activation.
        alpha: InstanceNorm++ of Song & Ermon 2019, with a third parameter for each class and channel.

    ``embed.weight`` is ``(K, 2C)``, columns gamma | beta, or ``(K, 3C)``, gamma | alpha | beta.

    Source: Dumoulin et al. 2017, "A Learned Representation for Artistic Style" (arXiv:1610.07629).
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        eps: float = 1e-5,
        *,
        elu: bool = True,
        alpha: bool = False,
    ) -> None:
        super().__init__(num_features, num_classes, eps, alpha)
        self.elu = elu

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Normalise.

        Args:
            x: ``(N, C, H, W)``.
            y: classes, ``(N,)`` integers in 0 .. K-1, or of length 1 for the whole batch.

        Returns:
            Shape, dtype and layout of ``x``. Errors: as of :func:`ncsn_fast.ops.cond_instance_norm_elu`.
        """
        return ops.cond_instance_norm_elu(x, *self.table(y), self.eps, self.elu)


def _row_of(norm: nn.InstanceNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """An unconditional norm as the operators take it: a table of one row, and every sample's label for it."""
    label = torch.zeros(1, dtype=torch.int64, device=x.device)
    if norm.weight is None:
        row = torch.zeros(1, 2 * x.shape[1], dtype=x.dtype, device=x.device)
        row[:, : x.shape[1]] = 1
        return label, row
    return label, torch.cat([norm.weight, norm.bias]).unsqueeze(0)


class InstanceNorm2d(nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d``, arguments and state dict as there, by the operator ``cond_instance_norm_elu``.

    With ``track_running_stats=True`` it is PyTorch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``; shape, dtype and layout of ``x``. Errors as of PyTorch's."""
        # PyTorch has errors and warnings of its own for what no norm is taken of.
        plain = x.dim() == 4 and x.shape[1] == self.num_features and x.shape[2:].numel() > 1
        if self.track_running_stats or not plain:
            return super().forward(x)
        return ops.cond_instance_norm_elu(x, *_row_of(self, x), self.eps, elu=False)


class Conv3x3(nn.Conv2d):
    """``torch.nn.Conv2d`` with a 3x3 kernel, arguments and state dict as there, by the operator ``conv3x3``.

    Padding of another size than the dilation, or of another mode than zeros, is laid around the image first; then
    the operator computes two dilations too much in height and width, which are cut off. That is done where its fast
    algorithm pays. What it does not serve (strides, groups, another kernel) is PyTorch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``; the shape that ``torch.nn.Conv2d`` gives, in the layout of ``x``. Errors as there."""
        d = self.dilation[0]
        served = (self.kernel_size, self.stride, self.groups) == ((3, 3), (1, 1), 1)
        if not served or self.dilation != (d, d) or x.dim() != 4 or x.shape[1] != self.in_channels:
            return super().forward(x)
        if self.padding in ("same", (d, d)) and self.padding_mode == "zeros":
            return ops.conv3x3(x, self.weight, self.bias, dilation=d)
        return self._convolve_within(x)

    def _convolve_within(self, x: Tensor) -> Tensor:
        """The convolution of the padded image, which is smaller by a dilation at each side."""
        d, sides = self.dilation[0], self._reversed_padding_repeated_twice
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(x, sides, mode=mode) if any(sides) else x
        tensors = (padded, self.weight, self.bias)
        if (
            min(padded.shape[2:]) <= 2 * d
            or select_convolution("conv3x3", None, "auto", d, *tensors) is not WINOGRAD
        ):
            return F.conv2d(*tensors, dilation=d)
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        y = ops.conv3x3(*tensors, dilation=d)
        return y[:, :, d:-d, d:-d].contiguous(memory_format=layout)


class MaxPool5(nn.MaxPool2d):
    """The 5x5 max pool with stride 1 that keeps the size, ``torch.nn.MaxPool2d(5, stride=1, padding=2)``.

    Args:
        border: what surrounds the image: ``"neg_inf"``, as in PyTorch, or ``"zero"``.
    """

    border = "neg_inf"

    def __init__(self, border: str = "neg_inf") -> None:
        super().__init__(5, stride=1, padding=2)
        self.border = border

    def forward(self, x: Tensor) -> Tensor:
        """Pool ``x``; shape, dtype and layout of ``x``. Errors: as of :func:`ncsn_fast.ops.max_pool5`."""
        return ops.max_pool5(x, padding=self.border)


class NormELUConv3x3(nn.Module):
    """Instance norm, ELU and a 3x3 convolution of the same size as one operator, and a residual added to it.

    Args:
        in_channels, out_channels: of the convolution.
        num_classes: K, of a conditional norm; None for one that is the same for all.
        dilation: of the convolution, whose zero padding is the same.
        bias: of the convolution.
        elu: False leaves out the activation.
        eps: of the norm.

    ``norm`` is a :class:`~torch.nn.InstanceNorm2d` with ``weight`` and ``bias`` or a
    :class:`ConditionalInstanceNormELU` without its ELU, ``conv`` a :class:`~torch.nn.Conv2d`. Layers that are no longer
    what they were built as (hooks, adapters, another class) are called, one after the other.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_classes: int | None = None,
        *,
        dilation: int = 1,
        bias: bool = True,
        elu: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_classes is None:
            self.norm = nn.InstanceNorm2d(in_channels, eps, affine=True)
        else:
            self.norm = ConditionalInstanceNormELU(in_channels, num_classes, eps, elu=False)
        self.conv = nn.Conv2d(
            in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=bias
        )
        self.elu = elu

    @classmethod
    def of(
        cls, norm: nn.InstanceNorm2d | CondInstanceNorm, conv: nn.Conv2d, *, elu: bool = True
    ) -> NormELUConv3x3:
        """The unit made of two layers that are there, which keep their parameters.

        Args:
            norm: a ``torch.nn.InstanceNorm2d`` without running statistics, or a conditional norm of this package.
            conv: a 3x3 convolution with stride 1 and zero padding that keeps the size.
            elu: whether there is an ELU between them.

        Raises:
            ValueError: layers that the operator does not serve; it says why.
        """
        reason = why_not_unit(norm, conv)
        if reason is not None:
            raise ValueError(f"expected layers that norm_elu_conv3x3 computes, got {reason}")
        unit = cls.__new__(cls)
        nn.Module.__init__(unit)
        unit.norm, unit.conv, unit.elu = norm, conv, elu
        return unit

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, residual: Tensor | None = None
    ) -> Tensor:
        """``conv(elu(norm(x))) + residual``.

        Args:
            x: ``(N, C, H, W)``.
            y: the classes of a conditional norm, ``(N,)`` or ``(1,)`` integers.
            residual: ``(N, O, H, W)``, or None.

        Returns:
            ``(N, O, H, W)``. Errors: as of :func:`ncsn_fast.ops.norm_elu_conv3x3`; TypeError without the classes that
            a conditional norm needs.
        """
        if y is None and isinstance(self.norm, CondInstanceNorm):
            raise TypeError("a conditional norm needs the classes y, got None")
        reason = why_not_unit(self.norm, self.conv)
        if reason is None:
            return norm_elu_conv(self.norm, self.conv, x, y, self.elu, residual)
        tell_called(self, reason)
        h = self.norm(x) if y is None else self.norm(x, y)
        h = self.conv(F.elu(h) if self.elu else h)
        return h if residual is None else h + residual


def _why_not_norm(norm: nn.Module) -> str | None:
    """Why the norm must be called, rather than computed by the operator; None if it need not."""
    kinds = (CondInstanceNorm, ConditionalInstanceNormELU, InstanceNorm2d)
    reason = why_not_plain(norm, type(norm) if type(norm) in kinds else nn.InstanceNorm2d)
    if reason is not None:
        return reason
    if isinstance(norm, CondInstanceNorm):
        return "it has an ELU of its own" if getattr(norm, "elu", False) else None
    return "it tracks running statistics" if norm.track_running_stats else None


def _why_not_conv(conv: nn.Module) -> str | None:
    """The same for the convolution."""
    return why_not_conv3x3(conv, Conv3x3 if type(conv) is Conv3x3 else nn.Conv2d)


def why_not_unit(norm: nn.Module, conv: nn.Module) -> str | None:
    """Why a norm and a convolution are not one operator; None if they are."""
    for name, reason in (("norm", _why_not_norm(norm)), ("conv", _why_not_conv(conv))):
        if reason is not None:
            return f"{name}: {reason}"
    return None


def norm_elu_conv(
    norm: nn.Module,
    conv: nn.Conv2d,
    x: Tensor,
    y: Tensor | None,
    elu: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """``conv(elu(norm(x))) + residual``, or without the ELU, of layers that pass :func:`why_not_unit`."""
    return ops.norm_elu_conv3x3(
        x,
        *(norm.table(y) if isinstance(norm, CondInstanceNorm) else _row_of(norm, x)),
        conv.weight,
        conv.bias,
        dilation=conv.dilation[0],
        residual=residual,
        eps=norm.eps,
        elu=elu,
    )
